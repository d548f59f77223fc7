"""A partition that the owner wants to find again outlives a reinstall that fails half way, when its table is gone, and the next one too."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

from conftest import MIB

from repave.agent.gpt import Partition
from repave.agent.inventory import read_sound_partitions as read_partitions

AT, LENGTH = 200 * MIB, 16 * MIB
SECTORS = [AT // 512, (AT + LENGTH) // 512 - 1]


def make_data_partition(disk: Path) -> bytes:
    table = f"label: gpt\nstart={SECTORS[0]}, size={LENGTH // 512}, name=data, type=linux\n"
    subprocess.run(["/sbin/sfdisk", "-q", "--wipe=never", disk], input=table, text=True, check=True)
    owned = random.Random(5).randbytes(LENGTH)
    with disk.open("r+b") as file:
        file.seek(AT)
        file.write(owned)
    return owned


def read_data(disk: Path) -> bytes:
    with disk.open("rb") as file:
        file.seek(AT)
        return file.read(LENGTH)


def find(disk: Path, name: str) -> Partition | None:
    return next((p for p in read_partitions(disk, 512) if p.name == name), None)


def test_a_partition_named_in_the_servers_settings_outlives_a_failed_write_and_the_next(lab):
    disk, settings = lab.machines["lab06"].root_disk, "/servers/lab06"
    owned = make_data_partition(disk)
    before = find(disk, "data")
    lab.watch.look_again("lab06")
    lab.client.patch(settings, {"keep_partitions": "data"})
    try:
        assert lab.client.post("/plans", {"servers": ["lab06"], "image": "heavy"})["erased"][0]["keeps"] == ["data"]

        manifest = lab.heavy_manifest()
        last = lab.images.chunk_path([c for c in manifest.chunks if c.extents][-1].sha256)
        away = last.with_suffix(".away")
        lab.reinstall(["lab06"], "heavy")
        failed = lab.newest_batch()
        lab.wait_for_event(failed, "run.power-off")  # the image was verified before
        last.rename(away)
        try:
            run = lab.wait_for_end(failed)["lab06"]
        finally:
            away.rename(last)
        assert run["error"]["class"] == "image-damaged" and run["past_the_line"], lab.describe(failed)
        assert read_partitions(disk, 512) == () and read_data(disk) == owned, "no table, and what it pointed to is there"
        [crossed] = [e for e in lab.events(failed) if e["type"] == "run.crossed"]
        assert [crossed["keep"][0][name] for name in ("first_lba", "last_lba")] == SECTORS, "the audit tells how to repair it by hand"

        lab.reinstall(["lab06"], "heavy")
        run = lab.wait_for_end(lab.newest_batch())["lab06"]
        assert run["state"] == "running", lab.describe(lab.newest_batch())
        now = find(disk, "data")
        assert now == before._replace(number=now.number), "the image has a first partition of its own"
        assert find(disk, "config-2") is not None and read_data(disk) == owned
        assert "No problems found" in subprocess.run(["/sbin/sgdisk", "-v", disk], capture_output=True, text=True).stdout

        with disk.open("r+b") as file:  # its own table is damaged: what an earlier run kept is no longer known to be true
            file.seek(512 + 16)  # the header's checksum
            file.write(bytes(4))
        lab.watch.look_again("lab06")
        lab.reinstall(["lab06"], "heavy")
        refused = lab.wait_for_end(lab.newest_batch())["lab06"]
        assert (refused["error"]["class"], refused["past_the_line"]) == ("kept-partition", False), lab.describe(lab.newest_batch())
        make_data_partition(disk)
        lab.watch.look_again("lab06")

        lab.client.patch(settings, {"keep_partitions": "data,gone"})
        digest = lab.disk_digest("lab06")
        lab.reinstall(["lab06"], "heavy")
        refused = lab.wait_for_end(lab.newest_batch())["lab06"]
        assert (refused["error"]["class"], refused["past_the_line"]) == ("kept-partition", False) and "gone" in refused["error"]["cause"]
        assert lab.disk_digest("lab06") == digest
    finally:
        lab.client.patch(settings, {"keep_partitions": ""})
