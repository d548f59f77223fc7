"""What a run does to the world: BMC, images, store. One method a step; each asks for a state, records it, and may be repeated."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from repave.agent import protocol
from repave.agent.gpt import DiskTooSmall, Partition, check_room, minimum_disk_bytes
from repave.bmc import Bmc, Power
from repave.domain.kept_partitions import choose_kept
from repave.domain.model import Image, InstanceState, RunRow, Server, Step
from repave.domain.own_host import are_of_two, find_own_host, says_something
from repave.domain.password import user_for
from repave.domain.root_disk import choose_root_disk, find_known_misfit, find_misfit
from repave.domain.states import Ending
from repave.domain.timing import learn_wait, way_back_at
from repave.domain.urls import find_unreachable_place
from repave.errors import RunFailed
from repave.firstboot import FirstBoot, render_config_drive
from repave.images.store import ImageStore
from repave.store import Store
from repave.workflow.console_files import begin_console
from repave.workflow.run import Json


class OpenBmc(Protocol):
    """The server's BMC, for one errand. `before_write` is asked right before anything is sent that changes the server; what it raises stops it.

    With a `run_id`, what is said is kept with that run (bmc_talk.py).

    Addresses change hands: each call looks who answers before it changes anything, and raises what `verify_system` raises.
    """

    def __call__(self, server: Server, before_write: Callable[[], None] = ..., run_id: str = ...) -> AbstractContextManager[Bmc]: ...


@dataclass(frozen=True)
class Places:
    """What of the site's settings goes into media and plans: mostly addresses."""

    media_urls: tuple[str, ...]  # as BMCs see us, the first preferred
    agent_url: str  # as machines see us
    chunks_url: str  # where machines fetch chunks, after any caches
    ca_pem: str
    graceful_s: float = 60.0
    read_back: str = "sample"
    console_files: str = ""


