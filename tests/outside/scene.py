"""One batch in which every ending happens, on a rack of its own, and what the observers say of it. `planted.py` runs it on copies with a bug each.

lab01 does well, lab02 never says hello, lab03 never calls home, lab04's image is damaged after preflight, nobody asks for lab05 and lab06.
Or the same for lab01 alone on a real machine in QEMU, or for all with two workers on PostgreSQL.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import requests
from places import USER_DATA, place_of_rack, place_of_workers
from watch import Watch
from wide_image import build_wide_image

from repave.cli.client import Client, Endpoint
from repave.images.store import ImageStore
from repave.lab.rack import OLD_PASSWORD, rack_down, rack_up
from repave.lab.scripted import set_faults
from repave.lab.service import import_image
from repave.lab.state import find_state
from repave.lab.workers import start_workers

PASSWORD = "Scene-7!canary"
WAIT_S = 20.0  # on two busy cores an agent says hello after 1 to 8 s
FAULTS = {"lab02": "no-hello", "lab03": "never-home"}


@dataclass(frozen=True)
class Wanted:
    """`names` are reinstalled. `twice`: the same request is sent again while the first is under way, and ought to be refused. `locked`: it is, too."""

    names: list[str]
    twice: bool = False
    rehearse: bool = False
    locked: bool = False
    at_once: int | None = None
    limits: tuple[int, int] = (0, 0)  # of the site, of the rack that holds all: runs at once


def play(folder: Path, wanted: Wanted, *, real: bool = False) -> list[str]:
    """What is broken."""
    os.environ["HUAWEICLOUD_SDK_HOME"] = str(folder)
    if not real:
        os.environ |= {"REPAVE_AGENT_READY_S": str(WAIT_S), "REPAVE_PROOF_S": str(WAIT_S)}
    os.environ |= {name: str(limit) for name, limit in zip(("REPAVE_RUNS_AT_ONCE", "REPAVE_RACK_AT_ONCE"), wanted.limits, strict=True) if limit}
    lab = rack_up(1 if real else 5, scripted=not real, folder=folder, debian=False, data_disk=real)
    client = Client(None, Endpoint(lab["endpoint"], lab["token"]))
    watch = Watch(place_of_rack(folder, lab, [PASSWORD, OLD_PASSWORD], scripted=not real))
    watch.place.at_once = max(wanted.limits)
    faults = {name: [fault] for name, fault in FAULTS.items() if name in wanted.names}
    if not real:
        _write_old_data(folder)
        import_image(client, build_wide_image(folder / "wide.raw", "wide"), name="wide")
        set_faults(folder / "rack", {name: ["hold-media"] for name in wanted.names} if wanted.twice else faults)
    watch.begin()
    try:
        if wanted.locked:
            for name in wanted.names:
                client.post(f"/servers/{name}/lock", {"reason": "nobody is to touch it"})
        for image, of in (("tiny-1", [n for n in wanted.names if n != "lab04"]), ("wide", [n for n in wanted.names if n == "lab04"])):
            if of:
                _ask(watch, client, image, of, wanted)
        if wanted.twice:
            _ask(watch, client, "tiny-1", wanted.names, wanted)
            set_faults(folder / "rack", faults)
        if "lab04" in wanted.names:
            _damage(client, folder)
        return watch.judge()
    finally:
        watch.close()
        _tell(watch)


def play_on_postgres(folder: Path, wanted: Wanted) -> list[str]:
    with start_workers(folder, machines=2) as site:
        watch = Watch(place_of_workers(site, [PASSWORD]))
        watch.begin()
        try:
            _ask(watch, site.client(), "tiny-1", wanted.names, wanted)
            return watch.judge()
        finally:
            watch.close()
            _tell(watch)


def _write_old_data(folder: Path) -> None:
    """An old system's data, where the image has zeros."""
    state = find_state(folder / "rack")
    assert state is not None
    for machine in state.machines[:4]:
        with machine.root_disk.open("r+b") as disk:
            disk.seek(1 << 20)
            disk.write(b"\xa5" * (15 << 20))


def _tell(watch: Watch) -> None:
    rows = watch.rows("SELECT i.name, r.outcome FROM runs r JOIN instances i ON i.id = r.instance_id")
    print("scene:", ", ".join(f"{r['name']} {r['outcome']}" for r in rows))


def _ask(watch: Watch, client: Client, image: str, names: list[str], wanted: Wanted) -> None:
    body = {"servers": names, "image": image, "rehearse": wanted.rehearse, "at_once": wanted.at_once}
    if not wanted.rehearse:
        body |= {"password": PASSWORD, "user_data": f"#!/bin/sh\n# {USER_DATA}\n"}
    sent_at = time.time()
    answer = requests.post(f"{client.endpoint.url}/repave/v1/reinstall", json=body, headers={"X-Auth-Token": client.endpoint.token}, timeout=60)
    print(f"reinstall of {names}: {answer.status_code}")
    if answer.status_code == 202:
        watch.accepted.append((sent_at, time.time(), [watch.place.ids[name] for name in names]))


def _damage(client: Client, folder: Path) -> None:
    """One bit of the wide image's last chunk with data, once its batch is past its preflight. It stays damaged."""
    store = ImageStore(folder / "site/repave-data/images")
    chunks = store.read_manifest(client.get("/images/wide")["manifest_sha256"]).chunks
    path = store.chunk_path(next(c for c in reversed(chunks) if c.extents).sha256)
    batch = client.items("/batches", limit=1)[0]["id"]
    while not any(e["type"] == "run.step" and e["step"] == "power-off" for e in client.items("/events", batch=batch)):
        time.sleep(0.05)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["lab01", "lab02", "lab03", "lab04"])
    parser.add_argument("--twice", action="store_true")
    parser.add_argument("--nothing", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--locked", action="store_true")
    parser.add_argument("--at-once", type=int)
    parser.add_argument("--limits", type=int, nargs=2, default=(0, 0), metavar=("SITE", "RACK"))
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--postgres", action="store_true")
    args = parser.parse_args()
    wanted = Wanted([] if args.nothing else args.names, args.twice, args.rehearse, args.locked, args.at_once, tuple(args.limits))
    folder = Path(tempfile.mkdtemp(prefix="rps-", dir="/tmp"))
    folder.chmod(0o755)  # PostgreSQL runs as a user of its own
    try:
        with contextlib.redirect_stderr(sys.stdout):
            broken = play_on_postgres(folder, wanted) if args.postgres else play(folder, wanted, real=args.real)
    finally:
        rack_down(folder)
        shutil.rmtree(folder, ignore_errors=True)
    for line in broken:
        print(line)
    print(f"scene: {len(broken)} violations")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
