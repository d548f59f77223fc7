"""`make run`: the main job on the virtual rack, from nothing to two reinstalled machines, by the unmodified official SDK.

    check -> ramdisk -> images -> rack (the pages answer) -> one PUT -> watch -> SSH with the new password, not with the old -> where the time went

With a terminal the rack stays up until Ctrl-C; without one everything is taken down and the exit status says how it went.
Ctrl-C before that takes everything down too, and the exit status is 130. `--scripted`: the machines are played, without firmware and SSH.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from repave.cli.client import Client, Endpoint
from repave.cli.output import fold
from repave.lab.domain_xml import probe_kvm
from repave.lab.os_images import default_cache
from repave.lab.phases import PhaseFailed
from repave.lab.rack import OLD_PASSWORD, rack_down, rack_up
from repave.lab.ssh import SshRefused, ssh_login
from repave.secrets import write_private

FOLDER = Path(".repave")
PASSWORDS = Path(".repave/passwords.json")  # the lab's machines only: what `ssh` needs after a run
COUNT = 2
PERSON = "demo"  # who may log in to the pages
WAIT_S = 1800.0
SSH_WAIT_S = 180.0  # under emulation sshd starts up to a minute after cloud-init called home

# Minutes that each part usually takes on two quiet cores without KVM, rounded up (docs/benchmarks.md); what is cached takes none.
RAMDISK_MIN, IMAGES_MIN, BATCH_MIN, SCRIPTED_MIN = 1, 2, 3, 1
BUSY = 2  # how much longer it may take beside other work, which is what is promised

Json = dict[str, Any]


class Failed(Exception):
    """The demonstration did not end as it should; the text says what was seen."""


class RunsFailed(Failed):
    """A batch has ended, and not all of its machines run."""


def main() -> int:
    """Exit status 0 when both machines run the new OS and took the new password, 130 when Ctrl-C came before that."""
    parser = argparse.ArgumentParser(prog="make run")
    parser.add_argument("--scripted", action="store_true")
    scripted: bool = parser.parse_args().scripted
    image = os.environ.get("REPAVE_DEMO_IMAGE", "tiny-2" if scripted else "debian-12")
    stay = sys.stdout.isatty() and sys.stdin.isatty()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    started, password = time.monotonic(), "-".join(secrets.token_hex(2) for _ in range(3))

    def show_pages(client: Client) -> None:
        add_person(client, password)
        login = f"user {PERSON}, password {password}"
        print(f"  Pages      {client.endpoint.url}      {login}      after {time.monotonic() - started:.0f} s: watch it there", flush=True)

    try:
        print(announce(default_cache(), scripted=scripted), flush=True)
        show_check(scripted=scripted)
        lab = rack_up(COUNT, scripted=scripted, folder=FOLDER, begun=show_pages)
        client = Client(None, Endpoint(lab["endpoint"], lab["token"]))
        follow_unfinished(client)
        seconds = reinstall_all(client, lab, image)
        show_machines(client, lab)
        print(f"\n✓ {COUNT} machines run {image} {seconds:.0f} s after the PUT; {time.monotonic() - started:.0f} s in all.", flush=True)
        if stay:
            with contextlib.suppress(KeyboardInterrupt):  # all is done: this is how one leaves
                print(render_next(lab, password), flush=True)
                threading.Event().wait()
            print("\nstopping", flush=True)
        else:
            print("Without a terminal nothing stays up: all of it is taken down.", flush=True)
    except KeyboardInterrupt:
        print("\nstopping", flush=True)
        return 130
    except (Failed, PhaseFailed) as failure:
        print(f"\n{'' if isinstance(failure, PhaseFailed) else '✗ '}{failure}", flush=True)
        return 1
    finally:
        rack_down(FOLDER)
    return 0


def announce(cache: Path, *, scripted: bool) -> str:
    """What is about to happen, and within which time; by what the cache lacks."""
    kind, on = ("scripted", "on two quiet cores") if scripted else ("with real firmware", "on two quiet cores without KVM")
    minutes = {"rack and batch": SCRIPTED_MIN if scripted else BATCH_MIN}
    if not scripted:
        minutes |= {} if any(cache.glob("debian-12-*")) else {"images": IMAGES_MIN}
        minutes |= {} if any(cache.glob("ramdisk-*")) else {"ramdisk": RAMDISK_MIN}
    parts = ", ".join(f"{name} {count}" for name, count in reversed(minutes.items()))
    after = "What is made once is kept" if len(minutes) > 1 else "Nothing is fetched: the pages within 20 s"
    return (
        f"Repave on a virtual rack: {COUNT} machines, {kind}, reinstalled by one PUT of the official SDK.\n"
        f"Usually {sum(minutes.values())} min {on} ({parts}), within {BUSY * sum(minutes.values())} min beside other work. {after}."
    )


def show_check(*, scripted: bool) -> None:
    """What this machine is, for whom the numbers astonish. The packages and the virtual environment are there: make has seen to it."""
    started = time.monotonic()
    if scripted:
        machine = "scripted machines need no KVM"
    else:
        machine = "QEMU, OVMF · " + ("KVM works" if probe_kvm() else "KVM: does not work here → emulation, about 5x slower, all features work")
    print(f"1/6 check    ✓ Python {platform.python_version()}, {machine}  {time.monotonic() - started:.0f} s", flush=True)
    print("2/6 python   ✓ locked packages in .venv, cached by their lock file", flush=True)


def add_person(client: Client, password: str) -> None:
    """`demo` may log in to the pages, with this password alone."""
    if any(user["name"] == PERSON for user in client.items("/users")):
        client.delete(f"/users/{PERSON}")
    client.post("/users", {"name": PERSON, "role": "admin", "password": password})


def render_next(lab: Json, password: str) -> str:
    """The last thing on the screen: where it runs, what to try, how one's own program gets in, what to read."""
    names = [i["name"] for i in lab["instances"][:COUNT]]
    return "\n".join((
        "Repave is running (Ctrl-C stops it; make clean removes all).",
        f"  Pages      {lab['endpoint']}      user {PERSON}, password {password}",
        f"  Try        .venv/bin/repave reinstall '{fold(names)}' --image tiny-2      in another terminal, here",
        f"             .venv/bin/repave rack fault {names[0]} ignore-boot-override, then again; none ends it",
        f"             .venv/bin/repave console {names[0]} · .venv/bin/repave case · .venv/bin/repave batch ls",
        '  Own SDK    eval "$(make env)": then samples of the official SDK run unchanged',
        "  Next       docs/tutorial.md · your own servers: docs/first-real-server.md",
    ))  # fmt: skip