class ServerEffects:
    """The effects of real runs."""

    def __init__(self, store: Store, images: ImageStore, open_bmc: OpenBmc, places: Places) -> None:
        self.store, self.images, self.open_bmc, self.places = store, images, open_bmc, places
        self._verify_lock = threading.Lock()
        self._verified: tuple[str, str, datetime | None] = ("", "", None)

    # ---- before the line ----

    def preflight(self, run_id: str) -> Json:
        """Image present and intact, arch and firmware match, it fits on the disk as far as that is known, the BMC answers and is the machine we know.

        Touches nothing.
        """
        run, server, image = self._about(run_id)
        self._refuse_over(run)
        self.store.runs.record_step(run_id, Step.PREFLIGHT)
        self.store.runs.get_run_secret(run_id)
        begin_console(self.store, self.places.console_files, run_id, server)
        if own := find_own_host(server, self.store.servers.list_hosts()):
            raise RunFailed("own-host", f"It has {own}.")
        if place := find_unreachable_place(server.bmc_url, self.places.media_urls, self.places.agent_url, self.places.chunks_url):
            raise RunFailed("loopback-address", f"{place} is a loopback address; the server is elsewhere.")
        if (image.arch, image.boot) != (server.arch, server.boot):
            raise RunFailed("arch-mismatch", f"The image is {image.arch}/{image.boot}, the server {server.arch}/{server.boot}.")
        seen = (self.store.runs.find_inventory(server.id) or {}).get("disks", ())
        misfit = find_known_misfit(seen, server.root_disk, sector_bytes=image.sector_bytes, needed_bytes=image.size_bytes)
        if misfit is not None:
            raise misfit
        self._verify_image(run.batch_id, image)
        with self.open_bmc(server, run_id=run_id) as bmc:
            power = bmc.probe().power
            bmc.check_media(media_urls(self.places, self.store, run_id))
        self.store.servers.record_power(server.id, power.value)
        return {"power": power.value}

    def power_off(self, run_id: str) -> Json:
        """Off, read back: asked for 60 s, then forced; the event says which."""
        run, server, _ = self._about(run_id)
        self._refuse_over(run)
        self.store.runs.record_step(run_id, Step.POWER_OFF)
        with self._open_forward(server, run_id) as bmc:
            forced = bmc.power_off(graceful_s=self.places.graceful_s if run.found_state is InstanceState.RUNNING else 0)
        self.store.servers.record_power(server.id, Power.OFF.value)
        self.store.runs.record_note(run_id, "run.power-off", forced=forced)
        return {"forced": forced}

    def insert_media(self, run_id: str) -> Json:
        """This run's media are in the drive and the next boot is theirs, both read back."""
        run, server, _ = self._about(run_id)
        self._refuse_over(run)
        self.store.runs.record_step(run_id, Step.INSERT_MEDIA)
        self.store.servers.record_media(server.id, run_id)
        with self._open_forward(server, run_id) as bmc:
            bmc.insert_media(media_urls(self.places, self.store, run_id))
            bmc.boot_from_media_once()
        return None

    def boot_ramdisk(self, run_id: str) -> Json:
        """Power is on; from here the agent speaks. Returns what is known of how long to wait for it (`choose_wait`)."""
        run, server, _ = self._about(run_id)
        self._refuse_over(run)
        self.store.runs.record_step(run_id, Step.BOOT_RAMDISK)
        with self._open_forward(server, run_id) as bmc:
            bmc.power_on()
        self.store.servers.record_power(server.id, Power.ON.value)
        return self._know_wait(server, Step.BOOT_RAMDISK, until=way_back_at(run))

    def plan(self, run_id: str) -> Json:
        """One disk is chosen by the pure rule and named in the plan; the config drive is rendered and sealed."""
        run, server, image = self._about(run_id)
        if run.plan is not None:
            return None
        found = run.inventory or {}
        verify_identity(server, found)
        if found.get("arch") != image.arch or found.get("firmware") != image.boot:
            raise RunFailed("arch-mismatch", f"The ramdisk sees {found.get('arch')}/{found.get('firmware')}, the image is {image.arch}/{image.boot}.")
        disk = choose_root_disk(found["disks"], server.root_disk)
        if image.doubted_at is not None:  # another run of this batch was the first to meet a damaged chunk
            self._verify_image(run.batch_id, image)
        self._refuse_over(run)
        drive = self._render_drive(run, server, image)
        misfit = find_misfit(disk, sector_bytes=image.sector_bytes, needed_bytes=minimum_disk_bytes(image.size_bytes, len(drive)))
        if misfit is not None:
            raise misfit
        keep = choose_kept(disk, server.keep_partitions, unfinished=self.store.runs.find_unfinished_write(server.id))
        try:
            partitions = [Partition.from_json(dict(p)) for p in keep]
            check_room(image.size_bytes, len(drive), disk_bytes=disk["size_bytes"], sector_bytes=image.sector_bytes, keep=partitions)
        except DiskTooSmall as small:
            raise RunFailed("kept-partition", f"{small}.") from None
        self.store.sealer.keep_for_run(run_id, "config-drive", drive)
        plan = protocol.Plan(
            plan_id=f"p-{run.id[-12:]}-{run.epoch}",
            disk_path=disk["path"],
            disk_serial=disk["serial"],
            disk_wwn=disk["wwn"],
            disk_size_bytes=disk["size_bytes"],
            manifest_sha256=image.manifest_sha256,
            config_drive_sha256=hashlib.sha256(drive).hexdigest(),
            config_drive_bytes=len(drive),
            rehearse=run.rehearse,
            read_back=self.places.read_back,
            keep=tuple(dict(p) for p in keep),
        )
        self.store.runs.record_plan(run_id, protocol.render_plan(plan))
        return None

    def close_before_line(self, run_id: str) -> bool:
        """Nobody crosses any more. False where the line was crossed first."""
        return self.store.runs.close_before_line(run_id)

    def return_what_was_found(self, run_id: str) -> Json:
        """Media out, override off, and power as it was found: the old OS boots, or where there was none the server is off.

        An OS that may still run is never cut: before boot-ramdisk nothing of ours has powered the server on, later it is asked first. One that was
        asked by a process that died meanwhile is let shut down, or it would do so after it was powered on.
        """
        run, server, _ = self._about(run_id)
        with self._open_live(server, run_id) as bmc:
            if run.step is Step.BOOT_RAMDISK or run.found_state is not InstanceState.RUNNING:
                bmc.power_off(graceful_s=self.places.graceful_s)
            elif run.step is Step.POWER_OFF:
                bmc.wait_for_off(self.places.graceful_s)
            self._take_media_out(bmc, server, run_id)
            if run.found_state is InstanceState.RUNNING:
                bmc.power_on()
        power = Power.ON if run.found_state is InstanceState.RUNNING else Power.OFF
        self.store.servers.record_power(server.id, power.value)
        self.store.runs.record_note(run_id, "run.returned", power=power.value)
        return None

    # ---- after the line ----

    def power_off_and_eject(self, run_id: str) -> Json:
        """Off, no media: a half-written disk stays where it is, and no other disk boots in its place."""
        _, server, _ = self._about(run_id)
        with self._open_live(server, run_id) as bmc:
            bmc.power_off()
            self._take_media_out(bmc, server, run_id)
        self.store.servers.record_power(server.id, Power.OFF.value)
        return None

    def boot_new_os(self, run_id: str) -> Json:
        """Media out, override off, power cycled; the new OS comes up. A repeated step leaves a started OS alone.

        Returns what is known of how long to wait for its proof (`choose_wait`).
        """
        run, server, _ = self._about(run_id)
        if run.proof is not None:
            return None
        with self._open_live(server, run_id) as bmc:
            if run.step is not Step.FIRST_BOOT:
                self.store.runs.record_step(run_id, Step.BOOT_NEW_OS)
                bmc.power_off()
                self._take_media_out(bmc, server, run_id)
                # Recorded before power is on: killed after it, we must not cut short a first boot that has erased its config drive.
                self.store.runs.record_step(run_id, Step.FIRST_BOOT)
            bmc.power_on()
        self.store.servers.record_power(server.id, Power.ON.value)
        return self._know_wait(server, Step.FIRST_BOOT, until=run.deadline_at, image_id=run.image_id)

    def verify_proof(self, run_id: str) -> Json:
        """The proof names the disk of the plan and another boot than the ramdisk's."""
        run, _, _ = self._about(run_id)
        self.store.runs.record_step(run_id, Step.PROOF)
        verify_proof(run)
        return None

    def end(self, run_id: str, ending: Ending, error: dict[str, Json] | None) -> Json:
        """The first ending stands; the run's keys are destroyed. A proof that came while it was written down still counts."""
        self.store.runs.record_ending(run_id, ending, error)
        record_late_proof(self.store, run_id)
        self.store.sealer.destroy_run(run_id)
        return None

    def _open_forward(self, server: Server, run_id: str) -> AbstractContextManager[Bmc]:
        """The BMC on the way to the line. Each write asks anew whether the run may still go on: a call waits for its BMC for a minute and more."""

        def require() -> None:
            self._refuse_over(self._get_live(run_id))

        return self.open_bmc(server, require, run_id)

    def _open_live(self, server: Server, run_id: str) -> AbstractContextManager[Bmc]:
        """The BMC for as long as the run has not ended."""

        def require() -> None:
            self._get_live(run_id)

        return self.open_bmc(server, require, run_id)

    def _take_media_out(self, bmc: Bmc, server: Server, run_id: str) -> None:
        """The override first: where only that could be done, the media that are still in say whose it was (media_sweep.py)."""
        bmc.boot_from_disk()
        bmc.eject_media()
        self.store.servers.record_media_out(server.id, run_id)

    def _verify_image(self, batch_id: str, image: Image) -> None:
        """Every chunk has its digest: read once a batch, not once a run; and again when a run has said that it is damaged."""
        this = (batch_id, image.manifest_sha256, image.doubted_at)
        with self._verify_lock:
            if self._verified != this:
                self.images.verify(self.images.read_manifest(image.manifest_sha256), deep=True)
                self._verified = this
        if image.doubted_at is not None:
            self.store.images.record_whole(image)

    def _know_wait(self, server: Server, step: Step, *, until: datetime, image_id: str | None = None) -> dict[str, Json]:
        left_s = max(0.0, (until - self.store.now()).total_seconds())
        return {"left_s": left_s} | learn_wait(self.store.runs.list_seconds_alike(server, step, image_id=image_id))

    def _refuse_over(self, run: RunRow) -> None:
        """No forward motion once the run was told to stop, or too late to turn back in time: one that slept in a stopped service powers nothing off."""
        if run.cancel is not None:
            raise RunFailed(run.cancel["class"], run.cancel["cause"])
        if self.store.now() > way_back_at(run):
            raise RunFailed("deadline", "The run's deadline was too near for this step and the way back.")

    def _get_live(self, run_id: str) -> RunRow:
        run = self.store.runs.get_run(run_id)
        if run.ended_at is not None:  # by the reaper: the server may be another run's now
            raise RunFailed("stale-run")
        return run

    def _about(self, run_id: str) -> tuple[RunRow, Server, Image]:
        run = self._get_live(run_id)
        server = self.store.servers.get_server(run.server_id)
        image = self.store.images.find_image(run.project_id, run.image_id)
        if image is None:
            raise RunFailed("image-missing")
        return run, server, image

    def _render_drive(self, run: RunRow, server: Server, image: Image) -> bytes:
        instance = self.store.servers.find_instance(run.project_id, run.instance_id)
        assert instance is not None
        secret = self.store.runs.get_run_secret(run.id)
        return render_config_drive(
            FirstBoot(
                hostname=run.hostname or instance.name,
                instance_id=run.id,  # a new id a run: cloud-init must see another instance than the old OS's
                os_type=image.os_type,
                user=user_for(image.os_type),
                **{"password" if image.os_type == "Windows" else "password_hash": secret["password"]},
                ssh_keys=run.ssh_keys,
                user_data=secret["user_data"],
                network=server.network,
                home_url=f"{self.places.agent_url}/home/v1/{run.id}",
                nonce=self.store.sealer.derive_for_run(run.id, "nonce"),
                ca_pem=self.places.ca_pem,
            )
        )


