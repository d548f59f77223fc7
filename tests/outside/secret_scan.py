"""A secret found in files however it lies there: raw, hex, URL, UTF-16, base64 at each of its three offsets, and all that inside gzip or zstd."""

from __future__ import annotations

import base64
import itertools
import re
import urllib.parse
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import zstandard

CRYPT_HASH = re.compile(rb"\$6\$(rounds=\d+\$)?[./0-9A-Za-z]{8,16}\$")
_PACKED = re.compile(rb"\x1f\x8b\x08|\x28\xb5\x2f\xfd")
_UNPACKED_BYTES = 4 << 20  # of one packed stream; what hides deeper is not looked for
_OVERLAP = 4096
_BLOCK = 64 << 10


def encodings_of(secret: str) -> dict[str, bytes]:
    """How the secret may lie in a file, by name."""
    raw = secret.encode()
    found = {"raw": raw, "hex": raw.hex().encode(), "HEX": raw.hex().upper().encode(), "url": urllib.parse.quote(secret, safe="").encode()}
    found |= {"utf-16-le": secret.encode("utf-16-le"), "utf-16-be": secret.encode("utf-16-be")}
    for shift in range(3):
        # The characters of base64 that depend on the secret alone, wherever it begins in what was encoded.
        inner = base64.b64encode(b"\0" * shift + raw)[(0, 2, 3)[shift] :]
        inner = inner[: len(inner) - (0, 3, 2)[(len(raw) + shift) % 3]]
        found |= {f"base64+{shift}": inner, f"base64url+{shift}": inner.translate(bytes.maketrans(b"+/", b"-_"))}
    return found


def find_in(data: bytes, secrets: Iterable[str]) -> list[str]:
    """The names of the encodings in which one of the secrets is in `data`, also packed. "crypt": any sha512-crypt hash."""
    needles = {(name, needle) for secret in secrets for name, needle in encodings_of(secret).items()}
    found = set()
    for prefix, part in [("", data), *(("packed ", p) for p in _unpack(data))]:
        found |= {prefix + name for name, needle in needles if needle in part}
        if b"$6$" in part and CRYPT_HASH.search(part):
            found.add(prefix + "crypt")
    return sorted(found)


def _unpack(data: bytes) -> Iterator[bytes]:
    for match in _PACKED.finditer(data):
        packed = data[match.start() :]
        try:
            if packed[0] == 0x1F:
                yield zlib.decompressobj(31).decompress(packed, _UNPACKED_BYTES)
            else:
                yield zstandard.ZstdDecompressor().decompressobj().decompress(packed)[:_UNPACKED_BYTES]
        except (zlib.error, zstandard.ZstdError, MemoryError):
            continue  # the magic by chance


def find_secret(files: Iterable[Path], secret: str) -> list[str]:
    """ "file: encoding" for each place."""
    return [f"{path.name}: {name}" for path in files for name in find_in(path.read_bytes(), [secret]) if "crypt" not in name]


class Scanner:
    """Looks again only at the blocks that have changed, and what is around them."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[int, int, int]] = {}  # inode, size, mtime
        self._blocks: dict[Path, list[int]] = {}

    def scan(self, files: Iterable[Path], secrets: Mapping[str, Collection[str]]) -> list[str]:
        """ "file: encoding" for each place. `secrets`: each with the names of the files that it may be in."""
        found = []
        for path in files:
            try:
                stat = path.stat()
                now = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
                if now == self._seen.get(path):
                    continue
                data = path.read_bytes().rstrip(b"\0")  # a segment of a log that is made long before it is full
            except FileNotFoundError:
                continue
            self._seen[path] = now
            here = [secret for secret, at in secrets.items() if path.name not in at]
            names = {name for part in self._changed(path, data) for name in find_in(part, here)}
            found += [f"{path.name}: {name}" for name in sorted(names)]
        return found

    def _changed(self, path: Path, data: bytes) -> Iterator[bytes]:
        """Each stretch of new blocks, with what is around it."""
        before, now = self._blocks.get(path, []), [zlib.crc32(data[at : at + _BLOCK]) for at in range(0, len(data), _BLOCK)]
        self._blocks[path] = now
        new = [n for n, crc in enumerate(now) if n >= len(before) or before[n] != crc]
        for _, run in itertools.groupby(enumerate(new), lambda pair: pair[1] - pair[0]):
            stretch = [n for _, n in run]
            yield data[max(0, stretch[0] * _BLOCK - _OVERLAP) : (stretch[-1] + 1) * _BLOCK + _OVERLAP]
