"""What belongs to this database: the key file, the CA. A service with others is refused before it does anything."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from repave.errors import RepaveError, RunFailed
from repave.store.database import Database
from repave.store.tables import CREDENTIALS, MARKS

_SAID = "repave"


class Marks:
    """Each is set once, by the first that opens the database."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def check_key(self) -> None:
        """The sealer opens what is in this database. Raises RepaveError not-this-site."""
        sealer = self._db.sealer
        try:
            old = self._db.row(sa.select(CREDENTIALS.c.id, CREDENTIALS.c.sk_sealed).limit(1))
            if old is not None:
                sealer.unseal(old["sk_sealed"], about=f"sk:{old['id']}")
            sealer.unseal(self._hold("key", sealer.seal(_SAID, about="mark:key")), about="mark:key")
        except RunFailed:
            raise RepaveError("not-this-site", "The key file is not the one that this database's secrets are sealed with.") from None

    def check_ca(self, sha256: str) -> None:
        """Machines that were given media by any worker trust this one. Raises RepaveError not-this-site."""
        if self._hold("ca", sha256) != sha256:
            raise RepaveError("not-this-site", "The CA (ca.pem beside the key file) is not the one that this database was begun with.")

    def _hold(self, name: str, value: str) -> str:
        """The mark's value: `value` where there was none."""
        query = sa.select(MARKS.c.value).where(MARKS.c.name == name)
        if self._db.row(query) is None:
            try:
                with self._db.write() as conn:
                    conn.execute(sa.insert(MARKS).values(name=name, value=value))
            except IntegrityError:  # another process was first
                pass
        found = self._db.row(query)
        assert found is not None
        return str(found["value"])
