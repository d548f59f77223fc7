"""The site and who may use it: init, serve, serve-chunks, whoami, project, key, explain, and what bare `repave` says."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from repave.cli.lists import TABLE, Form, show_list
from repave.cli.options import AsJson, Project
from repave.cli.output import Usage, count, fold, say, show, show_json
from repave.errors import CATALOGUE, CLOUDDC, RepaveError

project = App(name="project")
key = App(name="key")


def _site_folder(folder: Path | None) -> Path:
    return folder or Path(os.environ.get("REPAVE_SITE", "."))


# ---- the site ----


def init(
    folder: Path | None = None, /, *, state: Path | None = None, api_listen: str | None = None, media_url: str | None = None, agent_url: str | None = None
) -> None:
    """Make a site: settings file, key file, CA, database, project `default` and its first admin key, printed once.

    Parameters
    ----------
    folder
        Where; default REPAVE_SITE, or here.
    state
        Where database, images, boot media and keys go; default beside the settings. A packaged service may write in /var/lib/repave alone.
    api_listen
        HOST:PORT of API and pages.
    media_url
        The media listener as BMCs see it.
    agent_url
        The provisioning listener as servers see it.
    """
    from repave.app import init_site
    from repave.cli.client import ADMIN_FILE
    from repave.secrets import write_private

    folder = _site_folder(folder)
    changes = {"api_listen": api_listen, "media_url": media_url, "agent_url": agent_url}
    if state is not None:
        changes |= {"data_dir": str(state.resolve() / "data"), "key_file": str(state.resolve() / "secret" / "key")}
    made = init_site(folder, **{name: value for name, value in changes.items() if value is not None})
    admin = {
        "endpoint": f"http://{api_listen or '127.0.0.1:8470'}", "project_id": made.project.id, "token": made.token,
        "ak": made.credential.ak, "sk": made.sk,
    }  # fmt: skip
    write_private(folder / ADMIN_FILE, json.dumps(admin, indent=2).encode())
    show_json(admin)
    say(f"Shown this once; kept in {folder / ADMIN_FILE} (0600), which this command line reads.  Next: repave serve")


def serve(folder: Path | None = None, /) -> None:
    """Run the service of the site in this folder (default REPAVE_SITE, or here), until Ctrl-C or SIGTERM."""
    from repave.app import serve as serve_site
    from repave.config import SETTINGS_FILE

    folder = _site_folder(folder)
    if not (folder / SETTINGS_FILE).exists():
        raise Usage(f"{folder} is no site: it has no {SETTINGS_FILE}. Make one: repave init")
    serve_site(folder)


def serve_chunks(images: Path, /, *, key: Path, certificate: Path, listen: str = "127.0.0.1:8473") -> None:
    """Run the chunk server alone, until Ctrl-C: for a machine that has the image folder and no service. `repave serve` starts its own.

    Parameters
    ----------
    images
        The image store (images_dir), or a copy of it.
    key
        The site's chunks.key, which lies beside its key file.
    certificate
        A PEM file with certificate chain and key by the site's CA: the site's chunks.pem, in its data_dir.
    listen
        HOST:PORT.
    """
    import socket

    from repave.config import split_listen
    from repave.images.chunk_server import serve_chunks

    host, port = split_listen(listen)
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048) as listener:
            say(f"Serving the chunks of {images} on {listen}.")
            serve_chunks(listener, images, key, certificate)
    except OSError as error:
        raise Usage(f"{error}.") from None


def show_overview() -> None:
    """State and the next command, in a few lines."""
    from repave.cli.client import Client

    client = Client()
    try:
        servers, images, batches = client.items("/servers"), client.items("/images"), client.items("/batches", limit=5)
    except RepaveError as error:
        if error.slug == "service-unreachable":
            show(f"No service at {client.endpoint.url}.")
            show("Try it here, nothing to configure:  repave rack up 2\nRun it for real servers:            repave init && repave serve")
        else:
            show(f"{client.endpoint.url}: {error.problem.title} {error.detail}\nNext:  {error.problem.do}")
        return
    states = [s["instance"]["state"] for s in servers]
    counts = " · ".join(f"{states.count(state)} {state}" for state in ("running", "pending", "error") if state in states)
    show(f"{client.endpoint.url}   {count(len(servers), 'server')}{': ' + counts if counts else ''} · {count(len(images), 'image')}")
    live = [b for b in batches if b["state"] == "working"]
    for batch in live[:3]:  # with the first and the last line it stays a few
        show(f"Working: batch {batch['id']} · {batch['image'] or 'current image'} · {batch['counts']['working']} of {sum(batch['counts'].values())}")
    if live:
        show("Next:  repave watch")
    elif not servers:
        show("Next:  repave server add NAME --bmc https://ADDRESS --user USER      or: repave rack up 2")
    elif not images:
        show("Next:  repave image import FILE")
    else:
        # Those that can be reinstalled with this image, named: the line works when pasted.
        image = next((i for i in reversed(images) if i["os_type"] == "Linux"), images[-1])
        fit = [s["name"] for s in servers if (s["arch"], s["boot"], s["instance"]["os_type"]) == (image["arch"], image["boot"], image["os_type"])]
        show(f"Next:  repave reinstall '{fold(fit or [s['name'] for s in servers])}' --image {image['name']} --plan-only")


def whoami(*, json: AsJson = False) -> None:
    """Which key this is, and what it may do."""
    from repave.cli.client import Client

    me = Client().get("/whoami")
    if json:
        show_json(me)
    else:
        show(f"{me['name']} · {me['role']} of project {me['project']} ({me['project_id']})")


def explain(code: str | None = None, /, *, form: Form = TABLE) -> None:
    """What an error code means: cause, what to do, what was left untouched. Without a code: all of them.

    Parameters
    ----------
    code
        Repave.2110, 2110, boot_override_ignored, or one of CloudDC's as its SDK shows it: iMetal.0201 (with --json: a list).
    """
    if code is None:
        rows = [{"code": p.code, "class": p.slug, "title": p.title} for p in CATALOGUE.values()]
        show_list(rows, {"CODE": "code", "CLASS": "class", "TITLE": "title"}, form)
        return
    wanted = code.lower().removeprefix("repave.")
    clouddc = next((name for name in CLOUDDC if name.lower() == wanted), None)
    found = [p for p in CATALOGUE.values() if wanted in (p.slug, p.code.removeprefix("Repave.")) or p.slug in CLOUDDC.get(clouddc or "", ())]
    if not found:
        raise Usage(f"{code!r} is no code of ours; repave explain lists them.")
    if form.is_json:
        shown = [RepaveError(p.slug).as_json() for p in found]
        show_json({"items": shown, "next": None} if clouddc else shown[0])
        return
    if clouddc:
        show(f"{clouddc} is CloudDC's code; in ours it is{' one of' if len(found) > 1 else ''}:")
    for p in found:
        again = "yes" if p.retryable else "not before something has changed"
        show(f"{p.code}  {p.slug}  {p.title}\nWho        {p.who.value} · worth trying again: {again}")
        show(f"Why        {p.cause}\nDo         {p.do}\nUntouched  {p.untouched}")


# ---- projects and keys ----


@project.command(name="add")
def add_project(name: str, /, *, json: AsJson = False) -> None:
    """Add a project."""
    from repave.cli.client import Client

    made = Client().post("/projects", {"name": name})
    if json:
        show_json(made)
    else:
        show(f"{made['name']}  {made['id']}")
        say(f"Next: repave key add NAME --role operator --project {name}")


@project.command(name="ls")
def list_projects(*, form: Form = TABLE) -> None:
    """List projects."""
    from repave.cli.client import Client

    show_list(Client().items("/projects"), {"NAME": "name", "ID": "id"}, form)


@key.command(name="add")
def add_key(
    name: str,
    /,
    *,
    role: Literal["viewer", "operator", "admin"] = "viewer",
    expires: str | None = None,
    project: Project = None,
    json: AsJson = False,
) -> None:
    """Add a key. AK, SK and token are printed this once.

    Parameters
    ----------
    expires
        A number of days (30d), or a time (2027-01-31T00:00:00Z). Default: never.
    """
    from repave.cli.client import Client

    made = Client(project).post("/keys", {"name": name, "role": role, "expires_at": _expiry(expires)})
    if json:
        show_json(made)
    else:
        show("\n".join(f"{what:10} {made[what]}" for what in ("id", "project_id", "role", "expires_at", "ak", "sk", "token")))
        say("SK and token are shown this once.")


def _expiry(text: str | None) -> str | None:
    try:
        if text and text.endswith("d"):
            return (datetime.now(UTC) + timedelta(days=int(text[:-1]))).isoformat()
        return datetime.fromisoformat(text).astimezone(UTC).isoformat() if text else None
    except ValueError:
        raise Usage(f"--expires {text!r}: write it as 30d or 2027-01-31T00:00:00Z.") from None


@key.command(name="ls")
def list_keys(*, project: Project = None, form: Form = TABLE) -> None:
    """List the keys of a project."""
    from repave.cli.client import Client

    columns = {"NAME": "name", "ROLE": "role", "AK": "ak", "EXPIRES": "expires_at", "ID": "id"}
    show_list(Client(project).items("/keys"), columns, form)


@key.command(name="rm")
def remove_key(key: Annotated[str, Parameter(help="Its name, id or AK (repave key ls).")], /, *, project: Project = None) -> None:
    """Remove a key: its token and signatures are refused from now on."""
    from repave.cli.client import Client

    client = Client(project)
    found = [k for k in client.items("/keys") if key in (k["name"], k["id"], k["ak"])]
    if len(found) > 1:
        raise Usage(f"{len(found)} keys are named {key!r}; name one by its id: {', '.join(k['id'] for k in found)}.")
    client.delete(f"/keys/{found[0]['id'] if found else key}")
    say("Key removed.")
