"""What was said around a run: the agent's lines, the server's serial console, the talk with its BMC. Nothing is decided by it, so it is no audit.

Each source of a run is one stream; where a character stands in it never changes. A stream that grows too long loses its middle: its beginning and its
end stay, and who reads it sees a mark. It lives as long as its run. Texts come in clean (domain/redaction.py).
"""

from __future__ import annotations

from typing import NamedTuple

import sqlalchemy as sa

from repave.domain.model import Source
from repave.store.database import Database
from repave.store.tables import CONSOLES, RUNS, SERVERS

HEAD_CHARS, TAIL_CHARS = 64 * 1024, 192 * 1024  # of each stream; a Linux boot says 30,000 to 60,000 characters
PART_CHARS = 64 * 1024

_OF = sa.and_(CONSOLES.c.run_id == sa.bindparam("run_id"), CONSOLES.c.source == sa.bindparam("source"))
_LAST = sa.select(CONSOLES).where(_OF).order_by(CONSOLES.c.part.desc()).limit(1)
_NEW = sa.insert(CONSOLES)
_MIDDLE = sa.delete(CONSOLES).where(
    CONSOLES.c.run_id == sa.bindparam("b_run"), CONSOLES.c.source == sa.bindparam("b_source"), CONSOLES.c.at >= HEAD_CHARS,
    CONSOLES.c.at + CONSOLES.c.chars <= sa.bindparam("b_until"),
)  # fmt: skip
_PARTS = sa.select(CONSOLES).where(_OF, CONSOLES.c.at + CONSOLES.c.chars > sa.bindparam("after")).order_by(CONSOLES.c.part)
_FOLLOWED = (
    sa.select(RUNS.c.id, SERVERS.c.name)
    .join(SERVERS, SERVERS.c.id == RUNS.c.server_id)
    .where(RUNS.c.ended_at.is_(None), RUNS.c.id.in_(sa.select(CONSOLES.c.run_id).where(CONSOLES.c.source == Source.SERIAL.value)))
)


class Stretch(NamedTuple):
    """`next_at`: where the stream goes on; the same as was asked for when nothing is new."""

    text: str
    next_at: int


class Consoles:
    """Streams of text, by run and source."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def begin(self, run_id: str, source: Source, *, read_to: int) -> None:
        """The stream is there; what it is read from is read from `read_to` on. One that is there stays as it is."""
        with self._db.write() as conn:
            if conn.execute(_LAST, {"run_id": run_id, "source": source.value}).first() is None:
                conn.execute(_NEW, _part(run_id, source, 0, 0, "", read_to))

    def append(self, run_id: str, source: Source, text: str, *, read_from: int | None = None, read_to: int | None = None) -> bool:
        """The stream has grown by `text`. False: `read_from` is not where it was read to, so somebody else has appended it.

        Repeatable: without `read_from`, a text that is the stream's last one already is not appended again.
        """
        of = {"run_id": run_id, "source": source.value}
        with self._db.write() as conn:
            last = conn.execute(_LAST, of).first()
            if read_from is not None and (last is None or last.read_to != read_from):
                return False
            if read_from is None and last is not None and last.text == text:
                return True
            part, at = (last.part + 1, last.at + last.chars) if last is not None else (0, 0)
            pieces = [text[n : n + PART_CHARS] for n in range(0, len(text), PART_CHARS)] or [""]
            for n, piece in enumerate(pieces):
                conn.execute(_NEW, _part(run_id, source, part + n, at, piece, read_to))
                at += len(piece)
            if at > HEAD_CHARS + TAIL_CHARS:
                conn.execute(_MIDDLE, {"b_run": run_id, "b_source": source.value, "b_until": at - TAIL_CHARS})
        return True

    def find_read_to(self, run_id: str, source: Source) -> int | None:
        last = self._db.row(_LAST, run_id=run_id, source=source.value)
        return None if last is None else last["read_to"]

    def find_end(self, run_id: str, source: Source) -> int:
        """How many characters the stream has had in all."""
        last = self._db.row(_LAST, run_id=run_id, source=source.value)
        return 0 if last is None else last["at"] + last["chars"]

    def has(self, run_id: str, source: Source) -> bool:
        return self._db.row(_LAST, run_id=run_id, source=source.value) is not None

    def read(self, run_id: str, source: Source, *, after: int = 0, most: int = PART_CHARS) -> Stretch:
        """About `most` characters of the stream from `after` on. What was left out of its middle is a mark, and counts as if it were there."""
        text, at = [], after
        for row in self._db.rows(_PARTS, run_id=run_id, source=source.value, after=after):
            if row["at"] > at:
                text.append(f"\n[… {row['at'] - at} characters of the middle were left out …]\n")
                at = row["at"]
            piece = row["text"][at - row["at"] :]
            text.append(piece)
            at += len(piece)
            if at - after >= most:
                break
        return Stretch("".join(text), at)

    def list_followed(self) -> list[tuple[str, str]]:
        """Live runs whose serial stream has begun, with their servers' names."""
        return [(r["id"], r["name"]) for r in self._db.rows(_FOLLOWED)]


def _part(run_id: str, source: Source, part: int, at: int, text: str, read_to: int | None) -> dict[str, object]:
    return {"run_id": run_id, "source": source.value, "part": part, "at": at, "chars": len(text), "text": text, "read_to": read_to}
