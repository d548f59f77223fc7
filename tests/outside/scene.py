"""One batch in which every ending happens, on a rack of its own, and what the observers say of it. `planted.py` runs it on copies with a bug each.

lab01 does well, lab02 never says hello, lab03 never calls home, lab04's image is damaged after preflight, nobody asks for lab05 and lab06.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import requests
from places import place_of_rack
from watch import Watch

from repave.cli.client import Client, Endpoint
from repave.images.store import ImageStore
from repave.lab.rack import rack_down, rack_up
from repave.lab.scripted import set_faults
from repave.lab.state import find_state

PASSWORD = "Scene-7!canary"
WAIT_S = 20.0  # on two busy cores an agent says hello after 1 to 8 s
FAULTS = {"lab02": "no-hello", "lab03": "never-home"}


def play(folder: Path, names: list[str], *, twice: bool = False) -> list[str]:
    """What is broken. `twice`: the same request is sent again while the first is under way, and ought to be refused."""
    os.environ |= {"REPAVE_AGENT_READY_S": str(WAIT_S), "REPAVE_PROOF_S": str(WAIT_S), "HUAWEICLOUD_SDK_HOME": str(folder)}
    lab = rack_up(5, scripted=True, folder=folder, debian=False)
    client = Client(None, Endpoint(lab["endpoint"], lab["token"]))
    state = find_state(folder / "rack")
    assert state is not None
    for machine in state.machines[:4]:
        with machine.root_disk.open("r+b") as disk:  # an old system's data, where the image has zeros
            disk.seek(1 << 20)
            disk.write(b"\xa5" * (15 << 20))
    faults = {name: [fault] for name, fault in FAULTS.items() if name in names}
    set_faults(folder / "rack", {name: ["hold-media"] for name in names} if twice else faults)
    watch = Watch(place_of_rack(folder, lab, [PASSWORD]))
    watch.begin()
    try:
        for image, of in (("tiny-1", [n for n in names if n != "lab04"]), ("tiny-2", [n for n in names if n == "lab04"])):
            if of:
                _put(watch, lab, image, of)
        if twice:
            _put(watch, lab, "tiny-1", names)
            set_faults(folder / "rack", faults)
        if "lab04" in names:
            _damage(client, folder)
        return watch.judge()
    finally:
        watch.close()
        rows = watch.rows("SELECT i.name, r.outcome FROM runs r JOIN instances i ON i.id = r.instance_id")
        print("scene:", ", ".join(f"{r['name']} {r['outcome']}" for r in rows))


def _put(watch: Watch, lab: dict, image: str, names: list[str]) -> None:
    ids = [i["id"] for i in lab["instances"] if i["name"] in names]
    body = {"image_id": next(i["id"] for i in lab["images"] if i["name"] == image), "password": PASSWORD, "instance_id_set": ids}
    url, sent_at = f"{lab['endpoint']}/v1/{lab['project_id']}/instances/reinstall", time.time()
    answer = requests.put(url, json=body, headers={"X-Auth-Token": lab["token"]}, timeout=60)
    print(f"PUT {names}: {answer.status_code}")
    if answer.status_code == 202:
        watch.accepted.append((sent_at, time.time(), [i["id"] for i in answer.json()["instances"]]))


def _damage(client: Client, folder: Path) -> None:
    """One bit of a chunk that only tiny-2 has, once its batch is past its preflight. It stays damaged."""
    store = ImageStore(folder / "site/repave-data/images")
    chunks = {i["name"]: {c.sha256 for c in store.read_manifest(client.get(f"/images/{i['name']}")["manifest_sha256"]).chunks} for i in client.items("/images")}
    path = store.chunk_path(min(chunks["tiny-2"] - chunks["tiny-1"] - chunks["windows-2022"]))
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
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rps-", dir="/tmp"))
    try:
        with contextlib.redirect_stderr(sys.stdout):
            broken = play(folder, [] if args.nothing else args.names, twice=args.twice)
    finally:
        rack_down(folder)
        shutil.rmtree(folder, ignore_errors=True)
    for line in broken:
        print(line)
    print(f"scene: {len(broken)} violations")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
