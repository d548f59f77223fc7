"""backup, restore: the whole site in one file, and back. They work on the folder, not on the service."""

from __future__ import annotations

from pathlib import Path

from repave.cli.options import AsJson
from repave.cli.output import Exit, Usage, count, say, show, show_json
from repave.cli.site import _site_folder


def backup(file: Path, folder: Path | None = None, /, *, json: AsJson = False) -> None:
    """Write database, key file, CA, settings and the admin's key into FILE (0600). The service may run.

    Parameters
    ----------
    file
        A new file. Whoever reads it can log in to every BMC: keep it as you keep the key file.
    folder
        The site; default REPAVE_SITE, or here.
    """
    from repave.backup import write_backup

    about = write_backup(_known_site(folder), file)
    if json:
        show_json(about)
    else:
        size = sum(m["size_bytes"] for m in about["members"].values())
        show(f"{file}  {size / 1e6:.1f} MB, mode 0600, as of {about['made_at']}.")
    say(
        f"KEEP IT SECRET: it is not encrypted and holds the key, hence every BMC password.\nNot in it: {count(len(about['images']), 'image')} (keep the files)."
    )


def restore(file: Path | None = None, folder: Path | None = None, /, *, accept_database: bool = False, json: AsJson = False) -> None:
    """Put the site of a backup in place. Everything is checked first; what was there is kept. Stop the service before.

    Runs that were under way in the backup end as error `restored`: nothing is powered and nothing written for them. Reinstall those servers anew.

    Parameters
    ----------
    file
        What `repave backup` wrote.
    folder
        The site; default REPAVE_SITE, or here. It may be empty.
    accept_database
        No FILE: go on with the database that is here, although it is an older copy. Its live runs end in the same way.
    """
    from repave import backup as backups

    if (file is None) != accept_database:
        raise Usage("repave restore FILE [FOLDER], or repave restore --accept-database (REPAVE_SITE names another folder than this).")
    done = backups.accept_database(_known_site(folder)) if file is None else backups.restore_backup(_site_folder(folder), file)
    if json:
        show_json({
            "made_at": done.made_at, "ended_runs": done.ended_runs, "missing_images": done.missing_images,
            "kept_in": str(done.kept_in) if done.kept_in else None, "generation": done.generation,
        })  # fmt: skip
        return
    show(f"Restored, as of {done.made_at}." if done.made_at else "The database that is here is accepted.")
    show(f"{count(done.ended_runs, 'run')} under way in it ended as error `restored`; no server was powered or written. Look at those, reinstall them anew.")
    if done.missing_images:
        show(f"Images that are not here: {', '.join(done.missing_images)}. Copy their files back, or remove and import them again.")
    if done.kept_in:
        show(f"What was here before is in {done.kept_in} (with its key: remove it when you no longer need it).")
    say("States are those of the backup: what was reinstalled after it shows its older image.  Next: repave serve")


def _known_site(folder: Path | None) -> Path:
    from repave.config import SETTINGS_FILE

    found = _site_folder(folder)
    if not (found / SETTINGS_FILE).exists():
        raise Usage(f"{found} is no site: it has no {SETTINGS_FILE}.")
    return found


def health(*, json: AsJson = False) -> int:
    """What the service says of itself: database, disk, generation. Exit code 1 where one is not well."""
    from repave.cli.client import Client

    said = Client().get_health()
    if json:
        show_json(said)
    else:
        show(said["status"])
        for name, part in said["parts"].items():
            show(f"{'ok  ' if part['ok'] else 'FAIL'}  {name}: {part['text']}, since {part['since']}")
    return Exit.OK if said["status"] == "ok" else Exit.OURS
