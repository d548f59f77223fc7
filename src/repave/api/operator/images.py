"""/repave/v1/images: import, list, show, verify, remove; /repave/v1/imports: those under way in this process.

The body of POST is the file itself, or JSON that says where it is. What comes over a network is hashed while it goes to a temporary file in the image
store's folder, and that file is gone whatever happens next: a broken upload, a refused or an imported image.
"""

import contextlib
import errno
import hashlib
import io
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import anyio
from fastapi import APIRouter, Header, Query, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from repave.api.body import MAX_BODY_BYTES
from repave.api.operator.answers import After, Json, Limit, ProblemRoute, cut_page, must_exist, one_more, render_list
from repave.api.operator.desk import ImportProgress
from repave.api.operator.scope import Operator, Scope, Viewer
from repave.domain.model import Image
from repave.errors import ImageError, RequestError
from repave.images.fetch import MOST_SIGNATURE_BYTES, fetch, hash_file, open_beneath, verify_signature
from repave.images.headers import FileState, read_file_state
from repave.store import new_id

router = APIRouter(route_class=ProblemRoute, prefix="/images")
imports = APIRouter(route_class=ProblemRoute, prefix="/imports")
_LIMIT = anyio.CapacityLimiter(4)  # imports that fetch or store; the others wait, and not in the threads that answer all else
_PIECE_BYTES = 1 << 20  # written and hashed at once, in a thread: fewer hops, and the event loop stays free


def get_image(scope: Scope, reference: str) -> Image:
    """By id or name, in this project only."""
    return must_exist(next((i for i in scope.store.images.list_images(scope.project_id) if reference in (i.id, i.name)), None), "image", reference)


@router.get("")
def list_images(scope: Viewer, after: After = None, limit: Limit = None) -> Json:
    """In the order of their names."""
    found, following = cut_page(scope.store.images.list_images(scope.project_id, after=after, limit=one_more(limit)), limit, lambda i: i.name)
    return render_list([asdict(i) for i in found], following)


@router.get("/{reference}")
def show_image(scope: Viewer, reference: str) -> Json:
    image = get_image(scope, reference)
    names = {s.id: s.name for s in scope.store.servers.list_servers(scope.project_id)[0]}
    instances, _ = scope.store.servers.list_instances(scope.project_id)
    return asdict(image) | {"servers": sorted(names[i.server_id] for i in instances if i.image_id == image.id)}


class Source(BaseModel):
    """Where an image is that is not in the body."""

    model_config = ConfigDict(extra="forbid")

    path: str | None = Field(None, min_length=1, max_length=1000)
    url: str | None = Field(None, min_length=1, max_length=2000)
    sha256: str | None = Field(None, pattern="^[0-9a-fA-F]{64}$")
    signature_url: str | None = Field(None, min_length=1, max_length=2000)

    @model_validator(mode="after")
    def _one(self) -> "Source":
        if (self.path is None) is (self.url is None):
            raise ValueError("must have path or url")
        if self.url and not (self.sha256 or self.signature_url):
            raise ValueError("a url needs its sha256 or signature_url")
        if self.path and self.signature_url:
            raise ValueError("signature_url goes with url")
        return self


class ImportBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    source: Source


@dataclass(frozen=True)
class _Wanted:
    """What the image is to be."""

    scope: Scope
    name: str
    os_type: str
    arch: str


@imports.get("")
def list_imports(scope: Viewer) -> Json:
    """Those of this project that are under way in the process that was asked. `total_bytes` 0: not known."""
    return render_list([asdict(i) for i in list(scope.desk.imports) if i.project_id == scope.project_id])


