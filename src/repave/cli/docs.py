"""The generated pages of docs/: errors.md, states.md, settings.md, cli.md. `python -m repave.cli.docs` writes them, `--check` fails when they are old."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from repave.cli.manual import render_reference
from repave.cli.output import Exit
from repave.config import SETTINGS_FILE, Settings
from repave.domain.states import render_table
from repave.errors import CATALOGUE, CLOUDDC, Who
from repave.generation import OLDER
from repave.workflow.lease import BROKEN, REAPED

DOCS = Path(__file__).parents[3] / "docs"
_MADE = "<!-- Made by `make docs` from {source}; do not edit. -->\n"
_WHO = {
    Who.REQUEST: "1: the request", Who.BMC: "2: the BMC", Who.SERVER: "3: server and disk", Who.IMAGE: "4: the image",
    Who.NEW_OS: "5: the new OS", Who.US: "9: Repave",
}  # fmt: skip


def render_errors() -> str:
    parts = [
        "# Errors\n", _MADE.format(source="src/repave/errors.py"),
        "The same texts: `repave explain CODE`. API errors are problem+json with these fields; CloudDC's routes have CloudDC's own codes (last table).",
        "`class` is the word in JSON (`repave bmc --json` calls it `error.class`). *Again* says whether the same request may work later.",
    ]  # fmt: skip
    for who, title in _WHO.items():
        parts.append(f"\n## {title}\n\n| Code | Class | What happened | Cause | Do | Untouched | Again |\n|---|---|---|---|---|---|---|")
        for p in (p for p in CATALOGUE.values() if p.who is who):
            parts.append(f"| {p.code} | `{p.slug}` | {p.title} | {p.cause} | {p.do} | {p.untouched} | {'yes' if p.retryable else 'no'} |")
    parts.append("\n## CloudDC's codes\n\nThe wire's own; the text beside them says what was wrong.\n\n| Code | Ours |\n|---|---|")
    parts += [f"| {code} | {', '.join(f'{CATALOGUE[slug].code} `{slug}`' for slug in slugs)} |" for code, slugs in CLOUDDC.items()]
    return "\n".join(parts) + "\n"


def render_states() -> str:
    made = _MADE.format(source="src/repave/domain/states.py")
    return f"# States of an instance\n\n{made}\nA pair of state and event that is not here is refused.\n\n{render_table()}\n"


def render_settings() -> str:
    rows = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, "") else f"`{field.default}`"
        rows.append(f"| `{name}` | `REPAVE_{name.upper()}` | {default} | {field.description} |")
    head = "| Setting | Environment | Default | Meaning |\n|---|---|---|---|"
    intro = (
        f"The file is `{SETTINGS_FILE}` in the site's folder (TOML; `repave init` writes it). The environment wins over it. Unknown names are refused in both."
    )
    return f"# Settings\n\n{_MADE.format(source='src/repave/config.py')}\n{intro}\n\n{head}\n" + "\n".join(rows) + "\n"


def render_cli() -> str:
    rows = [f"| {code.value} | {code.meaning} |" for code in Exit]
    rows += [
        f"| {REAPED} | `repave serve`: others have taken over its runs meanwhile; start it again |",
        f"| {BROKEN} | `repave serve`: it could not take over a dead worker's runs; start it again |",
        f"| {OLDER} | `repave serve`: an older database was put in place under it (`repave restore`) |",
    ]
    intro = "The same as `repave COMMAND --help` and `repave man`. Data go to standard output, everything else to standard error."
    made = _MADE.format(source="src/repave/cli")
    return f"# The command line\n\n{made}\n{intro}\n\n## Exit codes\n\n| Code | Meaning |\n|---|---|\n" + "\n".join(rows) + f"\n\n{render_reference()}"


PAGES: dict[str, Callable[[], str]] = {"errors.md": render_errors, "states.md": render_states, "settings.md": render_settings, "cli.md": render_cli}


def main(argv: list[str]) -> int:
    old = [name for name, render in PAGES.items() if not (DOCS / name).is_file() or (DOCS / name).read_text() != render()]
    if "--check" in argv:
        print("\n".join(f"docs/{name} is not up to date: make docs" for name in old) or "docs are up to date")
        return 1 if old else 0
    for name in old:
        (DOCS / name).write_text(PAGES[name]())
        print(f"docs/{name} written")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
