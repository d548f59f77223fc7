"""Writes one image to one disk so that a half-written disk never boots.

The order (design decision 12; reference: OVMF boots from a leftover backup GPT as soon as LBA 0 is there):

    clear         zero the first and the last MiB, flush
    write         body: fetch | verify | decode | verify | write, gaps made zero; the first MiB of the image is held back
    config-drive  the config drive and the new backup GPT, flush
    read-back     past the cache: the start of every chunk, 5 % whole, zero probes
    boot-entry    the caller's `boot_entry`
    seal          LBA 1 onward, flush, read back; then LBA 0 alone, last, flush

Imports nothing but the stdlib, zstandard and repave's image format and errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repave.agent.gpt import Partition
from repave.images.manifest import Manifest


@dataclass(frozen=True)
class WriteResult:
    """What was done. `bytes_written` counts what we sent to the disk, `bytes_zeroed` what the device made zero, `stages_s` seconds by stage."""

    bytes_written: int
    bytes_fetched: int
    bytes_zeroed: int
    stages_s: dict[str, float]


def write_image(
    device: Path,
    manifest: Manifest,
    *,
    fetch: Callable[[str], Any],
    config_drive: bytes,
    sector_bytes: int,
    disk_bytes: int,
    keep_writing: Callable[[], bool],
    progress: Callable[[str, int, int], None],
    partition_guid: bytes,
    boot_entry: Callable[[tuple[Partition, ...]], None] | None = None,
) -> WriteResult:
    """Afterwards the disk boots the image, and every byte of it was verified.

    Destroys: what is on `device`, a block device (opened with O_EXCL: the caller must not hold it so) or a plain file of `disk_bytes`.
    Repeatable: from the start. Until the last write, the first sector is zero.

    Args:
        fetch: SHA-256 of a chunk -> its bytes (bytes, bytearray or memoryview). Called from up to 4 threads at once; what it raises ends the write.
        config_drive: the config drive's file system, written to a new partition `config-2` at the end of the disk.
        keep_writing: False = the lease or the run is over. Asked before each chunk and each stage, from several threads; must be quick.
        progress: (stage, bytes done, bytes total); never two calls at once. Stages as in the module's docstring.
        partition_guid: 16 bytes, as on disk (`uuid.UUID.bytes_le`).
        boot_entry: called with the new partition table when the data are verified, before the disk can boot.

    Raises: RunFailed: disk-changed, sector-size, disk-too-small, image-refused (nothing was written);
        image-damaged, disk-write, read-back, stale-run (the disk cannot boot).
    """
    raise NotImplementedError