def media_urls(places: Places, store: Store, run_id: str) -> tuple[str, ...]:
    """This run's media by each protocol; the path can not be guessed, and holds no `?` or `=` (Supermicro refuses them)."""
    path = f"{media_folder(run_id)}{store.sealer.derive_for_run(run_id, 'media')}/boot.iso"
    return tuple(url.rstrip("/") + path for url in places.media_urls)


def media_folder(run_id: str) -> str:
    """What the URLs of this run's media have in them and no others, also when its keys are gone or `media_url` is another."""
    return f"/media/{run_id}/"


def verify_system(server: Server, serial: str, uuid: str) -> None:
    """The system that a BMC shows is the recorded server's: serial and UUID, as far as both say something. Raises wrong-server.

    Some BMCs show placeholders while the host is off: those tell nobody apart.
    """
    for name, known, seen in (("serial", server.serial, serial), ("UUID", server.uuid, uuid)):
        if are_of_two(known, seen):
            raise RunFailed("wrong-server", f"The BMC shows another {name} than the one recorded.")


def verify_identity(server: Server, inventory: dict[str, Any]) -> None:
    """The machine that speaks is the one recorded: serial, UUID, and one MAC where any is recorded. Raises wrong-server."""
    for name in ("serial", "uuid"):
        known, seen = getattr(server, name), str(inventory.get(name, ""))
        if says_something(known) and known.lower() != seen.lower():
            raise RunFailed("wrong-server", f"The ramdisk sees another {name} than the one recorded.")
    known_macs = {m.lower() for m in server.macs}
    if known_macs and not known_macs & {m.lower() for m in inventory.get("macs", ())}:
        raise RunFailed("wrong-server", "None of the recorded MAC addresses is in this machine.")


def verify_proof(run: RunRow) -> None:
    """Raises wrong-disk-booted, or no-proof where the new OS says its password can not be used."""
    proof, plan = run.proof or {}, run.plan or {}
    if proof.get("root_disk_serial") not in (plan.get("disk_serial"), plan.get("disk_wwn")) or not proof.get("root_disk_serial"):
        raise RunFailed("wrong-disk-booted", f"Planned {plan.get('disk_serial')}, booted {proof.get('root_disk_serial') or 'unknown'}.")
    if run.inventory and proof.get("boot_id") == run.inventory.get("boot_id"):
        raise RunFailed("no-proof", "The proof came from the ramdisk's own boot.")
    if proof.get("password_usable") is False:
        raise RunFailed("no-proof", "The new OS runs, but the password was not set.")


def record_late_proof(store: Store, run_id: str) -> None:
    """A run that ended `unproved` and has a valid proof now becomes `running`, unless a new run began. Repeatable."""
    run = store.runs.get_run(run_id)
    if run.outcome != Ending.UNPROVED.value or run.proof is None or not store.runs.is_latest_run(run):
        return
    try:
        verify_proof(run)
    except RunFailed:
        return
    store.runs.record_ending(run_id, Ending.LATE_PROOF, None)
