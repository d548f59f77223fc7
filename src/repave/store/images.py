"""The catalogue of images; their bytes are images/store.py's."""

from __future__ import annotations

from dataclasses import asdict

import sqlalchemy as sa

from repave.domain.model import Image
from repave.errors import RequestError
from repave.store import rows
from repave.store.database import Database, page_of
from repave.store.tables import IMAGES, RUNS, SERVERS

_BY_ID = sa.select(IMAGES).where(IMAGES.c.project_id == sa.bindparam("project"), IMAGES.c.id == sa.bindparam("image"))  # made once: see database.py


def doubt_image(db: Database, conn: sa.Connection, image_id: str, cause: str) -> None:
    """From now on every run looks at all of the image's chunks before it crosses the line, until one finds them right."""
    doubted = sa.update(IMAGES).where(IMAGES.c.id == image_id).values(doubted_at=db.now()).returning(IMAGES.c.project_id, IMAGES.c.name)
    if (row := conn.execute(doubted).first()) is not None:
        db.event(conn, "image.doubted", row.project_id, image=image_id, name=row.name, cause=cause)


class Images:
    """What can be written."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add_image(self, image: Image, *, actor: str = "repave") -> None:
        with self._db.write() as conn:
            same = sa.and_(IMAGES.c.project_id == image.project_id, IMAGES.c.name == image.name)
            if conn.execute(sa.select(IMAGES.c.id).where(same)).first():
                raise RequestError("conflict", f"An image {image.name!r} exists already.", field="name")
            conn.execute(sa.insert(IMAGES).values(**asdict(image)))
            self._db.event(conn, "image.added", image.project_id, actor=actor, image=image.id, name=image.name)

    def list_images(self, project_id: str, *, after: str | None = None, limit: int | None = None) -> list[Image]:
        """In the order of their names; `after` is one."""
        query = sa.select(IMAGES).where(IMAGES.c.project_id == project_id)
        return [rows.image(r) for r in self._db.rows(page_of(query, IMAGES.c.name, after, limit))]

    def find_image(self, project_id: str, image_id: str) -> Image | None:
        row = self._db.row(_BY_ID, project=project_id, image=image_id)
        return rows.image(row) if row else None

    def record_damage(self, image: Image, cause: str) -> None:
        """Some of its chunks are not right in the store."""
        with self._db.write() as conn:
            doubt_image(self._db, conn, image.id, cause)

    def record_whole(self, image: Image) -> None:
        """All its chunks were right, looked at after it was doubted; a doubt that came since stays."""
        same = sa.and_(IMAGES.c.id == image.id, IMAGES.c.doubted_at == image.doubted_at)
        with self._db.write() as conn:
            if conn.execute(sa.update(IMAGES).where(same).values(doubted_at=None)).rowcount:
                self._db.event(conn, "image.whole", image.project_id, image=image.id, name=image.name)

    def remove_image(self, image: Image, *, actor: str = "repave") -> list[str]:
        """The image is forgotten; returns the manifests still in use. Refused, naming the servers, while live runs need it."""
        with self._db.write() as conn:
            live = sa.and_(RUNS.c.image_id == image.id, RUNS.c.ended_at.is_(None))
            needing = sa.select(SERVERS.c.name).join(RUNS, RUNS.c.server_id == SERVERS.c.id).where(live).order_by(SERVERS.c.name)
            if names := list(conn.execute(needing).scalars()):
                raise RequestError("in-progress", f"Runs that have not ended need this image: {', '.join(names)}.", kind="image")
            conn.execute(sa.delete(IMAGES).where(IMAGES.c.id == image.id))
            self._db.event(conn, "image.removed", image.project_id, actor=actor, image=image.id, name=image.name)
            return list(conn.execute(sa.select(IMAGES.c.manifest_sha256)).scalars())
