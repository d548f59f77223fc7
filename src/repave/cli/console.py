"""`repave console SERVER`: what its serial console and the agent on it said during a run."""

from __future__ import annotations

import sys
from typing import Literal

from repave.cli.client import Client
from repave.cli.output import Exit, Json, check_known, say
from repave.errors import RequestError


def console(
    server: str, /, *, batch: str | None = None, follow: bool = False, source: Literal["agent", "serial"] | None = None, project: str | None = None
) -> int:
    """The console of a server in its newest run, from the first byte.

    Parameters
    ----------
    batch
        The run of this batch instead of the newest one.
    follow
        Go on until the run has ended.
    source
        serial (with the firmware's and the new OS's words, where the site has serial consoles) or agent; absent: serial where there is one.
    """
    client = Client(project)
    run = find_run(client, server, batch)
    path, params = f"/runs/{run['id']}/console", {"source": source} if source else {}
    spoke = False
    try:
        if follow:
            for piece in client.follow_stream(path, 0, params):
                sys.stdout.write(piece["text"])
                sys.stdout.flush()
                spoke = True
        else:
            text = client.fetch(path, **params).decode()
            sys.stdout.write(text)
            spoke = bool(text)
    except KeyboardInterrupt:
        say(f"\nThe run goes on.  Next: repave watch {run['batch']}")
        return Exit.CTRL_C
    if not spoke:
        say(f"Nothing was said yet by {server} in batch {run['batch']} (step {run['step']}).")
    return Exit.OK


def find_run(client: Client, server: str, batch: str | None = None) -> Json:
    """The newest run of this server, or its run in `batch`. Raises RequestError not-found."""
    if batch is not None:
        runs = {r["server"]: r for r in client.get(f"/batches/{batch}")["runs"]}
        check_known([server], list(runs))
        return dict(runs[server])
    found = client.items("/runs", server=server, limit=1)
    if not found:
        raise RequestError("not-found", f"{server} has not been reinstalled yet.", kind="run")
    return found[0]
