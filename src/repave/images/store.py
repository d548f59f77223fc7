"""The folder of images: chunk files named by their digest, manifests named by theirs. Nothing else is an image.

ROOT/chunks/ab/abcd...            one window, compressed (manifest.py)
ROOT/manifests/SHA256.json        one image; written last, so that an image that is listed is whole
ROOT/tmp/                         files being made; emptied by whoever holds the lock next
ROOT/lock                         imports and removals, one at a time, also across processes
ROOT/catalogue.lock               the same, and what a catalogue says of them: where one names the images, its rows and the files change together
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from repave.errors import ImageError
from repave.images.manifest import Manifest, parse_manifest, render_manifest

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LOOK_S = 0.1  # between two looks at a lock that somebody has


class ImageStore:
    """All methods but `write_chunk`, `write_manifest` and `sweep` take the lock themselves where they need it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._chunks, self._manifests, self.tmp = root / "chunks", root / "manifests", root / "tmp"
        for folder in (self._chunks, self._manifests, self.tmp):
            folder.mkdir(parents=True, exist_ok=True)

    def chunk_path(self, sha256: str) -> Path:
        """Where the chunk is or would be. Raises ImageError image-missing where `sha256` is no digest."""
        if not _SHA256.fullmatch(sha256):
            raise ImageError("image-missing", "That is no SHA-256.")
        return self._chunks / sha256[:2] / sha256

    def manifest_path(self, sha256: str) -> Path:
        """Where the manifest is or would be. Raises ImageError image-missing where `sha256` is no digest."""
        if not _SHA256.fullmatch(sha256):
            raise ImageError("image-missing", "That is no SHA-256.")
        return self._manifests / f"{sha256}.json"

    def list_manifests(self) -> list[str]:
        return sorted(p.stem for p in self._manifests.glob("*.json") if _SHA256.fullmatch(p.stem))

    def read_manifest_bytes(self, manifest_sha256: str) -> bytes:
        """The bytes that have this digest. Raises ImageError image-missing or image-damaged."""
        try:
            data = self.manifest_path(manifest_sha256).read_bytes()
        except FileNotFoundError as e:
            raise ImageError("image-missing") from e
        if hashlib.sha256(data).hexdigest() != manifest_sha256:
            raise ImageError("image-damaged", "The manifest has another digest than its name.")
        return data

    def read_manifest(self, manifest_sha256: str) -> Manifest:
        try:
            return parse_manifest(self.read_manifest_bytes(manifest_sha256))
        except (ValueError, KeyError, TypeError) as e:
            raise ImageError("image-damaged", "The manifest can not be read.") from e

    def verify(self, manifest: Manifest, *, deep: bool = False) -> None:
        """Every chunk is there with the right size; `deep`: with the right digest too (0.8 s per GB stored).

        Raises: ImageError image-damaged, naming the first chunk that is not.
        """
        seen: set[str] = set()
        for index, chunk in enumerate(manifest.chunks):
            if chunk.sha256 in seen:
                continue
            seen.add(chunk.sha256)
            path = self.chunk_path(chunk.sha256)
            try:
                size = path.stat().st_size
                right = not deep or hashlib.sha256(path.read_bytes()).hexdigest() == chunk.sha256
            except FileNotFoundError as e:
                raise ImageError("image-damaged", f"Chunk {index} is missing.", chunk=index) from e
            except OSError as e:
                raise ImageError("image-damaged", f"Chunk {index} can not be read: {e.strerror}.", chunk=index) from e
            if size != chunk.compressed_bytes:
                raise ImageError("image-damaged", f"Chunk {index} has {size} bytes, not {chunk.compressed_bytes}.", chunk=index)
            if not right:
                raise ImageError("image-damaged", f"Chunk {index} has another digest than its name.", chunk=index)

    def remove(self, manifest_sha256: str, *, keep: Iterable[str] = ()) -> None:
        """The image is gone, with the chunks that no other manifest needs. `keep`: manifests still in use; one that is named there stays.

        Repeatable: yes; what is not there is removed already.
        """
        with self.lock():
            if manifest_sha256 not in set(keep):
                self.manifest_path(manifest_sha256).unlink(missing_ok=True)
                self.sweep()

    def used_bytes(self) -> int:
        """Bytes that all files take on the disk, as the quota counts them."""
        used = 0
        for entry in _files(self.root):
            with suppress(FileNotFoundError):  # a half-made file of another process
                used += entry.stat(follow_symlinks=False).st_blocks * 512
        return used

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.root).free

    @contextmanager
    def lock(self, *, wait: bool = True) -> Iterator[None]:
        """Alone with the folder. Blocks: while another import or removal runs; without `wait` it raises BlockingIOError then."""
        with self._alone("lock", wait=wait):
            yield

    @contextmanager
    def catalogue_lock(self, *, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Nobody else imports or removes, here or in another process, until files and rows say the same again. Taken before `lock`. Blocks: as that does.

        `waiting` is called while somebody else does, and what it raises ends the wait.
        """
        with self._alone("catalogue.lock", waiting=waiting):
            yield

    @contextmanager
    def _alone(self, name: str, *, wait: bool = True, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        fd = os.open(self.root / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not wait:
                        raise
                waiting()
                time.sleep(_LOOK_S)
            yield
        finally:
            os.close(fd)

    def holds(self, sha256: str, data: bytes) -> bool:
        """The chunk is there and is `data`: a damaged one does not count."""
        try:
            return self.chunk_path(sha256).read_bytes() == data
        except FileNotFoundError:
            return False

    def write_chunk(self, sha256: str, data: bytes) -> None:
        """The chunk is on disk, whole, whatever was there before. Needs the lock."""
        path = self.chunk_path(sha256)
        path.parent.mkdir(exist_ok=True)
        self._write(path, data)

    def write_manifest(self, manifest: Manifest) -> str:
        """The image is listed; the chunks' folders were flushed first. Returns its digest. Needs the lock."""
        data = render_manifest(manifest)
        sha256 = hashlib.sha256(data).hexdigest()
        for folder in {self.chunk_path(c.sha256).parent for c in manifest.chunks} | {self._chunks}:
            _flush_folder(folder)
        self._write(self.manifest_path(sha256), data)
        _flush_folder(self._manifests)
        return sha256

    def sweep(self) -> None:
        """Half-made files and chunks that no manifest needs are gone. Needs the lock.

        A manifest that can not be read keeps every chunk: what it needs is not known.
        """
        self._empty_tmp()
        try:
            needed = {c.sha256 for m in self.list_manifests() for c in self.read_manifest(m).chunks}
        except ImageError:
            return
        for entry in _files(self._chunks):
            if entry.name not in needed:
                os.unlink(entry.path)

    def remove_half_made(self) -> int:
        """What a killed import left in tmp/ is gone, unless somebody holds the lock, who does it himself; returns how many files."""
        try:
            with self.lock(wait=False):
                return self._empty_tmp()
        except BlockingIOError:
            return 0

    def _empty_tmp(self) -> int:
        found = list(_files(self.tmp))
        for entry in found:
            os.unlink(entry.path)
        return len(found)

    def _write(self, path: Path, data: bytes) -> None:
        fd, name = tempfile.mkstemp(dir=self.tmp)
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            os.fchmod(fd, 0o644)  # a second process serves them
            f.flush()
            os.fsync(fd)
        os.rename(name, path)


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path))
            else:
                yield entry


def _flush_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
