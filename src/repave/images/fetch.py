"""Image files that are not sent to us: from a web server, or from a folder of this machine that the operator named.

What a URL can not do: change the scheme on its way, name this machine, a link-local address or one where clouds keep their metadata unless the setting
allows it, send more than there is room for, take longer than FETCH_S. The address that was looked at is the one that is connected to.
What comes has the digest or the signature that was asked for, or it is refused.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import shutil
import ssl
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urljoin, urlsplit

from repave.domain.urls import find_url_fault
from repave.errors import ImageError
from repave.outbound import AddressRefused, OutboundConnection

FETCH_S = 6 * 3600
STILL_S = 60  # no byte for so long: the connection is given up
MOST_SIGNATURE_BYTES = 64 * 1024
_MOST_REDIRECTS = 5
_PIECE_BYTES = 1 << 20
_BROKEN = (OSError, http.client.HTTPException, UnicodeError)


@dataclass(frozen=True)
class ImageSources:
    """Where images may come from but from who asks: the site's settings import_*."""

    folder: Path | None = None
    keyring: Path | None = None
    local_addresses: bool = False


def open_beneath(folder: Path, name: str) -> int:
    """A descriptor of the regular file `name` below `folder`. No part of `name` may be a symbolic link or lead upwards."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise ImageError("image-refused", "The path must be relative to the setting import_dir and stay in it.")
    try:
        here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        raise ImageError("image-refused", f"import_dir can not be opened: {e.strerror}.") from e
    try:
        for depth, part in enumerate(parts, 1):
            kind = os.O_DIRECTORY if depth < len(parts) else os.O_NONBLOCK  # a pipe must not hold us up
            inner = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | kind, dir_fd=here)
            os.close(here)
            here = inner
    except OSError as e:
        os.close(here)
        raise ImageError("image-refused", f"{name} can not be opened in the folder of images to import: {e.strerror}.") from e
    if not stat.S_ISREG(os.fstat(here).st_mode):
        os.close(here)
        raise ImageError("image-refused", f"{name} is not a regular file.")
    return here


def hash_file(fd: int) -> str:
    with open(fd, "rb", closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(url: str, out: IO[bytes], *, most_bytes: int, local_addresses: bool = False, progress: Callable[[int, int], None] = lambda done, total: None) -> str:
    """The file is in `out`; returns its SHA-256. A connection that breaks is resumed once.

    Args:
        progress: (bytes here, bytes in all or 0 where nobody said).

    Raises: ImageError image-refused or image-quota; OSError where the disk is full.
    """
    deadline, tag = time.monotonic() + FETCH_S, ""
    digest = hashlib.sha256()
    received = total = 0
    for last in (False, True):
        try:
            connection, answer = _ask(url, local_addresses, received, tag)
            with closing(connection):
                if received and (answer.status != 206 or not (answer.getheader("Content-Range") or "").startswith(f"bytes {received}-")):
                    raise _refused("it broke off, and the server does not resume")
                if not received:
                    said = answer.getheader("Content-Length") or ""
                    total, tag = int(said) if said.isdecimal() else 0, answer.getheader("ETag") or ""
                    if total > most_bytes:
                        raise ImageError("image-quota", f"The file has {total} bytes, there is room for {max(0, most_bytes)}.")
                while piece := answer.read1(_PIECE_BYTES):
                    received += len(piece)
                    if received > most_bytes:
                        raise ImageError("image-quota", f"There is room for {most_bytes} bytes.")
                    if time.monotonic() > deadline:
                        raise _refused(f"it took longer than {FETCH_S} seconds")
                    out.write(piece)
                    digest.update(piece)
                    progress(received, total)
                if received < total:
                    raise ConnectionError
                return digest.hexdigest()
        except AddressRefused as e:
            raise _refused(f"its address is {e}, which the setting import_local_addresses does not allow") from e
        except ssl.SSLCertVerificationError as e:
            raise _refused("the server's certificate is not trusted") from e
        except _BROKEN as e:
            if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # ours, not the network's
            if last or not received:
                raise _refused(f"it broke off after {received} bytes" if received else "the server can not be reached") from e
    raise AssertionError


def verify_signature(file: Path, signature: bytes, keyring: Path) -> None:
    """A key of the keyring (as `gpg --export` writes it) made this detached OpenPGP signature of the file. Raises ImageError image-refused."""
    gpgv = shutil.which("gpgv")
    if gpgv is None:
        raise ImageError("image-refused", "gpgv is not installed; it is needed to check a signature.")
    with tempfile.NamedTemporaryFile() as detached:
        detached.write(signature)
        detached.flush()
        argv = [gpgv, "--homedir", "/nonexistent", "--keyring", str(keyring), "--status-fd", "1", detached.name, str(file)]
        said = subprocess.run(argv, env={"LC_ALL": "C"}, stdin=subprocess.DEVNULL, capture_output=True, timeout=FETCH_S)
    words = {line.split(b" ")[1] for line in said.stdout.splitlines() if line.startswith(b"[GNUPG:] ")}
    if said.returncode or not {b"GOODSIG", b"VALIDSIG"} <= words or words & {b"EXPKEYSIG", b"REVKEYSIG", b"EXPSIG", b"BADSIG"}:
        raise ImageError("image-refused", "The signature is not by a key of the setting import_keyring, or not of this file.")


def _ask(url: str, local_addresses: bool, offset: int, tag: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """The connection and its answer 200 or 206, behind redirects of the same scheme."""
    scheme = url.partition(":")[0].lower()
    for _ in range(_MOST_REDIRECTS + 1):
        if fault := find_url_fault(url.partition("?")[0]):
            raise _refused(f"a URL {fault}")
        parts = urlsplit(url)
        if parts.scheme != scheme:
            raise _refused("the server redirects to another scheme")
        connection = OutboundConnection(parts.hostname or "", parts.port or (443 if scheme == "https" else 80), scheme, local_addresses, timeout_s=STILL_S)
        try:
            headers = {"Host": parts.netloc, "Accept-Encoding": "identity", "User-Agent": "repave"}
            if offset:
                headers |= {"Range": f"bytes={offset}-"} | ({"If-Range": tag} if tag.startswith('"') else {})
            connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), headers=headers)
            answer = connection.getresponse()
            if answer.status in (200, 206) and (offset or answer.status == 200):
                if (answer.getheader("Content-Encoding") or "identity") != "identity":
                    raise _refused("the server sends it packed")
                return connection, answer
            if answer.status not in (301, 302, 303, 307, 308) or not (location := answer.getheader("Location")):
                raise _refused(f"the server answers {answer.status}")
            url = _join(url, location)
        except BaseException:
            connection.close()
            raise
        connection.close()
    raise _refused("too many redirects")


def _join(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:  # brackets that do not hold an IPv6 address
        raise _refused("the server redirects to no URL") from None


def _refused(sentence: str) -> ImageError:
    return ImageError("image-refused", f"It can not be fetched: {sentence}.")
