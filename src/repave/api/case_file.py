"""A run as one file that can be sent to somebody: why it ended so, what comes next, and everything that was seen, without a secret.

The same run gives the same bytes: names in order, no times but the run's own. Everything in it has gone through the redactor, whoever wrote it.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fastapi.encoders import jsonable_encoder

from repave.domain.model import Event, Image, RunRow, Server, Source
from repave.domain.redaction import Redactor
from repave.store import Store

Json = dict[str, Any]
MEDIA_TYPE = "application/gzip"
_WHOLE = 1 << 20  # more than a stream keeps
_PARTS = {
    "README.txt": "what happened, what to do, and this list",
    "run.json": "the run as the API shows it: step, side of the line, durations, error, proof",
    "events.jsonl": "what was recorded of it, in order",
    "console-serial.txt": "the server's serial console, where the site has them",
    "console-agent.txt": "what the agent said",
    "bmc.jsonl": "each request to the BMC with its answer",
    "inventory.json": "what the ramdisk found in the server",
    "plan.json": "what the agent was told to do",
    "report.json": "what the agent reported",
    "server.json": "the server as Repave knows it, and the image",
    "site.json": "versions, and the settings without secrets",
}


@dataclass(frozen=True)
class Case:
    """What goes into the file. `shown`: the run as the API shows it; `site`: versions and settings."""

    run: RunRow
    shown: Json
    server: Server
    image: Image | None
    events: Sequence[Event]
    site: Json


def build_case(store: Store, case: Case) -> bytes:
    """A tar.gz with one folder, named like the file."""
    redactor = Redactor([*store.runs.list_run_secrets(case.run.id), *store.servers.list_bmc_passwords(case.server.id)])
    parts = {name: text for name, text in _render(store, case, redactor).items() if text}
    parts["README.txt"] = redactor.clean(_readme(case, parts))
    return _pack(case_name(case.run, case.server), parts, case.run.ended_at or case.run.created_at)


def case_name(run: RunRow, server: Server) -> str:
    return f"case-{server.name}-{run.id[-12:]}"


def _render(store: Store, case: Case, redactor: Redactor) -> dict[str, str]:
    def as_json(value: Any) -> str:
        return json.dumps(redactor.clean_json(jsonable_encoder(value)), indent=1, sort_keys=True, ensure_ascii=False) + "\n" if value else ""

    run, server = case.run, case.server
    known = {n: getattr(server, n) for n in ("name", "manufacturer", "model", "serial", "uuid", "macs", "arch", "boot", "rack", "unit", "root_disk", "network")}
    events = [redactor.clean_json(jsonable_encoder(_event(e))) for e in case.events if e.run_id == run.id]
    consoles = {source: store.consoles.read(run.id, source, most=_WHOLE).text for source in Source}
    return {
        "run.json": as_json(case.shown), "events.jsonl": "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in events),
        "console-serial.txt": redactor.clean(consoles[Source.SERIAL]), "console-agent.txt": redactor.clean(consoles[Source.AGENT]),
        "bmc.jsonl": consoles[Source.BMC],  # clean as it is; a second pass would not see whole JSON strings
        "inventory.json": as_json(run.inventory), "plan.json": as_json(run.plan), "report.json": as_json(run.report),
        "server.json": as_json({"server": known, "image": case.image}), "site.json": as_json(case.site),
    }  # fmt: skip


def _event(event: Event) -> Json:
    return {"seq": event.seq, "at": event.at, "type": event.type, "actor": event.actor, "data": event.data}


def next_commands(run: RunRow, server_name: str) -> list[str]:
    """What a person types next."""
    if run.ended_at is None:
        return [f"repave watch {run.batch_id}"]
    if run.error is None:
        return []
    return [f"repave explain {run.error['code']}", f"repave console {server_name} --batch {run.batch_id}", f"repave batch retry {run.batch_id}"]


def _readme(case: Case, parts: Mapping[str, str]) -> str:
    run, error = case.run, case.run.error or {}
    how = "has not ended" if run.ended_at is None else f"ended: {run.outcome}"
    lines = [
        f"{case.server.name}, run {run.id} of batch {run.batch_id}, {how}, at step {run.step.number}/8 {run.step.value}, "
        f"{'past' if run.past_the_line else 'before'} the line.",
        "",
    ]
    if error:
        lines += [f"{error['code']}  {error.get('title', '')}", f"  cause      {error.get('cause', '')}", f"  do         {error.get('do', '')}"]
        lines += [f"  untouched  {error.get('untouched', '')}", ""]
    lines += [f"Next:  {command}" for command in next_commands(run, case.server.name)]
    lines += ["", "Seconds a step:  " + " · ".join(f"{step} {seconds:.1f}" for step, seconds in case.shown["durations_s"].items()), ""]
    lines += [f"  {name:20} {what}" for name, what in _PARTS.items() if name in parts or name == "README.txt"]
    lines += ["", "Passwords, tokens and keys are masked: ***. Names, addresses and serial numbers are not."]
    return "\n".join(lines) + "\n"


def _pack(name: str, parts: Mapping[str, str], at: datetime) -> bytes:
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0, filename="") as zipped, tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for part in _PARTS:
            if part in parts:
                data = parts[part].encode()
                entry = tarfile.TarInfo(f"{name}/{part}")
                entry.size, entry.mtime, entry.mode = len(data), int(at.timestamp()), 0o644
                tar.addfile(entry, io.BytesIO(data))
    return packed.getvalue()
