"""A process of its own: the agent's writer writes an image to a disk file, and each write and flush goes into a log where the kernel takes it.

    record_on_host.py IMAGE DISK LOG SECTOR_BYTES

The code that runs is the one on PYTHONPATH, so that a copy with a planted bug is recorded the same way. What is written down is what the writer
asks of the kernel: pwrite on its O_DIRECT descriptor is a write that the disk may lose until fsync has returned, which is a flush; a hole
that is punched is a write of zeros.
"""

from __future__ import annotations

import os
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

from write_log import LogWriter

from repave.agent import target
from repave.agent.writer import write_image
from repave.images.importer import import_image
from repave.images.store import ImageStore

CONFIG_DRIVE = b"the config drive of a power loss " * 20000


def main(image: Path, disk: Path, log: Path, sector_bytes: int) -> None:
    store = ImageStore(log.with_suffix(".store"))
    imported = import_image(image, store, max_bytes=1 << 30)
    manifest = store.read_manifest(imported.manifest_sha256)
    writer = _log_the_kernel_calls(log, disk)
    write_image(
        disk, manifest, fetch=lambda sha256: store.chunk_path(sha256).read_bytes(), config_drive=CONFIG_DRIVE,
        sector_bytes=sector_bytes, disk_bytes=disk.stat().st_size, keep_writing=lambda: True, progress=lambda stage, done, total: None,
        partition_guid=uuid.UUID(int=7).bytes_le,
    )  # fmt: skip
    writer.close()


def _log_the_kernel_calls(log: Path, disk: Path) -> LogWriter:
    """Under one lock, so that the log has the order in which the calls were made."""
    lock, writer = threading.Lock(), LogWriter(log.open("wb"))
    pwrite, fsync, libc = os.pwrite, os.fsync, target._libc
    identity = disk.stat().st_ino

    def logged_pwrite(fd: int, data: Any, offset: int) -> int:
        with lock:
            done = pwrite(fd, data, offset)
            if os.fstat(fd).st_ino == identity:
                writer.write(offset, bytes(data[:done]))
            return done

    def logged_fsync(fd: int) -> None:
        with lock:
            fsync(fd)
            if os.fstat(fd).st_ino == identity:
                writer.flush()

    class Libc:
        def fallocate(self, fd: int, mode: int, offset: int, length: int) -> int:
            with lock:
                failed: int = libc.fallocate(fd, mode, offset, length)
                if not failed:
                    writer.write(offset, bytes(length))
                return failed

    os.pwrite, os.fsync = logged_pwrite, logged_fsync  # type: ignore[assignment]
    target._libc = Libc()
    return writer


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