@router.post("", status_code=201)
async def add_image(
    scope: Operator,
    request: Request,
    name: Annotated[str, Query(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")],
    os_type: Literal["Linux", "Windows"] = "Linux",
    arch: Literal["amd64", "arm64"] = "amd64",
    x_repave_sha256: Annotated[str | None, Header(pattern="^[0-9a-fA-F]{64}$")] = None,
) -> Json:
    """The image is in the store; or nothing of it is."""
    wanted = _Wanted(scope, name, os_type, arch)
    announced_bytes = int(request.headers.get("content-length") or 0)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
        source = _parse_source(await _read_small(request))
        with _under_way(wanted) as progress:
            return await anyio.to_thread.run_sync(_import_path if source.path else _import_url, wanted, source, progress, limiter=_LIMIT)
    with _under_way(wanted) as progress:
        file, room_bytes = await run_in_threadpool(_make_room, scope, name, announced_bytes)
        try:
            try:
                sha256 = await _receive(request.stream(), file, room_bytes, lambda done: progress.tell(done, announced_bytes))
            except ClientDisconnect:
                raise ImageError("image-refused", "The upload broke off.") from None
            except OSError as error:  # whoever else writes to this disk was faster
                raise _full(error) from None
            _compare(sha256, x_repave_sha256)
            return await anyio.to_thread.run_sync(_store_image, wanted, file, progress, limiter=_LIMIT)
        finally:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def _under_way(wanted: _Wanted) -> Iterator[ImportProgress]:
    """The import is listed while it lasts."""
    desk = wanted.scope.desk
    progress = ImportProgress(wanted.scope.project_id, wanted.name, wanted.scope.store.now())
    desk.imports.append(progress)
    try:
        yield progress
    finally:
        desk.imports[:] = [i for i in desk.imports if i is not progress]


async def _read_small(request: Request) -> bytes:
    body = b""
    async for data in request.stream():
        body += data
        if len(body) > MAX_BODY_BYTES:
            raise RequestError("bad-request", "A JSON body says where the image is, in a few words.", field="body")
    return body


def _parse_source(body: bytes) -> Source:
    try:
        return ImportBody.model_validate_json(body).source
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "body"
        raise RequestError("bad-request", f"{field}: {first['msg'].removeprefix('Value error, ')}.", field=field) from None


def _import_path(wanted: _Wanted, source: Source, progress: ImportProgress) -> Json:
    scope = wanted.scope
    _refuse_taken(scope, wanted.name)
    folder = scope.desk.images.sources.folder
    if folder is None or source.path is None:
        raise RequestError("not-allowed", "No folder of this machine may be imported from: set import_dir.", field="source.path")
    fd = open_beneath(folder, source.path)
    try:
        since = read_file_state(fd)
        if source.sha256:
            progress.begin("check")
            _compare(hash_file(fd), source.sha256)
        return _store_image(wanted, fd, progress, since=since)
    finally:
        os.close(fd)


def _import_url(wanted: _Wanted, source: Source, progress: ImportProgress) -> Json:
    scope, sources = wanted.scope, wanted.scope.desk.images.sources
    if source.signature_url and sources.keyring is None:
        raise RequestError("not-allowed", "No keys are known that may sign an image: set import_keyring.", field="source.signature_url")
    file, room_bytes = _make_room(scope, wanted.name, 0)
    try:
        progress.begin("fetch")
        try:
            with file.open("wb") as out:
                sha256 = fetch(source.url or "", out, most_bytes=room_bytes, local_addresses=sources.local_addresses, progress=_until_over(scope, progress))
        except OSError as error:
            raise _full(error) from None
        progress.begin("check")
        _compare(sha256, source.sha256)
        if source.signature_url and sources.keyring:
            signature = io.BytesIO()
            fetch(source.signature_url, signature, most_bytes=MOST_SIGNATURE_BYTES, local_addresses=sources.local_addresses)
            verify_signature(file, signature.getvalue(), sources.keyring)
        return _store_image(wanted, file, progress)
    finally:
        file.unlink(missing_ok=True)


def _until_over(scope: Scope, progress: ImportProgress) -> Callable[[int, int], None]:
    """Tells how far it is, and ends the import where the service ends: a fetch may take hours, and its thread would keep the process."""

    def tell(done: int, total: int) -> None:
        scope.desk.images.refuse_over()
        progress.tell(done, total)

    return tell


def _compare(sha256: str, wanted: str | None) -> None:
    if wanted and sha256 != wanted.lower():
        raise ImageError("image-refused", f"Its SHA-256 is {sha256}, not the one announced.")


def _full(error: OSError) -> Exception:
    return ImageError("image-quota", "The disk of the image store is full.") if error.errno in (errno.ENOSPC, errno.EDQUOT) else error


def _refuse_taken(scope: Scope, name: str) -> None:
    if any(i.name == name for i in scope.store.images.list_images(scope.project_id)):
        raise RequestError("conflict", f"An image {name!r} exists already.", field="name")
    if sum((i.project_id, i.name) == (scope.project_id, name) for i in scope.desk.imports) > 1:
        raise RequestError("conflict", f"An image {name!r} is being imported.", field="name")


def _make_room(scope: Scope, name: str, announced_bytes: int) -> tuple[Path, int]:
    """An empty file to receive into, and how long it may become. Uploads of a service that died are gone."""
    _refuse_taken(scope, name)
    images = scope.desk.images
    room_bytes = images.room_bytes()
    if announced_bytes > room_bytes:
        raise ImageError("image-quota", f"The file has {announced_bytes} bytes, there is room for {max(0, room_bytes)}.")
    folder = images.folder / "uploads"  # not the store's tmp/: that is emptied by whoever holds its lock
    folder.mkdir(exist_ok=True)
    handle, path = tempfile.mkstemp(dir=folder)
    os.close(handle)
    return Path(path), room_bytes


async def _receive(stream: AsyncIterator[bytes], file: Path, room_bytes: int, progress: Callable[[int], None]) -> str:
    """The body is in the file; returns its SHA-256. Raises ClientDisconnect when the client goes away."""
    digest, received, pending = hashlib.sha256(), 0, bytearray()
    with file.open("wb", buffering=0) as out:

        def put(piece: bytes) -> None:
            digest.update(piece)
            view = memoryview(piece)
            while view:
                view = view[out.write(view) :]

        async for data in stream:
            received += len(data)
            if received > room_bytes:
                raise ImageError("image-quota", f"There is room for {room_bytes} bytes.")
            pending += data
            if len(pending) >= _PIECE_BYTES:
                await run_in_threadpool(put, bytes(pending))
                pending.clear()
                progress(received)
        await run_in_threadpool(put, bytes(pending))
    if not received:
        raise ImageError("image-refused", "The body is empty; it must be the image file.")
    return digest.hexdigest()


def _store_image(wanted: _Wanted, file: Path | int, progress: ImportProgress, *, since: FileState | None = None) -> Json:
    scope, store, images = wanted.scope, wanted.scope.store, wanted.scope.desk.images
    progress.begin("wait")
    with images.alone():
        progress.begin("store")
        images.sweep(_manifests_in_use(scope))  # one whose import died before its row was there
        image = images.add(
            file, name=wanted.name, os_type=wanted.os_type, arch=wanted.arch, project_id=scope.project_id, image_id=new_id(), created_at=store.now(),
            progress=_until_over(scope, progress), since=since,
        )  # fmt: skip
        try:
            store.images.add_image(image, actor=scope.actor)
        except RequestError:  # the name was taken meanwhile
            images.sweep(_manifests_in_use(scope))
            raise
    return asdict(image)


def _manifests_in_use(scope: Scope) -> list[str]:
    return [i.manifest_sha256 for p in scope.store.access.list_projects() for i in scope.store.images.list_images(p.id)]


@router.post("/{reference}/verify")
def verify_image(scope: Operator, reference: str) -> Json:
    """Every chunk is read and has its digest, and nobody doubts the image any more; 422 image-damaged otherwise. Takes 0.8 s per GB stored."""
    image = get_image(scope, reference)
    try:
        scope.desk.images.verify(image.manifest_sha256)
    except ImageError as error:
        scope.store.images.record_damage(image, str(error))
        raise
    scope.store.images.record_whole(image)
    return asdict(get_image(scope, reference))


@router.delete("/{reference}", status_code=204)
def remove_image(scope: Operator, reference: str) -> None:
    """Chunks that no other image has are removed too. Refused while a live run needs the image. Blocks while an import runs."""
    with scope.desk.images.alone():
        scope.desk.images.sweep(scope.store.images.remove_image(get_image(scope, reference), actor=scope.actor))
