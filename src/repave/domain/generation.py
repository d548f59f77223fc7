"""Is this database the newest state of its site, or an older one that was put back?

A site's stand is kept twice: in the database, and in a file beside the key file, which no copy of the database carries. It grows with
every start, every restore and every audited fact. The database is always written first, so a crash between the two leaves it ahead; only
NOTHING, the file of a site that begins, is there before the database has a stand.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Stand:
    """`generation` grows with each start and each restore; `events` is the number of the newest audit row. Compared in this order."""

    generation: int
    events: int


NOTHING = Stand(0, 0)


class Verdict(enum.Enum):
    """What may be done with the database."""

    FIRST = "neither has a stand, or the file has NOTHING: the site begins"
    CURRENT = "the database is as new as the file, or newer"
    OLD = "the file has seen a newer database than this one"
    UNKNOWN = "the database has a stand and the file is gone: nobody can tell how old it is"


def judge(file: Stand | None, database: Stand | None) -> Verdict:
    """OLD and UNKNOWN must not be worked with: a run in it may have ended since, and would power off and wipe its server again."""
    if database is None:
        return Verdict.FIRST if file in (None, NOTHING) else Verdict.OLD
    if file is None:
        return Verdict.UNKNOWN
    return Verdict.CURRENT if database >= file else Verdict.OLD
