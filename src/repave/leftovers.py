"""What an earlier life left half-written in our folders, swept at start, before anything of this life writes.

Only names of our own. A worker that is alone (SQLite: it holds the lock) wrote none of them itself yet, so all are stale; where folders are
shared, what is younger than an hour may be another worker's work. The rest has sweepers of its own: keys of ended runs (engine.reconcile),
chunks that no image needs (images/store.py, at each import), media in drives (workflow/media_sweep.py).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import structlog

from repave.config import Settings
from repave.images.store import ImageStore
from repave.ramdisk.media import WORK_PREFIX
from repave.workflow.lease import Lease

ABANDONED_S = 3600.0  # the longest work on one file is the upload of an image, and its file is touched with every MiB

log = structlog.get_logger()


def sweep_files(settings: Settings, images: ImageStore, lease: Lease) -> dict[str, int]:
    """Stale files are gone; returns how many of each kind. Call it when the lease is taken and nothing runs yet."""
    before = None if lease.alone else time.time() - ABANDONED_S
    counts = {
        "half-written": _remove(_half_written(settings), before),
        "media": _remove(settings.data_dir.glob(f"{WORK_PREFIX}*/"), time.time() - ABANDONED_S, shutil.rmtree),  # python -m repave.ramdisk asks for no lock
        "uploads": _remove(_inside(images.root / "uploads"), before),
        "images": _count(images.root, images.remove_half_made),
        "markers": _count(settings.key_file.parent, lambda: lease.sweep_markers(before=time.time() - ABANDONED_S)),
    }
    found = {kind: count for kind, count in counts.items() if count}
    if found:
        log.info("removed what an earlier life left", **found)
    return found


def _half_written(settings: Settings) -> Iterator[Path]:
    """As secrets.write_private_files names them."""
    secret = settings.key_file.parent
    for folder in (secret, secret / "run-keys", settings.data_dir):
        yield from folder.glob(".*.new")


def _inside(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.is_dir() else iter(())


def _remove(paths: Iterator[Path], before: float | None, remove: Callable[[Path], None] = Path.unlink) -> int:
    """Those not touched since `before` (seconds since 1970; None: all) are gone; returns how many."""

    def remove_old(path: Path) -> int:
        if before is not None and path.lstat().st_mtime >= before:
            return 0
        remove(path)
        return 1

    return sum(_count(path, partial(remove_old, path)) for path in list(paths))


def _count(where: Path, sweep: Callable[[], int]) -> int:
    """What it says, or 0 where it can not: no start fails for want of tidiness."""
    try:
        return sweep()
    except FileNotFoundError:  # another worker sweeps too
        return 0
    except OSError as error:
        log.warning("what an earlier life left stays", path=str(where), why=error.strerror)
        return 0
