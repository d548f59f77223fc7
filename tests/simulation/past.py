"""A site's past: reinstalls of another server of the same model and image that went well, long before the world began. From it waits are learnt."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import sqlalchemy as sa

from repave.domain.model import Batch, Image, Server
from repave.domain.states import Ending
from repave.store import Store, database
from repave.store.tables import BATCHES, RUNS

SLOWEST_S = {"boot-ramdisk": 180.0, "first-boot": 120.0}


def give_past(store: Store, like: Server, image: Image, count: int) -> None:
    """So many proved runs, each in its batch."""
    server = dataclasses.replace(like, id=database.new_id(), name="past", serial="SER-past", uuid="uuid-past", macs=("mac-past",), rack="past")
    instance = store.servers.add_server(server, bmc_password="Canary-bmc", blank=False)
    with store.write() as conn:
        for n in range(count):
            began = like.created_at - timedelta(days=1, hours=n)
            batch = Batch(database.new_id(), like.project_id, image.id, began, "op", began + timedelta(hours=1))
            conn.execute(sa.insert(BATCHES), dataclasses.asdict(batch))
            share = 1 - n / (2 * count)
            row = {
                "id": database.new_id(), "batch_id": batch.id, "project_id": like.project_id, "instance_id": instance.id, "server_id": server.id,
                "image_id": image.id, "epoch": 0, "found_state": "running", "step": "proof", "created_at": began, "released_at": began,
                "deadline_at": began + timedelta(hours=4), "closed_at": began, "ended_at": began + timedelta(hours=1), "outcome": Ending.PROVED.value,
                "durations_s": {step: slowest_s * share for step, slowest_s in SLOWEST_S.items()},
            }  # fmt: skip
            conn.execute(sa.insert(RUNS), row)
