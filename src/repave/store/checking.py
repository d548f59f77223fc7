"""Is a database whole, and its audit as it was written? Looks, and changes nothing."""

from __future__ import annotations

from repave.errors import RepaveError
from repave.secrets import Sealer
from repave.store.chain import Checked, check_chain
from repave.store.database import open_engine
from repave.store.migrations import is_newest
from repave.store.stand import check_file


def check_database(url: str, sealer: Sealer) -> Checked:
    """Reads every event once. Raises RepaveError database-corrupt, audit-broken, or conflict where the tables are of another version."""
    check_file(url)
    engine = open_engine(url)
    try:
        with engine.connect() as conn:
            if not is_newest(conn):
                raise RepaveError("conflict", "The tables are of another version of Repave: start the service of this one once, then check.")
            return check_chain(conn, sealer)
    finally:
        engine.dispose()
