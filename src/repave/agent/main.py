"""The agent: one loop, from hello to report, on the server that is reinstalled. It asks; it never listens.

    hello -> plan -> verify the disk -> protect the others -> cross ════ manifest and all checks were before ════ write -> report -> off

An agent that was killed is started again by the ramdisk, in the same boot: its token is still good there, and past the line it keeps what the
first one wrote, as far as its digests say so.
How it ends: after the line, always powered off. Before the line nothing was written, so whatever happens the server gets back what it
had: a report, and the order that answers it; where nobody answers or the run is over, the local disk is booted.
What it prints goes to the serial console, and from the answered hello on to the service too (log.py): one line a step, seconds since start, no secrets.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repave.agent import protocol
from repave.agent.chunks import ChunkSource
from repave.agent.client import TRIES, Client
from repave.agent.gpt import Partition, minimum_disk_bytes, rebuild
from repave.agent.http_client import BACKOFF_S, Refused, Unreachable
from repave.agent.lease import Lease, boot_clock
from repave.agent.log import Console, LogSender
from repave.agent.machine import Machine, OpenDisk, RealMachine, is_ramdisk
from repave.agent.protocol import Disk, Inventory, Plan, Progress, Report, Slot
from repave.agent.writer import WriteResult, decode, read_first_mib, write_image
from repave.errors import RepaveError, RunFailed
from repave.images.manifest import Manifest, parse_manifest

MANIFEST_CAP_BYTES = 256 * 1024 * 1024  # about 200 bytes a window: an image of some TiB
REHEARSED_CHUNKS = 8  # 32 MiB of disk at most: enough to know the link, small against the image
PLAN_FIRST_PAUSE_S = 0.1
NOT_HERE = "this is not Repave's ramdisk. The agent runs on a server that is being reinstalled; here nothing was touched."


class LocalBoot(Exception):
    """Nothing was written and nobody needs us: give the server back what it had."""


def run_in_ramdisk() -> None:
    """What the ramdisk's /init calls, and never returns from."""
    if not is_ramdisk():
        sys.exit(NOT_HERE)
    sys.exit(run_agent(Path("/") / protocol.SLOT_FILE, RealMachine()))


def run_agent(slot_path: Path, machine: Machine) -> int:
    """Afterwards the server is on its way off, or back to its local disk. Returns the exit code: 0 = the image was written and reported."""
    console, wrote = Console(), slot_path.with_name(f"{slot_path.name}.wrote")
    try:
        slot = Slot(**json.loads(slot_path.read_text()))
        console.hide(slot.token)
        return Agent(slot, machine, console, wrote).run()
    except LocalBoot as reason:
        console.say(f"booting the local disk: {reason}")
    except Exception as error:
        console.say(f"an error: {type(error).__name__}: {error}")
    if wrote.exists():  # an earlier agent of this boot
        machine.power_off()
    else:
        machine.boot_local_disk()
    return 1


