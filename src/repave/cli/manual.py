"""The manual: what `--help` is made from, as pages for docs/cli.md and man(1). Every command is loaded for it, so nothing else imports this."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from repave import __version__
from repave.cli.main import ABOUT, GLOBALS, build_app
from repave.cli.output import Exit

if TYPE_CHECKING:
    from cyclopts import App

# What is worth knowing beside the commands, in the manual page.
_FILES = {
    "~/.config/repave/NAME.json": "The site that --context NAME means.",
    ".repave/lab.json": "The virtual rack of this folder.",
    "admin.json": "What `repave init` wrote, in REPAVE_SITE or here.",
}
_ENVIRONMENT = {
    "REPAVE_ENDPOINT, REPAVE_TOKEN": "The service, and as whom; before all files but that of --context.",
    "REPAVE_CA": "A CA bundle for https.",
    "REPAVE_SITE": "The folder of the site.",
    "REPAVE_NEW_PASSWORD, REPAVE_BMC_PASSWORD": "Passwords, where they are not asked for or read by --password-stdin.",
    "REPAVE_NETBOX_TOKEN": "The token of `server add --netbox`. NetBox's certificate is checked by the system's CAs, or by those in SSL_CERT_FILE.",
    "REPAVE_PROGRESS, REPAVE_CONTEXT, REPAVE_QUIET": "As the options.",
    "NO_COLOR, TERM=dumb, CI, ACCESSIBLE": "No colours; no redrawing.",
}


@dataclass(frozen=True)
class Option:
    names: tuple[str, ...]
    text: str

    @property
    def is_argument(self) -> bool:
        return not self.names[0].startswith("-")


@dataclass(frozen=True)
class Command:
    """One command: `words` as they are typed after `repave`."""

    words: tuple[str, ...]
    text: str
    options: tuple[Option, ...]

    @property
    def usage(self) -> str:
        arguments = [o.names[0] for o in self.options if o.is_argument]
        return " ".join(["repave", *self.words, *arguments, *(["[OPTIONS]"] if len(arguments) < len(self.options) else [])])


def list_commands() -> list[Command]:
    """All of them, in the order of `repave --help`; those of a noun together."""
    return list(_walk(build_app(), ()))


def _walk(app: App, words: tuple[str, ...]) -> Iterator[Command]:
    for name, command in app.resolved_commands().items():
        if name.startswith("-"):
            continue
        if command.default_command is not None:
            yield Command((*words, name), _text(command), tuple(_options(command)))
        yield from _walk(command, (*words, name))


def _text(command: App) -> str:
    told = (inspect.getdoc(command.default_command) or "").partition("\n\nParameters\n")[0]
    return " ".join(told.split())


def _options(command: App) -> Iterator[Option]:
    for argument in command.assemble_argument_collection(parse_docstring=True):
        if not argument.show:
            continue
        names = tuple(n for n in argument.names if not n.startswith(("--no-", "--empty-")))
        choices = argument.get_choices()
        default = argument.field_info.default
        said = [argument.parameter.help or "", f"One of {', '.join(choices)}." if choices else ""]
        if isinstance(default, int | float | str) and not isinstance(default, bool) and default != "":
            said.append(f"Default: {default}.")
        yield Option(names, " ".join(" ".join(said).split()))


# ---- docs/cli.md ----


def render_reference() -> str:
    """Markdown: the options of every command, then each command."""
    parts = ["## With every command\n", _markdown_rows([(name, text) for name, text in GLOBALS.items()]), "\n## Commands\n"]
    for command in list_commands():
        parts.append(f"### `{command.usage}`\n\n{_plain(command.text)}\n")
        if command.options:
            parts.append(_markdown_rows([(", ".join(o.names), o.text) for o in command.options]) + "\n")
    return "\n".join(parts)


def _markdown_rows(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"- `{name}`{'  ' + _plain(text) if text else ''}" for name, text in rows)


def _plain(text: str) -> str:
    return text.replace("<", "&lt;").replace("*", r"\*").replace("|", r"\|")


# ---- man(1) ----


def render_man() -> str:
    """Roff. Source: man-pages(7), groff_man(7)."""
    lines = [f'.TH REPAVE 1 "" "Repave {__version__}" "User Commands"', ".SH NAME", f"repave \\- {_roff(ABOUT[0].lower() + ABOUT[1:].rstrip('.'))}"]
    lines += [".SH SYNOPSIS", r".B repave", r".I COMMAND", r"[\fIOPTIONS\fR]"]
    lines += [".SH OPTIONS", *_roff_rows([(name, text) for name, text in GLOBALS.items()]), ".SH COMMANDS"]
    for command in list_commands():
        lines += [f".SS {_roff(command.usage)}", _roff(command.text), *_roff_rows([(", ".join(o.names), o.text) for o in command.options])]
    lines += [".SH EXIT STATUS", *_roff_rows([(str(code.value), code.meaning) for code in Exit])]
    lines += [".SH ENVIRONMENT", *_roff_rows(list(_ENVIRONMENT.items())), ".SH FILES", *_roff_rows(list(_FILES.items()))]
    return "\n".join(lines)


def _roff_rows(rows: Sequence[tuple[str, str]]) -> list[str]:
    return [line for name, text in rows for line in (".TP", f"\\fB{_roff(name)}\\fR", _roff(text) or "\\&")]


def _roff(text: str) -> str:
    """Nothing in it is a request or an escape."""
    shown = text.replace("\\", r"\e").replace("-", r"\-").replace("`", "\\(ga")
    return rf"\&{shown}" if shown.startswith((".", "'")) else shown