def follow_unfinished(client: Client) -> None:
    """A batch that an earlier life left runs to its end, good or bad, before a new one is sent."""
    for batch in client.items("/batches", limit=5):
        if batch["state"] == "working":
            print(f"6/6 batch    {batch['id']} of an earlier run goes on")
            try:
                watch(client, batch["id"])
            except RunsFailed as failure:
                print(f"6/6 batch    that one ended badly ({failure}); here is another", flush=True)


def reinstall_all(client: Client, lab: Json, image: str) -> float:
    """One PUT of the official SDK for all instances with Linux; returns seconds from its answer to the last `running`."""
    image_id = next((i["id"] for i in lab["images"] if i["name"] == image), None)
    if image_id is None:
        raise Failed(f"the rack has no image {image}")
    known = read_passwords()
    password = "Lab-" + secrets.token_hex(6) + "A1"
    instances = [i for i in lab["instances"] if i["os_type"] == "Linux"]
    ids = [i["id"] for i in instances]
    print(f"6/6 batch    PUT /v1/{lab['project_id']}/instances/reinstall  {len(ids)} instances, image {image}", flush=True)
    accepted = send_reinstall(lab, image_id, password, ids)
    if accepted != ids:
        raise Failed("the 202 names other ids than the request")
    sent_at = time.monotonic()
    write_private(PASSWORDS, json.dumps(known | dict.fromkeys(ids, password)).encode())
    batch = client.items("/batches", limit=1)[0]["id"]
    watch(client, batch)
    seconds = time.monotonic() - sent_at
    if not lab["scripted"]:
        with ThreadPoolExecutor(COUNT) as pool:  # an emulated machine takes some seconds for each key exchange
            list(pool.map(lambda i: verify_login(i, password, known.get(i["id"], OLD_PASSWORD)), instances))
    show_waterfall(client, batch)
    return seconds


