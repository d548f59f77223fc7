"""What is refused before any tool sees it. The files are made by qemu-img and by hand."""

from __future__ import annotations

import gzip
import os
import struct
import subprocess
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
from disk_images import MIB, make_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repave.errors import ImageError
from repave.images.headers import ImageHeader, read_header


def qemu_img(*argv: str | Path) -> None:
    subprocess.run(["qemu-img", *argv], check=True, capture_output=True)


def refusal(path: Path) -> str:
    with pytest.raises(ImageError) as refused:
        read_header(path)
    assert refused.value.slug == "image-refused"
    return refused.value.detail


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_raw_gpt_disk_tells_its_sector_size(tmp_path: Path, sector: int) -> None:
    disk = make_disk(tmp_path / "d", 20 * MIB, sector_bytes=sector)
    assert read_header(disk) == ImageHeader("raw", 20 * MIB, sector, "gpt", has_esp=True)


@pytest.mark.parametrize(
    "options", ["compat=0.10", "compat=1.1", "cluster_size=2M", "cluster_size=512", "extended_l2=on,cluster_size=128k", "compression_type=zstd"]
)
def test_every_kind_of_whole_qcow2_is_taken(tmp_path: Path, options: str) -> None:
    qemu_img("create", "-f", "qcow2", "-o", options, tmp_path / "d", "3G")
    assert read_header(tmp_path / "d") == ImageHeader("qcow2", 3 * 1024**3)


@pytest.mark.parametrize("kind", ["vdi", "qed", "parallels"])
def test_formats_that_nobody_may_allow_are_refused_with_the_fix(tmp_path: Path, kind: str) -> None:
    make_disk(tmp_path / "raw", 20 * MIB)
    qemu_img("convert", "-f", "raw", "-O", kind, tmp_path / "raw", tmp_path / "d")
    assert "qemu-img convert -O qcow2" in refusal(tmp_path / "d")


@pytest.mark.parametrize(
    ("kind", "driver", "options"),
    [
        ("vmdk", "vmdk", "subformat=monolithicSparse"),
        ("vmdk", "vmdk", "subformat=streamOptimized"),
        ("vhd", "vpc", "subformat=dynamic,force_size=on"),
        ("vhd", "vpc", "subformat=fixed,force_size=on"),
        ("vhdx", "vhdx", "subformat=dynamic"),
        ("qcow2", "qcow2", "compat=1.1"),
    ],
)
def test_a_format_is_taken_where_the_list_names_it_and_else_refused_by_the_settings_name(tmp_path: Path, kind: str, driver: str, options: str) -> None:
    make_disk(tmp_path / "raw", 20 * MIB)
    qemu_img("convert", "-f", "raw", "-O", driver, "-o", options, tmp_path / "raw", tmp_path / "d")
    assert read_header(tmp_path / "d", formats=[kind]) == ImageHeader(kind, 20 * MIB)
    with pytest.raises(ImageError) as refused:
        read_header(tmp_path / "d", formats={"raw", "qcow2", "vmdk", "vhd", "vhdx"} - {kind})
    assert "image_formats" in refused.value.detail and "qemu-img convert -O qcow2" in refused.value.detail


def foreign(path: Path, kind: str, driver: str, *options: str) -> Path:
    qemu_img("create", "-f", driver, *options, path, "20M")
    assert read_header(path, formats=[kind]).virtual_size_bytes == 20 * MIB
    return path


def foreign_refusal(path: Path, kind: str) -> str:
    with pytest.raises(ImageError) as refused:
        read_header(path, formats=[kind])
    return refused.value.detail


def test_a_vmdk_that_refers_to_other_files_is_refused(tmp_path: Path) -> None:
    parent = foreign(tmp_path / "parent.vmdk", "vmdk", "vmdk")
    qemu_img("create", "-f", "vmdk", "-b", parent, "-F", "vmdk", tmp_path / "child.vmdk")
    assert "parent" in foreign_refusal(tmp_path / "child.vmdk", "vmdk")
    for kind in ("monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"):
        qemu_img("create", "-f", "vmdk", "-o", f"subformat={kind}", tmp_path / f"{kind}.vmdk", "20M")
        assert "descriptor" in foreign_refusal(tmp_path / f"{kind}.vmdk", "vmdk")
    text = parent.read_bytes()
    at = text.index(b"RW ")
    line = text[at : text.index(b"\n", at)]
    for lie in (b'RW 40960 FLAT "/etc/shadow" 0', b'RW 9 SPARSE "a"\nRW 9 FLAT "/etc/shadow" 0'):
        trap = tmp_path / "trap.vmdk"
        trap.write_bytes(
            text.replace(line, lie).replace(b"\0" * (len(lie) - len(line)), b"", 1) if len(lie) > len(line) else text.replace(line, lie.ljust(len(line)))
        )
        assert "other files" in foreign_refusal(trap, "vmdk")
    # no capacity: qemu would take the extents that the descriptor names
    assert "other files" in foreign_refusal(patched(parent, 12, bytes(8)), "vmdk")


def test_a_vhd_or_vhdx_that_is_a_difference_is_refused(tmp_path: Path) -> None:
    vhd = foreign(tmp_path / "d.vhd", "vhd", "vpc", "-o", "force_size=on")
    footer = bytearray(vhd.read_bytes()[-512:])
    footer[60:64], footer[64:68] = struct.pack(">I", 4), bytes(4)
    footer[64:68] = struct.pack(">I", ~sum(footer) & 0xFFFFFFFF)
    patched(patched(vhd, 0, footer), vhd.stat().st_size - 512, footer)
    assert "difference" in foreign_refusal(vhd, "vhd")
    vhdx = foreign(tmp_path / "d.vhdx", "vhdx", "vhdx")
    parameters = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
    table = vhdx.read_bytes().index(b"metadata")
    entry = vhdx.read_bytes().index(parameters, table)
    (offset,) = struct.unpack("<I", vhdx.read_bytes()[entry + 16 : entry + 20])
    assert "difference" in foreign_refusal(patched(vhdx, table + offset + 4, struct.pack("<I", 2)), "vhdx")


