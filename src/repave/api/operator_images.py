"""/repave/v1/images: a file streamed in, list, show, remove.

The body of POST is the file itself. It is hashed while it goes to a temporary file in the image store's folder, and that file is gone
whatever happens next: a broken upload, a refused or an imported image.
"""

import errno
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from repave.api.operator import Json, Operator, ProblemRoute, Scope, Viewer, render_list
from repave.domain.model import Image
from repave.errors import ImageError, RequestError
from repave.store import new_id

router = APIRouter(route_class=ProblemRoute, prefix="/images")
_PIECE_BYTES = 1 << 20  # written and hashed at once, in a thread: fewer hops, and the event loop stays free


def get_image(scope: Scope, reference: str) -> Image:
    """By id or name, in this project only."""
    for image in scope.store.images.list_images(scope.project_id):
        if reference in (image.id, image.name):
            return image
    raise RequestError("not-found", f"There is no image {reference!r} in this project.", kind="image")


@router.get("")
def list_images(scope: Viewer) -> Json:
    return render_list([asdict(i) for i in scope.store.images.list_images(scope.project_id)])


@router.get("/{reference}")
def show_image(scope: Viewer, reference: str) -> Json:
    image = get_image(scope, reference)
    names = {s.id: s.name for s in scope.store.servers.list_servers(scope.project_id)[0]}
    instances, _ = scope.store.servers.list_instances(scope.project_id)
    return asdict(image) | {"servers": sorted(names[i.server_id] for i in instances if i.image_id == image.id)}


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
    file, room_bytes = await run_in_threadpool(_make_room, scope, name, int(request.headers.get("content-length") or 0))
    try:
        try:
            sha256 = await _receive(request.stream(), file, room_bytes)
        except ClientDisconnect:
            raise ImageError("image-refused", "The upload broke off.") from None
        except OSError as error:  # whoever else writes to this disk was faster
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ImageError("image-quota", "The disk of the image store is full.") from None
        if x_repave_sha256 and sha256 != x_repave_sha256.lower():
            raise ImageError("image-refused", f"Its SHA-256 is {sha256}, not the one announced.")
        return await run_in_threadpool(_store_image, scope, file, name=name, os_type=os_type, arch=arch)
    finally:
        file.unlink(missing_ok=True)


def _make_room(scope: Scope, name: str, announced_bytes: int) -> tuple[Path, int]:
    """An empty file to receive into, and how long it may become. Uploads of a service that died are gone."""
    if any(i.name == name for i in scope.store.images.list_images(scope.project_id)):
        raise RequestError("conflict", f"An image {name!r} exists already.", field="name")
    images = scope.desk.images
    room_bytes = images.room_bytes()
    if announced_bytes > room_bytes:
        raise ImageError("image-quota", f"The file has {announced_bytes} bytes, there is room for {max(0, room_bytes)}.")
    folder = images.folder / "uploads"  # not the store's tmp/: that is emptied by whoever holds its lock
    folder.mkdir(exist_ok=True)
    handle, path = tempfile.mkstemp(dir=folder)
    os.close(handle)
    return Path(path), room_bytes


async def _receive(stream: AsyncIterator[bytes], file: Path, room_bytes: int) -> str:
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
        await run_in_threadpool(put, bytes(pending))
    if not received:
        raise ImageError("image-refused", "The body is empty; it must be the image file.")
    return digest.hexdigest()


def _store_image(scope: Scope, file: Path, *, name: str, os_type: str, arch: str) -> Json:
    store, images = scope.store, scope.desk.images
    with scope.desk.images_lock:
        image = images.add(file, name=name, os_type=os_type, arch=arch, project_id=scope.project_id, image_id=new_id(), created_at=store.now())
        try:
            store.images.add_image(image, actor=scope.actor)
        except RequestError:  # the name was taken meanwhile
            images.sweep([i.manifest_sha256 for p in store.access.list_projects() for i in store.images.list_images(p.id)])
            raise
    return asdict(image)


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
    with scope.desk.images_lock:
        scope.desk.images.sweep(scope.store.images.remove_image(get_image(scope, reference), actor=scope.actor))
