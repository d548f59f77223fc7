"""Which partitions outlive a reinstall, and where the new table has them."""

from __future__ import annotations

import random
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest
from disk_images import MIB, fdisk, make_disk

from repave.agent.gpt import ESP, LINUX_DATA, DiskTooSmall, Partition, check_room, parse_table
from repave.agent.target import TargetDisk
from repave.agent.writer import write_image
from repave.domain.kept_partitions import choose_kept, parse_names
from repave.errors import RunFailed
from repave.images.importer import import_image
from repave.images.store import ImageStore

IMAGE_BYTES, DISK_BYTES = 24 * MIB, 96 * MIB
CONFIG = b"the config drive " * 9000
GUID = "6f0e3b1c-5d1f-4b7a-9a86-0123456789ab"


def partition(name: str = "data", **more: Any) -> dict[str, Any]:
    return Partition(3, LINUX_DATA, uuid.UUID(GUID), 2048, 4095, name, 1 << 60).as_json() | more


def disk(*partitions: dict[str, Any]) -> dict[str, Any]:
    return {"path": "/dev/sda", "serial": "S1", "wwn": "", "size_bytes": 10, "partitions": list(partitions)}


def plan(*keep: dict[str, Any], serial: str = "S1") -> dict[str, Any]:
    return {"disk_serial": serial, "disk_wwn": "", "disk_size_bytes": 10, "keep": list(keep)}


# ---- which ----


@pytest.mark.parametrize("name", ["data", GUID])
def test_a_partition_is_named_by_its_name_or_guid(name: str) -> None:
    assert choose_kept(disk(partition("swap", guid=str(uuid.uuid4())), partition()), [name], unfinished=None) == [partition()]


def test_a_partition_named_twice_is_kept_once_and_a_guid_may_be_written_in_capitals() -> None:
    assert choose_kept(disk(partition()), ["data", GUID.upper()], unfinished=None) == [partition()]


def test_a_server_that_keeps_nothing_needs_no_table() -> None:
    assert choose_kept({"path": "/dev/sda"}, [], unfinished=None) == []


def test_without_a_table_it_is_what_the_unfinished_of_this_disk_was_to_keep() -> None:
    assert choose_kept(disk(), ["data"], unfinished=plan(partition())) == [partition()]


@pytest.mark.parametrize(
    ("there", "unfinished", "why"),
    [
        ([], None, "no partition table"),
        ([], plan(partition(), serial="S2"), "no partition table"),  # of another disk
        ([], plan(partition("other")), "other"),
        ([partition("swap")], plan(partition()), "swap"),  # somebody has made a new table since
        ([partition(), partition()], None, "2 partitions"),
        ([partition(type_guid=str(ESP))], None, "EFI system partition"),
        ([partition("config-2", guid=str(uuid.uuid4())), partition("config-2")], None, "0 partitions"),
    ],
)
def test_what_can_not_be_kept_for_certain_is_refused(there: list[dict[str, Any]], unfinished: dict[str, Any] | None, why: str) -> None:
    with pytest.raises(RunFailed, match=why) as refused:
        choose_kept(disk(*there), ["data"], unfinished=unfinished)
    assert refused.value.slug == "kept-partition"


def test_the_config_drives_partition_can_not_be_kept() -> None:
    assert parse_names(" data,,scratch,data") == ["data", "scratch"]
    with pytest.raises(ValueError, match="config-2"):
        parse_names("data,config-2")


# ---- where ----


@pytest.mark.parametrize("sector_bytes", [512, 4096])
@pytest.mark.parametrize(("first_mib", "mib"), [(30, 10), (26, 4), (70, 25)], ids=["in the middle", "right behind the image", "at the end"])
def test_a_kept_partition_is_there_bit_for_bit_and_in_the_new_table(tmp_path: Path, sector_bytes: int, first_mib: int, mib: int) -> None:
    image = make_disk(tmp_path / "image", IMAGE_BYTES, sector_bytes=sector_bytes, seed=3)
    store = ImageStore(tmp_path / "store")
    manifest = store.read_manifest(import_image(image, store, max_bytes=1 << 30).manifest_sha256)
    target = tmp_path / "disk"
    target.write_bytes(old := random.Random(9).randbytes(DISK_BYTES))
    kept = Partition(7, LINUX_DATA, uuid.UUID(GUID), first_mib * MIB // sector_bytes, (first_mib + mib) * MIB // sector_bytes - 1, "data", 1 << 60)

    write_image(
        target, manifest, fetch=lambda sha256: store.chunk_path(sha256).read_bytes(), config_drive=CONFIG, sector_bytes=sector_bytes, disk_bytes=DISK_BYTES,
        keep_writing=lambda: True, progress=lambda stage, done, total: None, partition_guid=uuid.uuid4().bytes_le, keep=[kept],
    )  # fmt: skip

    new = target.read_bytes()
    start, end = kept.span(sector_bytes)
    assert new[start:end] == old[start:end]
    table = {p.name: p for p in parse_table(new[:MIB], sector_bytes)}
    assert table["data"] == kept, "with its number, type, GUID and attributes"
    config, config_end = table["config-2"].span(sector_bytes)
    assert new[config:].startswith(CONFIG) and (config_end <= start or config >= end)
    assert new[MIB : 20 * MIB] == image.read_bytes()[MIB : 20 * MIB]
    assert "No errors detected" in fdisk(target, sector_bytes, "v", "q")
    if sector_bytes == 512:
        assert "No problems found" in subprocess.run(["sgdisk", "-v", target], capture_output=True, text=True).stdout


@pytest.mark.parametrize(("first_mib", "mib"), [(23, 10), (90, 6)], ids=["in the image's way", "in the tables' way"])
def test_one_that_is_in_the_way_is_refused_before_the_line(first_mib: int, mib: int) -> None:
    kept = Partition(1, LINUX_DATA, uuid.UUID(GUID), first_mib * 2048, (first_mib + mib) * 2048 - 1, "data")
    with pytest.raises(DiskTooSmall, match="in the way"):
        check_room(IMAGE_BYTES, len(CONFIG), disk_bytes=DISK_BYTES, sector_bytes=512, keep=[kept])


@pytest.mark.parametrize("work", ["write", "write_zeros", "make_zero"])
def test_the_disk_itself_refuses_a_byte_of_what_is_kept(tmp_path: Path, work: str) -> None:
    file = tmp_path / "disk"
    file.write_bytes(b"\xa5" * (4 * MIB))
    with TargetDisk(file, sector_bytes=512, size_bytes=4 * MIB, keep=[(2 * MIB, 3 * MIB)]) as target:
        for offset in (2 * MIB - 512, 3 * MIB - 512):
            with pytest.raises(RunFailed, match="to be kept"):
                getattr(target, work)(offset, memoryview(bytes(1024)) if work == "write" else 1024)
        target.write_zeros(MIB, MIB)
        target.write_zeros(3 * MIB, MIB)
    assert file.read_bytes() == b"\xa5" * MIB + bytes(MIB) + b"\xa5" * MIB + bytes(MIB)