def test_a_vhd_with_a_hostile_field_is_refused(tmp_path: Path) -> None:
    good = foreign(tmp_path / "d.vhd", "vhd", "vpc", "-o", "force_size=on").read_bytes()
    header, table = 512, 512 + 1024
    for at, data in ((8, b"\1"), (header, b"x"), (header + 16, b"\xff" * 8), (header + 28, b"\xff" * 4), (header + 32, bytes(4)), (table, b"\0\1\0\0")):
        (tmp_path / "d.vhd").write_bytes(good)
        foreign_refusal(patched(tmp_path / "d.vhd", at, data), "vhd")


@pytest.mark.parametrize(("kind", "magic"), [("vmdk", b"KDMV"), ("vhd", b"conectix"), ("vhdx", b"vhdxfile")])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(head=st.binary(max_size=600))
def test_any_bytes_behind_a_foreign_magic_end_in_a_refusal(tmp_path: Path, kind: str, magic: bytes, head: bytes) -> None:
    (tmp_path / "d").write_bytes((magic + head).ljust(1024, b"\0") + magic.ljust(512, b"\1"))
    with pytest.raises(ImageError):
        read_header(tmp_path / "d", formats=[kind])


def test_a_fixed_vhd_that_begins_like_a_raw_disk_is_refused(tmp_path: Path) -> None:
    make_disk(tmp_path / "raw", 20 * MIB)
    qemu_img("convert", "-f", "raw", "-O", "vpc", "-o", "subformat=fixed,force_size=on", tmp_path / "raw", tmp_path / "d")
    assert "VHD" in refusal(tmp_path / "d")


def test_packed_files_are_refused_by_name(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "raw", 4 * MIB + 8 * MIB)
    (tmp_path / "gz").write_bytes(gzip.compress(disk.read_bytes()))
    assert "gzip" in refusal(tmp_path / "gz")
    for tool in ("xz", "zstd"):
        packed = subprocess.run([tool, "-c", disk], capture_output=True, check=True).stdout
        (tmp_path / tool).write_bytes(packed)
        assert tool in refusal(tmp_path / tool)


def test_a_raw_file_without_a_partition_table_or_cut_off_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d").write_bytes(bytes(MIB))
    assert "partition table" in refusal(tmp_path / "d")
    os.truncate(make_disk(tmp_path / "d", 20 * MIB), 20 * MIB - 100)
    assert "cut off" in refusal(tmp_path / "d")
    (tmp_path / "d").write_bytes(b"")
    refusal(tmp_path / "d")


def test_links_folders_and_devices_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(make_disk(tmp_path / "d", 20 * MIB))
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        assert "not a regular file" in refusal(path)
    with pytest.raises(ImageError):
        read_header(tmp_path / "link")


def patched(path: Path, at: int, data: bytes) -> Path:
    with path.open("r+b") as f:
        f.seek(at)
        f.write(data)
    return path


def test_a_qcow2_that_refers_to_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s" * MIB)
    qemu_img("create", "-f", "qcow2", "-b", tmp_path / "secret", "-F", "raw", tmp_path / "backed", "1M")
    assert "backing file" in refusal(tmp_path / "backed")
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'},data_file_raw=on", tmp_path / "split", "1M")
    assert "another file" in refusal(tmp_path / "split")


@pytest.mark.parametrize(
    ("at", "data", "says"),
    [
        (4, b"\0\0\0\x01", "version 1"),
        (4, b"\0\0\0\x04", "version 4"),
        (8, b"\0\0\0\0\0\0\2\0", "backing file"),
        (20, b"\0\0\0\x05", "clusters"),
        (20, b"\0\0\0\x40", "clusters"),
        (24, struct.pack(">Q", 64 * 1024**4), "L1 table"),
        (32, b"\0\0\0\x02", "encrypted"),
        (36, b"\xff\xff\xff\xff", "L1 table"),
        (36, b"\0\0\0\0", "L1 table"),
        (40, struct.pack(">Q", 1 << 60), "L1 table"),
        (40, struct.pack(">Q", 12345), "L1 table"),
        (72, struct.pack(">Q", 2), "corrupt"),
        (72, struct.pack(">Q", 4), "another file"),
        (72, struct.pack(">Q", 1 << 40), "not known"),
    ],
)
def test_a_qcow2_header_with_a_hostile_field_is_refused(tmp_path: Path, at: int, data: bytes, says: str) -> None:
    qemu_img("create", "-f", "qcow2", tmp_path / "d", "1G")
    assert says in refusal(patched(tmp_path / "d", at, data))


def test_a_small_file_that_claims_64_tib_is_refused(tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", "-o", "cluster_size=2M", tmp_path / "d", "64T")
    assert "are allowed" in refusal(tmp_path / "d")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(head=st.binary(max_size=200), magic=st.sampled_from([b"QFI\xfb\0\0\0\2", b"QFI\xfb\0\0\0\3", b""]))
def test_any_bytes_end_in_a_refusal_or_a_bounded_header(tmp_path: Path, head: bytes, magic: bytes) -> None:
    (tmp_path / "d").write_bytes(magic + head)
    with suppress(ImageError):
        assert read_header(tmp_path / "d").virtual_size_bytes <= 2 * 1024**4
