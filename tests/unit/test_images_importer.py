"""Importing: what is in the store afterwards, and what is not."""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from disk_images import MIB, make_disk

from repave.errors import ImageError
from repave.images.importer import ImportedImage, import_image
from repave.images.manifest import ZERO_BYTES, render_manifest
from repave.images.store import ImageStore

SIZE = 40 * MIB + 4096  # the last window is a short one


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "store")


def take(source: Path, store: ImageStore, **changes: Any) -> ImportedImage:
    return import_image(source, store, **({"max_bytes": 1 << 30} | changes))


def files(store: ImageStore) -> dict[str, int]:
    return {str(p.relative_to(store.root)): p.stat().st_size for p in store.root.rglob("*") if p.is_file() and p.suffix != ".lock" and p.name != "lock"}


def restored(store: ImageStore, sha256: str) -> bytes:
    """The disk, by the way out that needs nothing of ours but the manifest's order."""
    stream = b"".join(store.chunk_path(c.sha256).read_bytes() for c in store.read_manifest(sha256).chunks)
    return subprocess.run(["zstd", "-dcq"], input=stream, capture_output=True, check=True).stdout


def qcow2(source: Path, *options: str) -> Path:
    target = source.with_suffix(".qcow2")
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, source, target], check=True)
    return target


def test_raw_and_qcow2_of_one_disk_are_one_image_and_the_second_adds_nothing(tmp_path: Path, store: ImageStore) -> None:
    source = make_disk(tmp_path / "disk", SIZE, seed=1)
    seen: list[tuple[int, int]] = []
    first = take(source, store, progress=lambda done, total: seen.append((done, total)))
    before = files(store)
    again = [take(source, store), take(qcow2(source), store), take(qcow2(source, "-c"), store)]
    assert {i.manifest_sha256 for i in again} == {first.manifest_sha256}
    assert [i.added_bytes for i in again] == [0, 0, 0] and first.added_bytes == first.stored_bytes
    assert files(store) == before
    assert restored(store, first.manifest_sha256) == source.read_bytes()
    assert seen[-1] == (SIZE, SIZE) and seen == sorted(seen)
    assert (first.size_bytes, first.sector_bytes, first.boot, first.notes) == (SIZE, 512, "uefi", ())
    store.verify(store.read_manifest(first.manifest_sha256), deep=True)


