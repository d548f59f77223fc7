"""The image format: fixed windows of the disk, each an independent zstd frame in a file named by its SHA-256, and one JSON manifest.

    store/chunks/ab/abcd...      the compressed bytes; SHA-256 of the file = its name (also where the window is all zeros)
    store/manifests/IMAGE.json   this module's JSON, canonical (sorted keys, no blanks); its SHA-256 is the image's digest

The chunk files one after the other, in manifest order, are a plain zstd stream of the disk: `cat ... | zstd -d` is the way out.
Stdlib only; the agent imports it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

WINDOW_BYTES = 4 * 1024 * 1024
ZERO_BYTES = 64 * 1024  # granularity of `extents`
FORMAT = "repave-image-1"


class Chunk(NamedTuple):
    """One window. `extents` are the non-zero parts as (offset in the window, length), 64 KiB grains; empty = all zeros."""

    sha256: str  # of the compressed bytes
    compressed_bytes: int
    raw_sha256: str  # of the window
    extents: tuple[tuple[int, int], ...]


class Manifest(NamedTuple):
    """One image. Window i covers bytes i * window_bytes ... of the disk; the last one may be shorter."""

    size_bytes: int
    sector_bytes: int
    arch: str  # amd64, arm64
    boot: str  # uefi, bios
    chunks: tuple[Chunk, ...]
    window_bytes: int = WINDOW_BYTES

    @property
    def data_bytes(self) -> int:
        """Bytes that are written: the sum of the extents."""
        return sum(length for c in self.chunks for _, length in c.extents)

    @property
    def stored_bytes(self) -> int:
        return sum(c.compressed_bytes for c in self.chunks)

    def window(self, index: int) -> tuple[int, int]:
        """(offset, length) of window `index` on the disk, in bytes."""
        offset = index * self.window_bytes
        return offset, min(self.window_bytes, self.size_bytes - offset)


def render_manifest(manifest: Manifest) -> bytes:
    """Canonical bytes: equal manifests have equal digests."""
    value = {
        "format": FORMAT, "size_bytes": manifest.size_bytes, "sector_bytes": manifest.sector_bytes, "arch": manifest.arch,
        "boot": manifest.boot, "window_bytes": manifest.window_bytes,
        "chunks": [[c.sha256, c.compressed_bytes, c.raw_sha256, [list(e) for e in c.extents]] for c in manifest.chunks],
    }  # fmt: skip
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def parse_manifest(data: bytes, *, sha256: str | None = None) -> Manifest:
    """Raises ValueError where the digest, the format or a bound is wrong; nothing of it is trusted before that."""
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError("the manifest has another digest than the plan names")
    value: dict[str, Any] = json.loads(data)
    if value.get("format") != FORMAT:
        raise ValueError(f"manifest format {value.get('format')!r} is not {FORMAT}")
    chunks = tuple(Chunk(s, n, r, tuple((int(o), int(length)) for o, length in e)) for s, n, r, e in value["chunks"])
    manifest = Manifest(value["size_bytes"], value["sector_bytes"], value["arch"], value["boot"], chunks, value["window_bytes"])
    _verify_bounds(manifest)
    return manifest


def _verify_bounds(m: Manifest) -> None:
    if m.window_bytes <= 0 or m.window_bytes % ZERO_BYTES or m.window_bytes > 64 * 1024 * 1024:
        raise ValueError("window_bytes is out of range")
    if m.size_bytes <= 0 or m.size_bytes % m.sector_bytes or len(m.chunks) != -(-m.size_bytes // m.window_bytes):
        raise ValueError("size_bytes and the number of chunks do not fit")
    for i, c in enumerate(m.chunks):
        _, length = m.window(i)
        end = 0
        for offset, size in c.extents:
            if offset < end or size <= 0 or offset + size > length:
                raise ValueError(f"chunk {i}: extents are out of order or out of the window")
            end = offset + size
        if len(c.sha256) != 64 or set(c.sha256) - set("0123456789abcdef"):
            raise ValueError(f"chunk {i}: not a SHA-256")
