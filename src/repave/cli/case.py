"""`repave case`: a failed run in one file that can be sent to somebody."""

from __future__ import annotations

from pathlib import Path

from repave.cli.client import Client
from repave.cli.output import Exit, Refused, check_known, say, show, show_json, size
from repave.errors import RequestError


def case(batch: str | None = None, server: str | None = None, /, *, to: Path = Path("."), project: str | None = None, json: bool = False) -> int:
    """Write one file (tar.gz) for each failed run of a batch (default: the newest), or for the run of one of its servers, failed or not.

    In it: cause, next command, what was left untouched, steps with times, consoles, the talk with the BMC, inventory, plan, versions, settings.
    Passwords, tokens and keys are masked.

    Parameters
    ----------
    to
        The folder to write into.
    """
    client = Client(project)
    if batch is None:
        batches = client.items("/batches", limit=1)
        if not batches:
            raise RequestError("not-found", "There is no batch yet.")
        batch = str(batches[0]["id"])
    runs = {run["server"]: run for run in client.get(f"/batches/{batch}")["runs"]}
    if server is not None:
        check_known([server], list(runs))
    chosen = [run for name, run in runs.items() if (name == server if server else run["state"] == "failed")]
    if not chosen:
        raise Refused(f"No run of {batch} has failed. For one that has not: repave case {batch} SERVER")
    to.mkdir(parents=True, exist_ok=True)
    written = []
    for run in chosen:
        path = to / f"case-{run['server']}-{run['id'][-12:]}.tar.gz"
        path.write_bytes(client.fetch(f"/runs/{run['id']}/case"))
        error = run["error"] or {}
        written.append({"server": run["server"], "run": run["id"], "file": str(path), "code": error.get("code"), "cause": error.get("cause")})
        if not json:
            show(str(path))
            say(f"  {run['server']}  {size(path.stat().st_size)}  " + (f"{error['code']}  {error['cause']}" if error else run["state"]))
    if json:
        show_json({"items": written, "next": None})
    elif any(item["code"] for item in written):
        say(f"Next: repave explain {next(item['code'] for item in written if item['code'])}")
    return Exit.OK
