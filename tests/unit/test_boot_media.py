"""The ISO and a run's slot laid over it, made from small stand-ins for kernel and initramfs; and our own part of the ramdisk."""

import hashlib
import json
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from repave.agent.protocol import SLOT_FILE, Slot
from repave.errors import RepaveError
from repave.ramdisk import base, cpio
from repave.ramdisk.build import BootFiles, build_ramdisk, render_agent_archive
from repave.ramdisk.media import LIVE_BYTES, NETWORK_FILE, SLOT_BYTES, BootMedia, build_iso, render_slot

SLOT = Slot("run-1", "https://10.0.2.2:8471", "one-boot-only", "-----BEGIN CERTIFICATE-----\n", None)
NETWORK = {"mac": "52:54:00:AA:BB:CC", "address": "192.0.2.10", "prefix": 24, "gateway": "192.0.2.1", "dns": ["192.0.2.53"]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    content = random.Random(1)
    for name in ("kernel", "initramfs", "shim", "grub"):
        (folder / name).write_bytes(content.randbytes(100_000))
    return BootFiles(*(folder / name for name in ("kernel", "initramfs", "shim", "grub")))


@pytest.fixture(scope="module")
def media(files, tmp_path_factory):
    iso = tmp_path_factory.mktemp("iso") / "boot.iso"
    build_iso(files, iso)
    media = BootMedia(iso)
    yield media
    media.close()


def unpack(archive: bytes, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    subprocess.run(["cpio", "-idm", "--quiet"], input=archive, cwd=folder, check=True)


def extract(iso: bytes, path: str, folder: Path) -> bytes:
    (folder / "read.iso").write_bytes(iso)
    subprocess.run(["xorriso", "-osirrox", "on", "-indev", folder / "read.iso", "-extract", path, folder / "got"], check=True, capture_output=True)
    return (folder / "got").read_bytes()


def test_the_disc_as_built_is_inert_and_a_slot_makes_it_live(media, tmp_path):
    slot = render_slot(SLOT)
    inert, live = media.read(0, media.size, None), media.read(0, media.size, slot)
    assert b"set live=1" not in extract(inert, "/boot/live.cfg", tmp_path)
    assert SLOT.token.encode() not in inert
    (tmp_path / "got").unlink()
    assert extract(live, "/boot/live.cfg", tmp_path).split() == [b"set", b"live=1"]
    (tmp_path / "got").unlink()
    assert extract(live, "/boot/slot.cpio", tmp_path) == slot
    changed = [at for at in range(media.size) if inert[at] != live[at]]
    assert len(inert) == len(live) == media.size
    assert len(changed) <= SLOT_BYTES + LIVE_BYTES


def test_pieces_of_any_size_make_up_the_whole(media):
    slot = render_slot(SLOT)
    whole = media.read(0, media.size, slot)
    for step in (997, 65_536, 1_000_003):
        assert b"".join(media.read(at, step, slot) for at in range(0, media.size, step)) == whole
    assert media.read(media.size, 10, slot) == b""


def test_the_etag_changes_with_the_slot(media):
    other = render_slot(SLOT._replace(token="another"))
    assert len({media.etag(None), media.etag(render_slot(SLOT)), media.etag(other)}) == 3
    assert media.etag(None) == media.etag(None)


def test_the_same_files_make_the_same_disc(files, media, tmp_path):
    build_iso(files, tmp_path / "again.iso")
    assert (tmp_path / "again.iso").read_bytes() == media.read(0, media.size, None)


def test_a_disc_without_places_for_a_run_is_refused(tmp_path):
    (tmp_path / "other.iso").write_bytes(bytes(100_000))
    with pytest.raises(RepaveError):
        BootMedia(tmp_path / "other.iso")


def test_the_slot_unpacks_to_a_private_file_the_agent_reads(tmp_path):
    slot = SLOT._replace(network=NETWORK)
    unpack(render_slot(slot), tmp_path / "root")
    file = tmp_path / "root" / SLOT_FILE
    assert Slot(**json.loads(file.read_text())) == slot
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert (tmp_path / "root" / NETWORK_FILE).read_text() == "52:54:00:aa:bb:cc 192.0.2.10 24 192.0.2.1 - 192.0.2.53\n"
    unpack(render_slot(slot._replace(network=NETWORK | {"vlan": 42})), tmp_path / "tagged")
    assert (tmp_path / "tagged" / NETWORK_FILE).read_text() == "52:54:00:aa:bb:cc 192.0.2.10 24 192.0.2.1 42 192.0.2.53\n"


def test_a_slot_that_does_not_fit_is_refused_and_keeps_its_secret():
    with pytest.raises(RepaveError) as caught:
        render_slot(SLOT._replace(ca_pem="x" * SLOT_BYTES))
    assert SLOT.token not in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"mac": "eth0; reboot"}, {"address": "192.0.2.10 $(reboot)"}, {"prefix": 99}, {"gateway": "here"}, {"dns": ["a b"]}, {"vlan": "1; reboot"}]
)
def test_network_settings_that_are_none_never_reach_the_shell(wrong):
    with pytest.raises(RepaveError):
        render_slot(SLOT._replace(network=NETWORK | wrong))


