"""db: the site's database as a whole. Works on the folder, not on the service."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from repave.cli.options import AsJson
from repave.cli.output import Usage, count, say, show, show_json
from repave.cli.site import _site_folder
from repave.config import SETTINGS_FILE, Settings, load_settings

app = App(name="db")


@app.command
def copy(folder: Path | None = None, /, *, to: str, json: AsJson = False) -> None:
    """Copy all that the site's database knows into another, empty one. Stop the service first; the original stays as it is.

    Parameters
    ----------
    folder
        The site; default REPAVE_SITE, or here.
    to
        SQLAlchemy URL: postgresql+psycopg://USER@HOST/DATABASE, or sqlite:////PATH. Leave the password out, others see a command's words: it is
        read from PGPASSWORD or ~/.pgpass.
    """
    from repave.store.copying import copy_database

    settings = _load(folder)
    try:
        done = copy_database(settings.database_url, to)
    except ValueError as error:  # sqlalchemy's word for an URL that is none
        raise Usage(f"--to: {error}") from None
    if json:
        show_json(done)
    else:
        show(f"{count(sum(done.values()), 'row')} of {count(len(done), 'table')} copied, read back and compared.")
    say(f'Next: database_url = "..." with that URL in {_site_folder(folder) / SETTINGS_FILE}, then repave serve. Key file, CA and images stay where they are.')


@app.command
def check(folder: Path | None = None, /, *, json: AsJson = False) -> None:
    """Look whether the database is whole and every event of the audit as it was written. Changes nothing; the service may run.

    Parameters
    ----------
    folder
        The site; default REPAVE_SITE, or here.
    """
    from dataclasses import asdict

    from repave.secrets import Sealer
    from repave.store.checking import check_database

    settings = _load(folder)
    if not settings.key_file.exists():
        raise Usage(f"{settings.key_file} is not there: without the key nobody can check the audit.")
    checked = check_database(settings.database_url, Sealer.open(settings.key_file))
    if json:
        show_json(asdict(checked))
    else:
        bare = f"; {count(checked.without_mac, 'event')} are older than the chain and can not be checked" if checked.without_mac else ""
        show(f"The database is whole. {count(checked.events, 'event')} of the audit, each as it was written{bare}.")


def _load(folder: Path | None) -> Settings:
    found = _site_folder(folder)
    if not (found / SETTINGS_FILE).exists():
        raise Usage(f"{found} is no site: it has no {SETTINGS_FILE}.")
    return load_settings(found)
