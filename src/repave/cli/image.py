"""Images: import streams the file to the service; ls, show, rm. pack needs no service."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Literal

from cyclopts import App

from repave.cli.client import Client
from repave.cli.output import Usage, confirm, count, may_redraw, say, show, show_fields, show_json, show_list, size
from repave.errors import RequestError

app = App(name="image")
_SAY_EVERY_S = 10.0
_LIST = {
    "NAME": "name", "OS": "os_type", "ARCH": "arch", "BOOT": "boot", "SECTOR": "sector_bytes", "SIZE": "size", "DATA": "data", "STORED": "stored", "ID": "id",
}  # fmt: skip


class _Counted:
    """A file that reports how much of it was read: what `requests` wants of a body, no more (it would call a `tell`)."""

    def __init__(self, file: IO[bytes], total: int, report: Callable[[int], None]) -> None:
        self.file, self.total, self.report, self.sent = file, total, report, 0

    def __len__(self) -> int:
        return self.total

    def read(self, count: int = -1) -> bytes:
        piece = self.file.read(min(count, 1 << 20) if count > 0 else 1 << 20)
        self.sent += len(piece)
        self.report(self.sent)
        return piece


@app.command(name="import")
def send_image(
    file: Path,
    /,
    *,
    name: str | None = None,
    os_type: Literal["Linux", "Windows"] = "Linux",
    arch: Literal["amd64", "arm64"] = "amd64",
    sha256: str | None = None,
    project: str | None = None,
    json: bool = False,
) -> None:
    """Send a qcow2 or raw disk image to the service, which checks it and stores it in pieces.

    Parameters
    ----------
    name
        Its name; default: the file's, without suffix.
    arch
        What it runs on; a server of another architecture refuses it. One without an EFI system partition is for BIOS alone, and refused by UEFI servers.
    sha256
        Its SHA-256, or a file of `sha256sum` lines: what arrives must have it.
    """
    if not file.is_file():
        raise Usage(f"There is no file {file}.")
    name, total = name or re.sub(r"\.(qcow2|raw|img)$", "", file.name), file.stat().st_size
    headers = {"X-Repave-SHA256": _digest(sha256, file)} if sha256 else {}
    client = Client(project)
    if any(image["name"] == name for image in client.items("/images")):  # said before gigabytes are sent
        raise RequestError("conflict", f"An image {name!r} exists already.")
    with file.open("rb") as f, _telling("send", file.name, total) as report:
        made = client.upload("/images", _Counted(f, total, report), {"name": name, "os_type": os_type, "arch": arch}, headers)
    if json:
        show_json(made)
        return
    told = f"{size(made['size_bytes'])}, {size(made['data_bytes'])} of it data · {size(made['stored_bytes'])} stored"
    fits = f"{made['sector_bytes']}-byte sectors, {made['arch']}/{made['boot']}"
    say(f"{made['name']} ({made['id']}) · {told} · {fits}")
    say(f"Next: repave reinstall NODESET --image {made['name']}")


@app.command(name="pack")
def pack_image(file: Path, folder: Path, /, *, arch: Literal["amd64", "arm64"] = "amd64", json: bool = False) -> None:
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


@contextlib.contextmanager
def _telling(verb: str, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Called with the bytes done so far: a bar with rate and time left, or a line now and then where nothing redraws."""
    if may_redraw():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(f"{verb} {label}", total=total)

            def redraw(sent: int) -> None:
                progress.update(task, completed=sent, description=f"store {label}" if sent >= total else f"{verb} {label}")

            yield redraw
        return
    began = said = time.monotonic()

    def line(sent: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= _SAY_EVERY_S:
            said, rate = now, sent / (now - began)
            left = f"{(total - sent) / rate:.0f} s left" if sent < total else "storing"
            say(f"{verb} {label} {100 * sent // total} % {size(rate)}/s {left}")

    yield line


def _readable(image: dict[str, object]) -> dict[str, object]:
    return image | {short: size(float(str(image[f"{short}_bytes"]))) for short in ("size", "data", "stored")}


@app.command(name="ls")
def list_images(*, project: str | None = None, json: bool = False) -> None:
    """List images."""
    items = Client(project).items("/images")
    show_list(items if json else [_readable(i) for i in items], _LIST, as_json=json)


@app.command(name="show")
def show_image(image: str, /, *, project: str | None = None, json: bool = False) -> None:
    """One image (name or id) and the servers that run it."""
    found = Client(project).get(f"/images/{image}")
    if json:
        show_json(found)
    else:
        show_fields(found | {f"{name}_bytes": f"{found[f'{name}_bytes']} ({size(found[f'{name}_bytes'])})" for name in ("size", "data", "stored")})


@app.command(name="verify")
def verify_image(image: str, /, *, project: str | None = None, json: bool = False) -> None:
    """Read every piece of an image (name or id) and compare it with its digest. What a run found damaged is trusted again where all are right."""
    client = Client(project)
    found = client.post(f"/images/{image}/verify", {})
    if json:
        show_json(found)
    else:
        show(f"{found['name']} is whole: {size(found['stored_bytes'])} read, every piece has its digest.")


@app.command(name="rm")
def remove_image(image: str, /, *, yes: bool = False, project: str | None = None) -> None:
    """Remove an image (name or id), and the pieces that no other has."""
    client = Client(project)
    found = client.get(f"/images/{image}")
    confirm(f"Remove {found['name']}, which runs on {count(len(found['servers']), 'server')}? [y/N] ", "y", yes=yes)
    client.delete(f"/images/{found['id']}")
    say(f"{found['name']} removed.")
