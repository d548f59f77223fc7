"""The messages between the agent on a server and Repave: shapes, paths, limits. Stdlib only; both sides import it.

The shapes are NamedTuples: dataclasses import `inspect`, and with it took a quarter of the agent's start (measured).

All requests go to the provisioning listener over TLS verified with our CA alone. The agent asks, it never listens:

    POST /agent/v1/hello         media token   Inventory -> {"session": TOKEN, "poll_s": 1}; the media token is dead for any other boot
    GET  /agent/v1/plan          session       200 Plan | 204 not yet | 410 the run is over
    POST /agent/v1/cross         session       {"plan_id", "serial", "wwn"} -> {"epoch": 1, "lease_s": 60} | 409 not the plan's | 410. A lost answer: crossed
    GET  /agent/v1/manifest      session       the image's manifest, bytes whose SHA-256 the plan names
    GET  /agent/v1/config-drive  session       the config drive's image, bytes whose SHA-256 the plan names; only after the line
    POST /agent/v1/progress      session       Progress -> {"lease_s": 60, "chunk_token": TOKEN} | 410: stop writing at once
    POST /agent/v1/report        session       Report -> {"then": "power-off"}
    POST /agent/v1/log           session       {"text": lines of the agent's console, at most LOG_BYTES} -> {}; sent again where the answer was lost
    POST /home/v1/{run_id}       nonce         HomeCall -> {} ; from the new OS, not the agent

Each request, the new OS's too, carries a random value in `ASK_HEADER`; its answer, a refusal too, repeats it. Any other answer counts as none.

Chunks come from the plan's `chunk_urls` (agent/chunks.py), by a token that expires with the run's deadline (images/chunk_token.py):

    GET  URL/ab/SHA              chunk token   one chunk: bytes whose SHA-256 is SHA

Tokens travel as `Authorization: Bearer TOKEN`. 401 = unknown token; 410 = spent token or ended run. Bodies are JSON, at most 1 MiB.
"""

from __future__ import annotations

from typing import Any, NamedTuple

ASK_HEADER = "X-Repave-Ask"
LOG_BYTES = 16 * 1024  # of one batch
SLOT_FILE = "repave-slot.json"  # at the root of the run's initramfs slot: the Slot below


class Slot(NamedTuple):
    """What a run's boot media carry beside the cached ISO."""

    run_id: str
    agent_url: str  # https://HOST:PORT as machines see it
    token: str  # one boot only
    ca_pem: str
    network: dict[str, Any] | None = None  # static settings of the provisioning NIC: {"mac","address","prefix","gateway","dns":[],"vlan"}; None = DHCP
    give_up_s: int = 300  # no answer for so long: boot the local disk


class Disk(NamedTuple):
    """One block device as the agent sees it. Sizes in bytes; serial and wwn stripped, "" where the device has none."""

    path: str
    size_bytes: int
    sector_bytes: int
    serial: str = ""
    wwn: str = ""
    model: str = ""
    transport: str = ""  # nvme, sata, scsi, virtio, usb, ...
    removable: bool = False
    read_only: bool = False
    rotational: bool = False
    virtual: bool = False  # BMC virtual media, loop, ram, md, ...
    hctl: str = ""
    by_path: str = ""
    boots: bool = False  # today's UEFI boot entry points to it
    partitions: tuple[dict[str, Any], ...] = ()  # of a sound primary GPT: gpt.Partition.as_json


class Inventory(NamedTuple):
    """What the agent found. `boot_id` is /proc/sys/kernel/random/boot_id: one boot, one id."""

    boot_id: str
    serial: str
    uuid: str
    macs: tuple[str, ...]
    arch: str  # amd64, arm64
    firmware: str  # uefi, bios
    memory_bytes: int
    disks: tuple[Disk, ...]
    uptime_s: float = 0.0


class Plan(NamedTuple):
    """What the agent is told to do: one disk, named by its serial (or wwn), and nothing else. `keep`: partitions of it that stay (gpt.Partition.as_json)."""

    plan_id: str
    disk_path: str
    disk_serial: str
    disk_wwn: str
    disk_size_bytes: int
    manifest_sha256: str
    config_drive_sha256: str
    config_drive_bytes: int
    boot_label: str = "repave"
    rehearse: bool = False  # check everything, measure, report, and stop before the line
    read_back: str = "sample"  # or "all": how much of what was written is read again
    keep: tuple[dict[str, Any], ...] = ()
    chunk_urls: tuple[str, ...] = ()  # this and the next are told with the plan, and not part of what is recorded of it
    chunk_token: str = ""


class Progress(NamedTuple):
    epoch: int
    stage: str  # compare (where an agent goes on with what one before it wrote), clear, write, config-drive, read-back, boot-entry, seal
    bytes_done: int
    bytes_total: int


class Report(NamedTuple):
    """How the write ended. `error` is RepaveError.as_json or None; `stages_s` holds seconds by stage, None where no write ended well."""

    epoch: int
    verified: bool
    disk_serial: str
    bytes_written: int = 0
    bytes_fetched: int = 0
    bytes_zeroed: int = 0
    stages_s: dict[str, float] | None = None
    error: dict[str, Any] | None = None
    zeroed_by: str = ""  # punch, zero-out, written: what the disk could
    bytes_kept: int = 0  # of the image, from an agent of this boot that was killed
    bytes_read_back: int = 0
    rehearsal: dict[str, Any] | None = None  # of a rehearsal that went well: what it learnt, numbers by the names in REHEARSAL


REHEARSAL = ("data_bytes", "stored_bytes", "chunks", "fetched_bytes", "fetch_s", "expected_fetch_s")


class HomeCall(NamedTuple):
    """What the new OS says of itself."""

    boot_id: str
    root_disk_serial: str
    ssh_host_keys: tuple[str, ...]  # "ssh-ed25519 AAAA..." lines
    password_usable: bool


def render(message: Any) -> dict[str, Any]:
    """A message as JSON values."""
    disks = {"disks": tuple(disk._asdict() for disk in message.disks)} if isinstance(message, Inventory) else {}
    return dict(message._asdict() | disks)


def render_plan(plan: Plan) -> dict[str, Any]:
    """What is recorded: what came later only where it is not the default, so that an agent of an earlier version reads a plain plan and refuses what it
    can not do; and nothing that is told only with the plan."""
    later = {"rehearse": False, "read_back": "sample", "keep": ()}
    told = ("chunk_urls", "chunk_token")
    return {name: value for name, value in render(plan).items() if name not in told and (name not in later or value != later[name])}


def parse_inventory(value: dict[str, Any]) -> Inventory:
    """Raises KeyError, TypeError or ValueError on a shape that is not an Inventory."""
    disks = tuple(Disk(**{k: v for k, v in d.items() if k in Disk._fields}) for d in value["disks"])
    fields = {k: v for k, v in value.items() if k in Inventory._fields} | {"disks": disks, "macs": tuple(value["macs"])}
    return Inventory(**fields)