def test_the_agent_starts_from_its_archive_alone(tmp_path):
    unpack(render_agent_archive(), tmp_path / "root")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'root/usr/lib/repave')!r}); import repave.agent.main, repave;"
        "print(repave.__file__); print(*sorted(m for m in sys.modules if m.startswith('repave.')));"
        "print(*{'argparse', 'asyncio', 'email', 'http.client', 'inspect', 'logging', 'urllib.request'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
    assert shown[0].startswith(str(tmp_path))
    assert not [name for name in shown[1].split() if not name.startswith(("repave.agent", "repave.images", "repave.errors"))]
    assert shown[2] == "", "each of these costs the agent's start, which every server waits for"
    assert (tmp_path / "root/init").stat().st_mode & 0o111


def test_the_agents_archive_has_the_same_bytes_whatever_else_its_builder_has_loaded():
    """A service that starts again, a test and `python -m repave.ramdisk build` make one ramdisk, not three."""
    code = "import hashlib; from repave.ramdisk.build import render_agent_archive; print(hashlib.sha256(render_agent_archive()).hexdigest())"
    digests = {hashlib.sha256(render_agent_archive()).hexdigest()}
    for loaded in ("sys", "repave.app, sqlalchemy, xml.dom.minidom"):
        digests.add(subprocess.run([sys.executable, "-c", f"import {loaded}; {code}"], check=True, capture_output=True, text=True).stdout.strip())
    assert len(digests) == 1


def test_an_archive_holds_files_links_and_their_folders(tmp_path):
    archive = cpio.render_archive({"a/b/file": cpio.file(b"12345", mode=0o640), "a/link": cpio.symlink("b/file"), "empty": cpio.directory(0o700)})
    unpack(archive, tmp_path / "root")
    assert (tmp_path / "root/a/link").read_bytes() == b"12345"
    assert stat.S_IMODE((tmp_path / "root/a/b/file").stat().st_mode) == 0o640
    assert (tmp_path / "root/empty").is_dir()


def test_without_the_packages_of_nic_firmware_it_is_said_what_apt_needs(tmp_path, monkeypatch):
    (tmp_path / "apt.conf").write_text(f'Dir::State "{tmp_path}"; Dir::Cache "{tmp_path}"; Dir::Etc "{tmp_path}";')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    with pytest.raises(RepaveError, match=r"firmware-bnx2x.*: add Debian's non-free-firmware to its sources"):
        build_ramdisk(tmp_path, progress=print, nic_firmware=True)


def test_of_firmware_only_what_the_nic_drivers_ask_for_and_the_packages_have_is_taken(tmp_path):
    """modinfo names all that a driver ever asked for. A link is its file here: what it leads to may not be taken."""
    for name in ("small/lib/modules/6/kernel/drivers/net/ethernet/ice.ko", "small/lib/modules/6/kernel/drivers/gpu/big.ko"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    folder = tmp_path / "lib/firmware/intel/ice"
    folder.mkdir(parents=True)
    (folder / "ice-1.3.pkg").write_bytes(b"the firmware")
    (folder / "ice.pkg").symlink_to("ice-1.3.pkg")

    def modinfo(arguments):
        assert [Path(name).name for name in arguments if name.endswith(".ko")] == ["ice.ko"]
        return "intel/ice/ice.pkg\nintel/ice/older.pkg\n"

    assert base.find_firmware(tmp_path, modinfo) == {"lib/firmware/intel/ice/ice.pkg": cpio.file(b"the firmware")}