class Agent:
    """One boot of one run. `wrote`: a file that is there from the moment something may have been written; it lives as long as the boot."""

    def __init__(self, slot: Slot, machine: Machine, console: Console, wrote: Path) -> None:
        self._slot = slot
        self._machine = machine
        self._console = console
        self._client = Client(slot.agent_url, ca_pem=slot.ca_pem, token=slot.token)
        self._log = LogSender(self._client, console)
        self._epoch = 0
        self._wrote = wrote
        self._proved: dict[str, bytes] = {}  # the chunk that was fetched before the line
        self._writing = wrote.exists()

    def run(self) -> int:
        plan = None
        try:
            inventory, poll_s = self._say_hello()
            plan = self._wait_for_plan(poll_s)
            self._console.hide(plan.chunk_token)
            chunks = ChunkSource(plan.chunk_urls, token=plan.chunk_token, ca_pem=self._slot.ca_pem)
            disk = find_planned_disk(self._machine.read_inventory(), plan)
            self._console.say(f"plan: {disk.path}, serial {disk.serial or disk.wwn}, {disk.size_bytes} bytes")
            with self._machine.open_disk(disk) as opened:
                manifest = self._fetch_manifest(plan, disk, inventory)
                for note in self._machine.protect_others(disk):
                    self._console.say(note)
                if not self._writing:
                    self._prove_chunks(manifest, chunks)
                if plan.keep and not self._writing:
                    self._prove_tables(plan, disk, manifest, chunks)
                if plan.rehearse:
                    return self._end(Report(self._epoch, False, disk.serial, rehearsal=self._measure(manifest, chunks)))
                lease = self._cross(plan)
                result = self._write(plan, disk, opened, manifest, chunks, lease)
            return self._end(Report(
                self._epoch, True, disk.serial, result.bytes_written, result.bytes_fetched, result.bytes_zeroed, result.stages_s,
                zeroed_by=result.zeroed_by, bytes_kept=result.bytes_kept, bytes_read_back=result.bytes_read_back,
            ))  # fmt: skip
        except (LocalBoot, Refused, Unreachable) as reason:
            if not self._writing:
                raise LocalBoot(str(reason)) from None
            return self._end_failed(plan, RunFailed("agent-failed", self._console.clean(str(reason))))
        except RepaveError as error:
            return self._end_failed(plan, error)
        except Exception as error:
            return self._end_failed(plan, RunFailed("agent-failed", self._console.clean(f"{type(error).__name__}: {error}")[:500]))
        finally:
            self._log.finish()

    def _say_hello(self) -> tuple[Inventory, float]:
        inventory = self._machine.read_inventory()
        disks = ", ".join(f"{d.path} {d.serial or d.wwn or 'without serial'}" for d in inventory.disks)
        self._console.say(f"hello: serial {inventory.serial or 'none'}, {inventory.firmware}, {inventory.arch}, disks: {disks or 'none'}")
        answer = self._client.insist("POST", "/agent/v1/hello", protocol.render(inventory), while_true=self._patience()).json()
        self._console.hide(answer["session"])
        self._client.token = answer["session"]
        self._log.start()
        self._console.say("hello was answered")
        return inventory, float(answer.get("poll_s", 1))

    def _wait_for_plan(self, poll_s: float) -> Plan:
        """The plan is made within half a second of the hello as a rule, so the first pauses are short."""
        pause_s = min(PLAN_FIRST_PAUSE_S, poll_s)
        while True:
            answer = self._client.insist("GET", "/agent/v1/plan", while_true=self._patience())
            if answer.status == 200:
                return Plan(**answer.json())
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, poll_s)

    def _fetch_manifest(self, plan: Plan, disk: Disk, inventory: Inventory) -> Manifest:
        """Before the line, with everything that can be found out from it: a run that must fail fails with the disk untouched."""
        path = "/agent/v1/manifest"
        try:
            data = self._client.get_bytes(path, sha256=plan.manifest_sha256, cap_bytes=MANIFEST_CAP_BYTES, while_true=self._patience())
            manifest = parse_manifest(data, sha256=plan.manifest_sha256)
        except ValueError as error:
            raise RunFailed("image-damaged", f"{error}.") from None
        if manifest.sector_bytes != disk.sector_bytes:
            raise RunFailed("sector-size", f"The image has sectors of {manifest.sector_bytes} bytes, the disk of {disk.sector_bytes}.")
        if disk.size_bytes < minimum_disk_bytes(manifest.size_bytes, plan.config_drive_bytes):
            raise RunFailed("disk-too-small", f"The image has {manifest.size_bytes} bytes, the disk {disk.size_bytes}.")
        if (manifest.arch, manifest.boot) != (inventory.arch, inventory.firmware):
            seen = f"The image is for {manifest.arch} and {manifest.boot}, the server has {inventory.arch} and {inventory.firmware}."
            raise RunFailed("arch-mismatch", seen)
        self._console.say(f"manifest: {len(manifest.chunks)} chunks, {manifest.data_bytes} bytes to write")
        for p in map(Partition.from_json, plan.keep):  # whoever has to repair the table by hand finds it in the console
            self._console.say(f"keeps partition {p.number} {p.name}: sectors {p.first_lba} to {p.last_lba}, type {p.type_guid}, GUID {p.guid}")
        return manifest

    def _prove_chunks(self, manifest: Manifest, chunks: ChunkSource) -> None:
        """Before the line: the first chunk that will be written is here. An origin that can not be reached then costs nothing but the run."""
        first = next((c for c in manifest.chunks if c.extents), None)
        for _ in range(TRIES if first else 0):
            assert first is not None
            try:
                data = chunks.prove(first.sha256, while_true=self._patience())
            except (Refused, Unreachable, ValueError) as reason:
                raise RunFailed("chunks-unreachable", self._console.clean(f"{reason}.")) from None
            if hashlib.sha256(data).hexdigest() == first.sha256:
                self._proved = {first.sha256: data}
                return
        if first:
            raise RunFailed("image-damaged", f"The first chunk came {TRIES} times with another digest than its manifest names.")

    def _prove_tables(self, plan: Plan, disk: Disk, manifest: Manifest, chunks: ChunkSource) -> None:
        """Before the line: what is to be kept goes with the image's own partitions."""

        def read_window(index: int, view: memoryview) -> None:
            decode(manifest, index, self._fetch_verified(chunks, manifest.chunks[index].sha256), view)

        first = read_first_mib(manifest, read_window)
        keep = [Partition.from_json(p) for p in plan.keep]
        try:
            rebuild(first, sector_bytes=disk.sector_bytes, disk_bytes=disk.size_bytes, config_bytes=plan.config_drive_bytes, config_guid=bytes(16), keep=keep)
        except ValueError as error:
            raise RunFailed("kept-partition", f"{error}.") from None

    def _fetch_verified(self, chunks: ChunkSource, sha256: str) -> memoryview:
        for _ in range(TRIES):
            body = chunks.fetch(sha256, while_true=self._patience())
            if hashlib.sha256(body).hexdigest() == sha256:
                return body
        raise RunFailed("image-damaged", f"The chunk {sha256[:12]} came {TRIES} times with another digest than its name.")

    def _measure(self, manifest: Manifest, chunks: ChunkSource) -> dict[str, Any]:
        """What a rehearsal learns: how much there is to fetch, and how fast its first chunks come. They are verified and thrown away."""
        stored = {chunk.sha256: chunk.compressed_bytes for chunk in manifest.chunks if chunk.extents}
        started, fetched = time.monotonic(), 0
        for sha256 in list(stored)[:REHEARSED_CHUNKS]:
            fetched += len(self._fetch_verified(chunks, sha256))
        took = time.monotonic() - started
        self._console.say(f"rehearsal: nothing is written; {fetched} bytes fetched in {took:.1f} s")
        return {
            "data_bytes": manifest.data_bytes, "stored_bytes": sum(stored.values()), "chunks": len(stored), "fetched_bytes": fetched,
            "fetch_s": round(took, 3), "expected_fetch_s": round(took * sum(stored.values()) / fetched, 1) if fetched else 0.0,
        }  # fmt: skip

    def _cross(self, plan: Plan) -> Lease:
        """Asks until there is an answer: the server may have counted us as crossed already, and only its 200 lets us write."""
        body = {"plan_id": plan.plan_id, "serial": plan.disk_serial, "wwn": plan.disk_wwn}
        may_ask, tries = self._patience(), 0
        while True:
            asked_at = boot_clock()
            try:
                answer = self._client.call("POST", "/agent/v1/cross", body).json()
                break
            except Unreachable as error:
                if not may_ask():
                    raise LocalBoot(f"the answer to cross never came: {error}") from None
                time.sleep(BACKOFF_S[min(tries, len(BACKOFF_S) - 1)])
                tries += 1
        self._epoch = int(answer["epoch"])
        lease = Lease(asked_at, float(answer["lease_s"]))
        self._console.say(f"{'past the line still' if self._writing else 'crossed the line'}, epoch {self._epoch}")
        return lease

    def _write(self, plan: Plan, disk: Disk, opened: OpenDisk, manifest: Manifest, chunks: ChunkSource, lease: Lease) -> WriteResult:
        drive_path = "/agent/v1/config-drive"
        with _Reporter(self._client, self._epoch, lease, chunks, self._console) as reporter:
            try:
                config_drive = self._client.get_bytes(drive_path, sha256=plan.config_drive_sha256, cap_bytes=plan.config_drive_bytes, while_true=lease.is_valid)
            except ValueError as error:
                raise RunFailed("agent-failed", f"{error}.") from None
            again, self._writing = self._writing, True
            self._wrote.touch()
            return write_image(
                opened.path,
                manifest,
                fetch=lambda sha256: self._fetch_chunk(chunks, sha256, lease),
                ask_ahead=chunks.ask_ahead,
                config_drive=config_drive,
                sector_bytes=disk.sector_bytes,
                disk_bytes=disk.size_bytes,
                keep_writing=lease.is_valid,
                progress=reporter.note,
                partition_guid=uuid.uuid4().bytes_le,
                boot_entry=lambda partitions: self._set_boot_entry(plan.boot_label, partitions),
                verify_identity=opened.verify,
                resume=again,
                read_back_all=plan.read_back == "all",
                keep=[Partition.from_json(p) for p in plan.keep],
            )

    def _fetch_chunk(self, chunks: ChunkSource, sha256: str, lease: Lease) -> memoryview:
        if (proved := self._proved.pop(sha256, None)) is not None:
            return memoryview(proved)
        try:
            return chunks.fetch(sha256, while_true=lease.is_valid)
        except Refused as refused:
            if refused.status == 404:
                raise RunFailed("image-damaged", f"The chunk {sha256[:12]} is missing.") from None
            lease.end()
            raise RunFailed("stale-run", f"{refused}.") from None

    def _set_boot_entry(self, label: str, partitions: tuple[Partition, ...]) -> None:
        """A note where the firmware refuses, not a failure: the removable path (EFI/BOOT) boots as well."""
        try:
            self._console.say(f"boot entry: {self._machine.set_boot_entry(label, partitions)}")
        except Exception as error:
            self._console.say(f"boot entry: none, {type(error).__name__}: {error}")

    def _end_failed(self, plan: Plan | None, error: RepaveError) -> int:
        self._console.say(f"failed: {error.slug}: {error}")
        serial = plan.disk_serial if plan else ""
        self._end(Report(self._epoch, False, serial, error=error.as_json()))
        return 1

    def _end(self, report: Report) -> int:
        """Reports, and does what the answer says. Without an answer: off where something was written, else the local disk."""
        then = "power-off" if self._writing else "boot-local"
        try:
            answer = self._client.insist("POST", "/agent/v1/report", protocol.render(report), while_true=self._patience()).json()
            then = str(answer.get("then", then))
            self._console.say(f"reported; then {then}")
        except (Refused, Unreachable) as reason:
            self._console.say(f"the report was not taken: {reason}; then {then}")
        self._log.finish()
        if then == "boot-local" and not self._writing:
            self._machine.boot_local_disk()
        else:
            self._machine.power_off()
        return 0

    def _patience(self) -> Callable[[], bool]:
        """True until nobody has answered for `give_up_s` from now."""
        until = boot_clock() + self._slot.give_up_s
        return lambda: boot_clock() < until


