"""`repave image verify --boot`: an image of the store on a machine of the virtual rack, through the real reinstall."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from repave.images.importer import import_image
from repave.images.store import ImageStore
from repave.lab.boot_check import boot_image
from repave.lab.os_images import build_tiny

pytestmark = pytest.mark.timeout(1500)  # the ramdisk and the image may have to be built
CACHE = Path(os.environ.get("REPAVE_CACHE", Path(__file__).parents[2] / ".repave/cache"))


def test_an_image_of_the_store_comes_up_and_proves_itself_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store")
    made = import_image(build_tiny(CACHE), store, max_bytes=1 << 30)
    before = set(Path("/tmp").glob("rpv-*"))
    said: list[str] = []
    checked = boot_image(store, made.manifest_sha256, cache=CACHE, say=said.append)
    assert checked.is_proved, f"{checked.run['error']}\n{checked.console}"
    assert checked.run["proof"]["root_disk_serial"] == checked.run["disk_serial"]
    assert any("write-image" in line for line in said) and checked.console
    assert set(Path("/tmp").glob("rpv-*")) <= before
