"""People who may log in to the pages: add, ls, rm. A password comes from the terminal or from stdin, never from the command line."""

from __future__ import annotations

from typing import Literal

from cyclopts import App

from repave.cli.client import Client
from repave.cli.lists import TABLE, Form, show_list
from repave.cli.output import read_secret, say, show, show_json

app = App(name="user")


@app.command(name="add")
def add_user(
    name: str,
    /,
    *,
    role: Literal["viewer", "operator", "admin"] = "viewer",
    password_stdin: bool = False,
    project: str | None = None,
    json: bool = False,
) -> None:
    """Add a person: a name and a password for the pages, a role in one project.

    Parameters
    ----------
    password_stdin
        The password is the first line of stdin. 12 characters at least.
    """
    client = Client(project)
    password = read_secret(f"Password for {name}", from_stdin=password_stdin, twice=True)
    made = client.post("/users", {"name": name, "role": role, "password": password})
    if json:
        show_json(made)
    else:
        show(f"{made['name']}  {made['role']}")
        say(f"The pages: {client.endpoint.url}/")


@app.command(name="ls")
def list_users(*, project: str | None = None, form: Form = TABLE) -> None:
    """List the people of a project."""
    show_list(Client(project).items("/users"), {"NAME": "name", "ROLE": "role", "SINCE": "created_at"}, form)


@app.command(name="rm")
def remove_user(name: str, /, *, project: str | None = None) -> None:
    """Remove a person: they are logged out everywhere at once."""
    Client(project).delete(f"/users/{name}")
    say(f"{name} is removed.")
