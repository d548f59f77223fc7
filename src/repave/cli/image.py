"""Images: import, ls, show, verify, rm; pack needs no service."""

from __future__ import annotations

import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from cyclopts import App

from repave.cli.client import Client
from repave.cli.lists import TABLE, Form, show_list
from repave.cli.options import AsJson, Project, Yes
from repave.cli.output import Exit, Json, Usage, confirm, count, may_redraw, say, show, show_fields, show_json, size
from repave.errors import RepaveError, RequestError

if TYPE_CHECKING:
    from repave.images.store import ImageStore

app = App(name="image")
_SAY_EVERY_S = 10.0
_LOOK_EVERY_S = 0.5
_LIST = {
    "NAME": "name", "OS": "os_type", "ARCH": "arch", "BOOT": "boot", "SECTOR": "sector_bytes", "SIZE": "size", "DATA": "data", "STORED": "stored", "ID": "id",
}  # fmt: skip


@app.command(name="import")
def send_image(
    file: str,
    /,
    *,
    name: str | None = None,
    os_type: Literal["Linux", "Windows"] = "Linux",
    arch: Literal["amd64", "arm64"] = "amd64",
    sha256: str | None = None,
    signature: str | None = None,
    on_service: bool = False,
    project: Project = None,
    json: AsJson = False,
) -> None:
    """Give the service a disk image, which it checks and stores in pieces: a file here, one on its own machine, or an http(s) URL.

    Parameters
    ----------
    file
        A qcow2 or raw disk image (vmdk, vhd and vhdx where `image_formats` allows them).
    name
        Its name; default: the file's, without suffix.
    arch
        What it runs on; a server of another architecture refuses it. One without an EFI system partition is for BIOS alone, and refused by UEFI servers.
    sha256
        Its SHA-256, or a file of `sha256sum` lines: what arrives must have it. A URL needs it, or a signature.
    signature
        URL of its detached OpenPGP signature, by a key in the service's `import_keyring`.
    on_service
        FILE is a path below the service's `import_dir`.
    """
    is_url = file.startswith(("http://", "https://"))
    here = Path(urlsplit(file).path if is_url else file)
    if not is_url and not on_service and not here.is_file():
        raise Usage(f"There is no file {file}.")
    if is_url and not (sha256 or signature):
        raise Usage("A URL needs --sha256 or --signature: what comes must be what was meant.")
    if signature and not is_url:
        raise Usage("--signature goes with a URL.")
    name, digest = name or re.sub(r"\.(qcow2|raw|img|vmdk|vhdx?)$", "", here.name), _digest(sha256, here) if sha256 else None
    client = Client(project)
    if any(image["name"] == name for image in client.items("/images")):  # said before gigabytes are sent
        raise RequestError("conflict", f"An image {name!r} exists already.")
    params = {"name": name, "os_type": os_type, "arch": arch}

    def ask() -> Json:
        if is_url or on_service:
            source = {"url" if is_url else "path": file, "sha256": digest, "signature_url": signature}
            return client.order("/images", {"source": {k: v for k, v in source.items() if v}}, params)
        with here.open("rb") as f:
            return client.upload("/images", f, params, {"X-Repave-SHA256": digest} if digest else {})

    made = _follow_import(ask, Client(project), name)
    if json:
        show_json(made)
        return
    told = f"{size(made['size_bytes'])}, {size(made['data_bytes'])} of it data · {size(made['stored_bytes'])} stored"
    fits = f"{made['sector_bytes']}-byte sectors, {made['arch']}/{made['boot']}"
    say(f"{made['name']} ({made['id']}) · {told} · {fits}")
    say(f"Next: repave reinstall NODESET --image {made['name']}")