class _Reporter:
    """A thread that posts the newest progress and so renews the lease, and the chunks' token with it; 410 or 401 ends the lease at once."""

    def __init__(self, client: Client, epoch: int, lease: Lease, chunks: ChunkSource, console: Console) -> None:
        self._client, self._epoch, self._lease, self._chunks, self._console = client, epoch, lease, chunks, console
        self._newest: tuple[str, int, int] = ("clear", 0, 0)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="progress", daemon=True)

    def note(self, stage: str, bytes_done: int, bytes_total: int) -> None:
        """The writer's `progress`."""
        if stage != self._newest[0] or not self._newest[2]:
            self._console.say(f"stage {stage}")
        self._newest = (stage, bytes_done, bytes_total)

    def __enter__(self) -> _Reporter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._done.wait(self._lease.renew_s):
            asked_at = boot_clock()
            body: dict[str, Any] = protocol.render(Progress(self._epoch, *self._newest))
            try:
                answer = self._client.call("POST", "/agent/v1/progress", body).json()
                self._lease.extend(asked_at, float(answer["lease_s"]))
                self._chunks.token = str(answer["chunk_token"])
            except Refused as refused:
                self._console.say(f"the lease ended: {refused}")
                self._lease.end()
                return
            except Exception as error:  # a thread that dies would only look like a silent server
                self._console.say(f"no answer to progress: {type(error).__name__}: {error}")


def find_planned_disk(inventory: Inventory, plan: Plan) -> Disk:
    """The one disk that has the plan's serial, WWN and size, wherever it is named now. Raises RunFailed disk-changed."""
    if not (plan.disk_serial or plan.disk_wwn):
        raise RunFailed("disk-changed", "The plan names no disk.")
    found = [d for d in inventory.disks if (d.serial, d.wwn, d.size_bytes) == (plan.disk_serial, plan.disk_wwn, plan.disk_size_bytes)]
    if len(found) != 1:
        raise RunFailed("disk-changed", f"{len(found)} disks have the serial, WWN and size in the plan.")
    disk = found[0]
    if disk.removable or disk.virtual or disk.read_only:
        raise RunFailed("disk-changed", f"{disk.path} is removable, virtual or read-only.")
    return disk