def send_reinstall(lab: Json, image_id: str, password: str, ids: list[str]) -> list[str]:
    """The official SDK's ReinstallOs, signed with AK/SK. Returns the ids of the 202."""
    os.environ.setdefault("HUAWEICLOUD_SDK_HOME", str(FOLDER.resolve()))
    from huaweicloudsdkclouddc.v1 import CloudDCClient, ReinstallOSOptions, ReinstallOsRequest
    from huaweicloudsdkcore.auth.credentials import BasicCredentials

    credentials = BasicCredentials(lab["ak"], lab["sk"], lab["project_id"])
    sdk = CloudDCClient.new_builder().with_credentials(credentials).with_endpoint(lab["endpoint"]).build()
    body = ReinstallOSOptions(image_id=image_id, password=password, instance_id_set=ids)
    answer = sdk.reinstall_os(ReinstallOsRequest(body=body))
    return [item.id for item in answer.instances]


def watch(client: Client, batch_id: str) -> None:
    """One line a change until every run ended. Raises RunsFailed with the causes, Failed when they do not end."""
    seen: dict[str, tuple[Any, ...]] = {}
    deadline, beat = time.monotonic() + WAIT_S, time.monotonic()
    while time.monotonic() < deadline:
        batch = client.get(f"/batches/{batch_id}")
        for run in batch["runs"]:
            now = (run["state"], run["step"], _tenth(run))
            if seen.get(run["server"]) != now:
                seen[run["server"]], beat = now, time.monotonic()
                print(f"  {_clock()} {run['server']:<8} {run['step_index']}/{run['steps']} {run['step']:<13} {_percent(run)} {run['state']}", flush=True)
        if batch["state"] != "working":
            failed = [r for r in batch["runs"] if r["error"]]
            if failed:
                raise RunsFailed("; ".join(f"{r['server']}: {r['error']['code']} {r['error']['title']} {r['error']['cause']}" for r in failed))
            return
        if time.monotonic() - beat > 60:
            beat = time.monotonic()
            print(f"  {_clock()} still waiting; nothing changed for 60 s", flush=True)
        time.sleep(0.5)
    raise Failed(f"the batch did not end within {WAIT_S:.0f} s")


def _tenth(run: Json) -> int | None:
    return 10 * run["bytes_written"] // run["bytes_total"] if run["stage"] == "write" and run["bytes_total"] else None


def _percent(run: Json) -> str:
    tenth = _tenth(run)
    return f"{tenth * 10:>3} %" if tenth is not None and run["step"] == "write-image" else "     "


def verify_login(instance: Json, password: str, old_password: str) -> None:
    """The new OS takes the new password over SSH and refuses the old one. Raises Failed."""
    host, port = instance["ssh"]["host"], instance["ssh"]["port"]
    system = _retried(lambda: ssh_login(host, port, password, "cat /etc/repave-release /etc/debian_version 2>/dev/null; hostname"))
    if not _retried(lambda: _is_refused(host, port, old_password)):
        raise Failed(f"{instance['name']}: the old password still works")
    print(f"  {_clock()} {instance['name']:<8} SSH: new password works ({' '.join(system.split())}), the old one is refused", flush=True)


def _is_refused(host: str, port: int, password: str) -> bool:
    try:
        ssh_login(host, port, password, "true")
    except SshRefused:
        return True
    return False


def _retried(attempt: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SSH_WAIT_S
    while True:
        try:
            return attempt()
        except Exception as error:
            if time.monotonic() > deadline:
                raise Failed(f"SSH does not work: {error}") from None
            time.sleep(2)


def show_waterfall(client: Client, batch_id: str) -> None:
    """Where the time went, machine by machine: a bar a step."""
    print("\nWhere the time went, seconds a step:")
    for run in client.get(f"/batches/{batch_id}")["runs"]:
        steps = run["durations_s"]
        total = sum(steps.values())
        print(f"  {run['server']:<8} {total:6.1f} s  " + "  ".join(f"{name} {s:.1f}" for name, s in steps.items()))
        width = {name: max(1, round(60 * s / max(total, 0.1))) for name, s in steps.items()}
        print("           " + "".join(name[0] * width[name] for name in steps))


def show_machines(client: Client, lab: Json) -> None:
    for server in client.items("/servers"):
        port = next((i["ssh"]["port"] for i in lab["instances"] if i["server_id"] == server["id"]), 0)
        login = f"ssh -p {port} root@127.0.0.1" if port else "no SSH: its OS is played"
        print(f"  {server['name']:<8} {server['instance']['state']:<8} {server['instance']['image'] or '?':<10} {login}")


def read_passwords() -> dict[str, str]:
    return dict(json.loads(PASSWORDS.read_text())) if PASSWORDS.exists() else {}


def _clock() -> str:
    return datetime.now().strftime("%H:%M:%S")


if __name__ == "__main__":
    sys.exit(main())