@pytest.mark.parametrize(
    ("kind", "driver", "options"),
    [
        ("vmdk", "vmdk", "subformat=monolithicSparse"),
        ("vmdk", "vmdk", "subformat=streamOptimized"),
        ("vhd", "vpc", "force_size=on"),
        ("vhd", "vpc", "subformat=fixed,force_size=on"),
        ("vhdx", "vhdx", "subformat=dynamic"),
    ],
)
def test_a_disk_in_a_foreign_format_is_the_same_image_and_cut_off_it_is_refused(
    tmp_path: Path, store: ImageStore, kind: str, driver: str, options: str
) -> None:
    source = make_disk(tmp_path / "disk", SIZE, seed=1)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", driver, "-o", options, source, tmp_path / "d"], check=True)
    assert take(tmp_path / "d", store, formats=[kind]).manifest_sha256 == take(source, store).manifest_sha256
    os.truncate(tmp_path / "d", (tmp_path / "d").stat().st_size * 3 // 4 // 512 * 512)
    with pytest.raises(ImageError):
        take(tmp_path / "d", store, formats=[kind])


def test_nothing_of_an_import_lives_on_when_the_importer_is_killed(tmp_path: Path, store: ImageStore) -> None:
    source = qcow2(make_disk(tmp_path / "disk", SIZE, seed=4))
    begun, begins = os.pipe()
    child = os.fork()
    if child == 0:
        take(source, store, progress=lambda done, total: (os.write(begins, b"x"), time.sleep(60)))
        os._exit(0)
    os.close(begins)
    with os.fdopen(begun, "rb", buffering=0) as told:
        assert told.read(1), "it ended before it began"

    def readers() -> list[str]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == child and b"qemu-nbd" in (process / "cmdline").read_bytes():
                    found.append(process.name)
        return found

    deadline = time.monotonic() + 20
    alive = readers()
    assert alive
    os.kill(child, 9)
    os.waitpid(child, 0)

    def lives(pid: str) -> bool:
        with suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        return False

    while any(map(lives, alive)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert time.monotonic() < deadline


def test_the_way_out_is_cat_and_the_distributions_zstd(tmp_path: Path, store: ImageStore) -> None:
    source = make_disk(tmp_path / "disk", SIZE, seed=12)
    manifest = json.loads(store.manifest_path(take(qcow2(source), store).manifest_sha256).read_bytes())
    files = " ".join(f"chunks/{chunk[0][:2]}/{chunk[0]}" for chunk in manifest["chunks"])
    subprocess.run(f"cat {files} | /usr/bin/zstd -dq >{tmp_path}/out", shell=True, check=True, cwd=store.root)
    subprocess.run(["cmp", source, tmp_path / "out"], check=True)


def test_extents_are_exactly_the_grains_that_are_not_zero(tmp_path: Path, store: ImageStore) -> None:
    source = make_disk(tmp_path / "disk", SIZE, seed=2)
    manifest = store.read_manifest(take(source, store).manifest_sha256)
    data = source.read_bytes()
    said = {manifest.window(i)[0] + at for i, c in enumerate(manifest.chunks) for start, size in c.extents for at in range(start, start + size, ZERO_BYTES)}
    assert said == {at for at in range(0, SIZE, ZERO_BYTES) if any(data[at : at + ZERO_BYTES])}


def test_zeros_cost_one_small_file_whether_they_are_holes_or_written(tmp_path: Path, store: ImageStore) -> None:
    holes = make_disk(tmp_path / "holes", 400 * MIB)
    began = time.process_time()
    first = take(holes, store)
    assert time.process_time() - began < 2
    assert len(files(store)) <= 4  # the first window, the last, zeros, the manifest
    (tmp_path / "written").write_bytes(holes.read_bytes())
    assert take(tmp_path / "written", store).manifest_sha256 == first.manifest_sha256
    manifest = store.read_manifest(first.manifest_sha256)
    assert manifest.chunks[5].compressed_bytes < 400 and not manifest.chunks[5].extents


@pytest.mark.parametrize("convert", [False, True])
def test_a_broken_import_leaves_nothing(tmp_path: Path, store: ImageStore, convert: bool) -> None:
    other = take(make_disk(tmp_path / "other", 20 * MIB, seed=9), store)
    before = files(store)
    source = make_disk(tmp_path / "disk", SIZE, seed=3)

    def stop(done: int, total: int) -> None:
        if done > 20 * MIB:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take(qcow2(source) if convert else source, store, progress=stop)
    assert files(store) == before
    assert store.list_manifests() == [other.manifest_sha256]


@pytest.mark.parametrize("convert", [False, True])
def test_a_file_that_is_written_to_while_it_is_read_is_no_image(tmp_path: Path, store: ImageStore, convert: bool) -> None:
    source = make_disk(tmp_path / "disk", SIZE, seed=6)
    source = qcow2(source) if convert else source
    whole = source.read_bytes()

    def copy_on(done: int, total: int) -> None:
        if done == total:
            source.write_bytes(whole)  # in place, as cp does it: the same bytes, another time

    with pytest.raises(ImageError, match="changed while it was read") as refused:
        take(source, store, progress=copy_on)
    assert refused.value.slug == "image-refused"
    assert not files(store)


def test_a_killed_import_is_swept_by_the_next(tmp_path: Path, store: ImageStore) -> None:
    source = qcow2(make_disk(tmp_path / "disk", SIZE, seed=4))
    child = os.fork()
    if child == 0:
        take(source, store, progress=lambda done, total: os.kill(os.getpid(), 9) if done > 20 * MIB else None)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert files(store) and not store.list_manifests()
    imported = take(make_disk(tmp_path / "other", 20 * MIB, seed=5), store)
    needed = {c.sha256 for c in store.read_manifest(imported.manifest_sha256).chunks}
    assert {Path(f).name for f in files(store)} == needed | {f"{imported.manifest_sha256}.json"}


def test_the_quota_is_kept_before_it_is_passed(tmp_path: Path, store: ImageStore) -> None:
    source = make_disk(tmp_path / "disk", SIZE, seed=6)
    with pytest.raises(ImageError) as full:
        take(source, store, max_bytes=2 * MIB)
    assert full.value.slug == "image-quota" and not files(store)
    stored = take(source, store).stored_bytes
    take(source, store, max_bytes=stored + MIB)  # what is there already needs no room


def test_a_cut_off_qcow2_is_refused_without_a_path_in_the_error(tmp_path: Path, store: ImageStore) -> None:
    source = qcow2(make_disk(tmp_path / "disk", SIZE, seed=7))
    os.truncate(source, source.stat().st_size // 2)
    with pytest.raises(ImageError) as refused:
        take(source, store)
    assert refused.value.slug == "image-refused" and str(tmp_path) not in str(refused.value)
    assert not files(store)


def test_a_qcow2_with_a_backing_file_never_reaches_qemu_img(tmp_path: Path, store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = make_disk(tmp_path / "secret", 20 * MIB, seed=8)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", tmp_path / "trap"], check=True)
    monkeypatch.setenv("PATH", "/nonexistent")  # any tool that is looked for would be another refusal
    with pytest.raises(ImageError, match="backing file"):
        take(tmp_path / "trap", store)


def test_a_disk_with_an_mbr_is_refused_before_anything_is_stored(tmp_path: Path, store: ImageStore) -> None:
    disk = make_disk(tmp_path / "disk", 20 * MIB)
    disk.write_bytes(bytes(20 * MIB))
    subprocess.run(["sfdisk", "-q", disk], input=b"label: dos\ntype=83\n", check=True)
    with pytest.raises(ImageError, match="GPT"):
        take(disk, store)
    assert not files(store)


def test_a_damaged_chunk_is_named_and_a_new_import_mends_it(tmp_path: Path, store: ImageStore) -> None:
    source = make_disk(tmp_path / "disk", SIZE, seed=10)
    manifest = store.read_manifest(take(source, store).manifest_sha256)
    path = store.chunk_path(manifest.chunks[3].sha256)
    good = path.read_bytes()
    path.write_bytes(good[:50] + bytes([good[50] ^ 1]) + good[51:])
    store.verify(manifest)
    with pytest.raises(ImageError, match="Chunk 3 has another digest"):
        store.verify(manifest, deep=True)
    path.write_bytes(good[:-1])
    with pytest.raises(ImageError, match="Chunk 3 has"):
        store.verify(manifest)
    path.unlink()
    with pytest.raises(ImageError, match="Chunk 3 is missing") as damaged:
        store.verify(manifest)
    assert damaged.value.slug == "image-damaged"
    path.write_bytes(b"rot")
    take(source, store)
    store.verify(manifest, deep=True)


def test_removing_an_image_leaves_the_chunks_of_the_others(tmp_path: Path, store: ImageStore) -> None:
    source = make_disk(tmp_path / "disk", SIZE, seed=11)
    first = take(source, store).manifest_sha256
    with source.open("r+b") as f:
        f.seek(21 * MIB)
        f.write(b"another version")
    second = take(source, store)
    assert 0 < second.added_bytes < second.stored_bytes
    store.remove(first, keep=[first])
    assert len(store.list_manifests()) == 2, "kept: another image id still names it"
    store.remove(first)
    store.remove(first)
    store.verify(store.read_manifest(second.manifest_sha256), deep=True)
    with pytest.raises(ImageError) as gone:
        store.read_manifest(first)
    assert gone.value.slug == "image-missing"
    store.remove(second.manifest_sha256)
    assert not files(store)


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_only_digests_are_names(store: ImageStore, name: str) -> None:
    for ask in (store.chunk_path, store.read_manifest_bytes):
        with pytest.raises(ImageError):
            ask(name)


def test_a_manifest_with_another_digest_than_its_name_is_damaged(tmp_path: Path, store: ImageStore) -> None:
    sha256 = take(make_disk(tmp_path / "disk", 20 * MIB), store).manifest_sha256
    path = store.root / "manifests" / f"{sha256}.json"
    assert render_manifest(store.read_manifest(sha256)) == path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"amd64", b"arm64"))
    with pytest.raises(ImageError) as damaged:
        store.read_manifest_bytes(sha256)
    assert damaged.value.slug == "image-damaged"