def _follow_import(ask: Callable[[], Json], client: Client, name: str) -> Json:
    """The answer of `ask`; meanwhile what the service says of the import is shown. A service that says nothing of it costs the progress alone."""
    answer: queue.SimpleQueue[Json | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            answer.put(ask())
        except Exception as error:  # raised where somebody waits for it
            answer.put(error)

    threading.Thread(target=work, daemon=True).start()  # Ctrl-C does not wait for it
    with ExitStack() as shown:
        stage = ""
        report: Callable[[int], None]
        while True:
            with suppress(queue.Empty):
                came = answer.get(timeout=_LOOK_EVERY_S)
                if isinstance(came, Exception):
                    raise came
                return came
            with suppress(RepaveError):
                for found in client.items("/imports"):
                    if found["name"] == name and found["total_bytes"]:
                        if found["stage"] != stage:
                            shown.close()
                            stage, report = found["stage"], shown.enter_context(_telling(found["stage"], name, found["total_bytes"]))
                        report(found["done_bytes"])


@app.command(name="pack")
def pack_image(file: Path, folder: Path, /, *, arch: Literal["amd64", "arm64"] = "amd64", json: AsJson = False) -> None:
    """Write a disk image's pieces and its manifest into a folder that any web server can serve. Needs no service.

    Parameters
    ----------
    file
        A qcow2 or raw disk image.
    folder
        New, empty, or one that was packed into before: then it holds both images, and what they share once.
    arch
        What it runs on.
    """
    from repave.images.headers import read_header
    from repave.images.importer import import_image
    from repave.images.store import ImageStore

    if not file.is_file():
        raise Usage(f"There is no file {file}.")
    if folder.exists() and not _may_pack_into(folder):
        raise Usage(f"{folder} holds something else than packed images; name a new or an empty folder.")
    total = read_header(file).virtual_size_bytes
    store = ImageStore(folder)
    with _telling("pack", file.name, total) as report:
        made = import_image(file, store, arch=arch, max_bytes=1 << 62, progress=lambda done, total: report(done))
    path = store.manifest_path(made.manifest_sha256)
    if json:
        show_json({"manifest": str(path)} | asdict(made))
    else:
        show_fields({"manifest": str(path), "sha256": made.manifest_sha256})
        say(f"{size(made.size_bytes)}, {size(made.data_bytes)} of it data · {size(made.stored_bytes)} stored, {size(made.added_bytes)} of it new")


def _may_pack_into(folder: Path) -> bool:
    """Nothing of anybody else's is there: packing removes what no manifest names."""
    return folder.is_dir() and ({p.name for p in folder.iterdir()} - {"lock"} in (set(), {"chunks", "manifests", "tmp"}))


def _digest(wanted: str, file: Path) -> str:
    if re.fullmatch("[0-9a-fA-F]{64}", wanted):
        return wanted
    if not Path(wanted).is_file():
        raise Usage(f"--sha256 {wanted}: neither a digest nor a file.")
    for line in Path(wanted).read_text().splitlines():
        digest, _, named = line.partition(" ")
        if named.strip().lstrip("*") == file.name and len(digest) == 64:
            return digest
    raise Usage(f"{wanted} has no line for {file.name}.")


@contextmanager
def _telling(verb: str, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Called with the bytes done so far: a bar with rate and time left, or a line now and then where nothing redraws."""
    if may_redraw():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(f"{verb} {label}", total=total)

            def redraw(done: int) -> None:
                progress.update(task, completed=done)

            yield redraw
        return
    began = said = time.monotonic()

    def line(done: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= _SAY_EVERY_S:
            said, rate = now, max(done / (now - began), 1)
            say(f"{verb} {label} {100 * done // total} % {size(rate)}/s {(total - done) / rate:.0f} s left")

    yield line


def _readable(image: dict[str, object]) -> dict[str, object]:
    return image | {short: size(float(str(image[f"{short}_bytes"]))) for short in ("size", "data", "stored")}


@app.command(name="ls")
def list_images(*, project: Project = None, form: Form = TABLE) -> None:
    """List images."""
    items = Client(project).items("/images")
    show_list(items if form.is_json else [_readable(i) for i in items], _LIST, form)


@app.command(name="show")
def show_image(image: str, /, *, project: Project = None, json: AsJson = False) -> None:
    """One image (name or id) and the servers that run it."""
    found = Client(project).get(f"/images/{image}")
    if json:
        show_json(found)
    else:
        show_fields(found | {f"{name}_bytes": f"{found[f'{name}_bytes']} ({size(found[f'{name}_bytes'])})" for name in ("size", "data", "stored")})


@app.command(name="verify")
def verify_image(image: str, /, *, boot: bool = False, project: Project = None, json: AsJson = False) -> int:
    """Read every piece of an image (name or id) and compare it with its digest. What a run found damaged is trusted again where all are right.

    Parameters
    ----------
    boot
        Then reinstall a machine of the virtual rack with it, and say whether it comes up and proves itself. Only on the service's machine, in its site's
        folder (or REPAVE_SITE); takes a minute and more.
    """
    client = Client(project)
    found = client.post(f"/images/{image}/verify", {})
    if not boot:
        if json:
            show_json(found)
        else:
            show(f"{found['name']} is whole: {size(found['stored_bytes'])} read, every piece has its digest.")
        return Exit.OK
    from repave.lab.boot_check import boot_image, find_hindrance

    if hindrance := find_hindrance(found):
        raise Usage(f"The virtual rack can not boot {found['name']}: {hindrance}.")
    cache = Path(os.environ.get("REPAVE_CACHE", ".repave/cache")).resolve()
    checked = boot_image(_find_store(found["manifest_sha256"]), found["manifest_sha256"], cache=cache, say=say)
    run = checked.run
    if json:
        show_json(found | {"boot": {"proved": checked.is_proved, "error": run["error"], "durations_s": run["durations_s"], "console": checked.console}})
    elif checked.is_proved:
        show(f"{found['name']} is whole, came up and proved itself: {sum(run['durations_s'].values()):.0f} s on a machine of the virtual rack.")
    else:
        why = f"{run['error']['title']} {run['error']['cause']}" if run["error"] else "It did not end in time."
        show(f"{found['name']} is whole, but did not prove itself; it ended at {run['step']}. {why}")
        say(f"The last of its console:\n{checked.console}")
    return Exit.OK if checked.is_proved else Exit.FAILED


def _find_store(manifest_sha256: str) -> ImageStore:
    """The image store of the site here, which must be the one that was asked about."""
    from repave.config import SETTINGS_FILE, load_settings
    from repave.images.store import ImageStore

    for folder in (Path(os.environ.get("REPAVE_SITE", ".")), Path(".repave/site")):
        if (folder / SETTINGS_FILE).is_file() and (images := load_settings(folder).images_dir) and images.is_dir():
            store = ImageStore(images)
            if store.manifest_path(manifest_sha256).is_file():
                return store
    raise Usage("The image's pieces are not here: --boot works on the service's machine, in its site's folder (or REPAVE_SITE).")


@app.command(name="rm")
def remove_image(image: str, /, *, yes: Yes = False, project: Project = None) -> None:
    """Remove an image (name or id), and the pieces that no other has."""
    client = Client(project)
    found = client.get(f"/images/{image}")
    confirm(f"Remove {found['name']}, which runs on {count(len(found['servers']), 'server')}? [y/N] ", "y", yes=yes)
    client.delete(f"/images/{found['id']}")
    say(f"{found['name']} removed.")
