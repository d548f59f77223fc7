"""db: the site's database as a whole. Works on the folder, not on the service, which must be stopped."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from repave.cli.output import Usage, count, say, show, show_json
from repave.cli.site import _site_folder

app = App(name="db")


@app.command
def copy(folder: Path | None = None, /, *, to: str, json: bool = False) -> None:
    """Copy all that the site's database knows into another, empty one. Stop the service first; the original stays as it is.

    Parameters
    ----------
    folder
        The site; default REPAVE_SITE, or here.
    to
        SQLAlchemy URL: postgresql+psycopg://USER@HOST/DATABASE, or sqlite:////PATH. Leave the password out, others see a command's words: it is
        read from PGPASSWORD or ~/.pgpass.
    """
    from repave.config import SETTINGS_FILE, load_settings
    from repave.store.copying import copy_database

    found = _site_folder(folder)
    if not (found / SETTINGS_FILE).exists():
        raise Usage(f"{found} is no site: it has no {SETTINGS_FILE}.")
    try:
        done = copy_database(load_settings(found).database_url, to)
    except ValueError as error:  # sqlalchemy's word for an URL that is none
        raise Usage(f"--to: {error}") from None
    if json:
        show_json(done)
    else:
        show(f"{count(sum(done.values()), 'row')} of {count(len(done), 'table')} copied, read back and compared.")
    say(f'Next: database_url = "..." with that URL in {found / SETTINGS_FILE}, then repave serve. Key file, CA and images stay where they are.')
