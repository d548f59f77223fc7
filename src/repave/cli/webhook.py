"""`repave webhook`: who is told when a batch or a run ends."""

from __future__ import annotations

from cyclopts import App

from repave.cli.client import Client
from repave.cli.lists import TABLE, Form, show_list
from repave.cli.output import Exit, confirm, say, show, show_json

app = App(name="webhook")
_LIST = {"NAME": "name", "HOST": "host", "EVENTS": "events", "SHAPE": "shape", "DELIVERED": "delivered_at", "TROUBLE": "trouble"}


@app.command
def add(
    name: str, url: str, /, *, event: list[str] | None = None, slack: bool = False, project: str | None = None, json: bool = False
) -> int:  # fmt: skip
    """Tell this URL what happens from now on, signed as Standard Webhooks are. The secret is shown once.

    Parameters
    ----------
    event
        batch.ended (the default), run.ended, run.late; give it again for more.
    slack
        A line of text for a chat's incoming webhook.
    """
    made = Client(project).post("/webhooks", {"name": name, "url": url, "events": event or ["batch.ended"], "shape": "slack" if slack else "standard"})
    if json:
        show_json(made)
    else:
        show(made["secret"])
    say(f"Shown this once: the receiver checks signatures with it.  Next: repave webhook test {name}")
    return Exit.OK


@app.command
def ls(*, project: str | None = None, form: Form = TABLE) -> None:
    """Webhooks, and why one is not taken."""
    items = Client(project).items("/webhooks")
    show_list(items if form.is_json else [i | {"events": ",".join(i["events"])} for i in items], _LIST, form)


@app.command
def test(name: str, /, *, project: str | None = None) -> None:
    """Send a webhook.test now."""
    Client(project).post(f"/webhooks/{name}/test", {})
    say(f"{name} took it.")


@app.command
def rm(name: str, /, *, project: str | None = None, yes: bool = False) -> None:
    """It is told nothing any more."""
    confirm(f"Remove webhook {name}? [y/N] ", "y", yes=yes)
    Client(project).delete(f"/webhooks/{name}")
    say(f"{name} is removed.")
