"""`repave`: one file per noun, loaded when it is used. Errors become exit codes here and nowhere else (output.py names them).

`COMMANDS` is the one list of commands: `--help`, docs/cli.md, the man page and completion are made from it and from the functions it names. `repave --help`
itself is printed without cyclopts, whose import takes longer than all else.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import sys
from functools import cache
from typing import TYPE_CHECKING

from repave.cli.output import PROGRESS, Exit, Refused, Usage, exit_code, show, show_error, warn
from repave.errors import RepaveError

if TYPE_CHECKING:
    from cyclopts import App

ABOUT = "Reinstalls the operating system of a fleet of bare-metal servers with one call."
# Name -> where it is, and its line of help. One whose module is not there is left out.
COMMANDS = {
    "rack": ("rack:app", "The virtual rack: QEMU machines with real firmware and Redfish BMCs."),
    "server": ("server:app", "Servers: add, ls, show, set, probe, power, console, lock, unlock, replace, rotate, rm."),
    "image": ("image:app", "Images: import, ls, show, verify, rm, pack."),
    "batch": ("batch:app", "Batches: ls, show, watch, wait, report, case, cancel, pause, resume, retry."),
    "project": ("site:project", "Projects: add, ls."),
    "key": ("site:key", "Keys (AK/SK and token): add, ls, rm."),
    "webhook": ("webhook:app", "Webhooks, told when a batch or a run ends: add, ls, test, rm."),
    "user": ("user:app", "People who may log in to the pages: add, ls, rm."),
    "db": ("db:app", "The site's database: copy it into another one."),
    "bmc": ("bmc:app", "One BMC, without server or database: probe, boot-media, eject, power."),
    "init": ("site:init", "Make a site here: settings, key, CA, database; prints the first key once."),
    "serve": ("site:serve", "Run the service of the site here, until Ctrl-C."),
    "serve-chunks": ("site:serve_chunks", "Run the chunk server alone, beside an image folder."),
    "backup": ("backup:backup", "Write the whole site but its images into one file."),
    "restore": ("backup:restore", "Put a backup in place; its live runs end, no server is touched."),
    "health": ("backup:health", "Whether the service and its database are well."),
    "doctor": ("doctor:doctor", "What is wrong here, and what to do: service, database, disk, images, BMCs."),
    "login": ("login:login", "Keep a service's address and a token of it under a name, for --context."),
    "whoami": ("site:whoami", "Which key this is, and what it may do."),
    "explain": ("site:explain", "What an error code means, what to do, what was left untouched."),
    "reinstall": ("reinstall:reinstall", "Erase servers and install an image on them: plan, confirmation, progress."),
    "watch": ("batch:watch", "Follow a batch (the newest) until it ends."),
    "wait": ("batch:wait", "Wait until batches, or the runs of servers, have ended."),
    "run": ("run:run", "One server's run: its steps, attempts and proof."),
    "console": ("console:console", "What a server's console said in its newest run, from the first byte."),
    "case": ("case:case", "One file a failed run of a batch (the newest): cause, next command, everything that was seen."),
    "report": ("batch:report", "What became of each server of a batch (the newest), for people, sheets or programs."),
    "cancel": ("batch:cancel", "Cancel what has not crossed the line of a batch (the newest)."),
    "retry": ("batch:retry", "Reinstall again what did not end well in a batch (the newest)."),
    "events": ("events:events", "What happened, in order; --follow goes on."),
    "api": ("api:api", "Send one request to the service as this key, and print the answer."),
    "completion": ("shell:completion", "Completion for bash, zsh or fish."),
    "man": ("shell:man", "The manual page, for man(1)."),
    "version": ("shell:version", "The version of Repave."),
}
GLOBALS = {
    "--progress MODE": "How a batch is followed: auto (a table on a terminal, else lines), plain, json, none. Also REPAVE_PROGRESS.",
    "--context NAME": "Which site: what repave login keeps in ~/.config/repave/NAME.json. Also REPAVE_CONTEXT.",
    "-q, --quiet": "Data and errors only: no progress, no hints.",
    "-h, --help": "This help, or that of a command.",
    "--version": "The version of Repave.",
}


def epilogue() -> str:
    return "Exit codes: " + " · ".join(f"{code.value} {code.meaning}" for code in Exit) + "."


def known_commands() -> dict[str, tuple[str, str]]:
    return {name: (at, line) for name, (at, line) in COMMANDS.items() if importlib.util.find_spec(f"repave.cli.{at.partition(':')[0]}")}


@cache
def build_app() -> App:
    """All commands, none of them loaded yet."""
    from cyclopts import App, Parameter

    # No --no-json: each flag says what it does, its absence is the default.
    app = App(name="repave", help=ABOUT, help_epilogue=epilogue(), version_flags=(), default_parameter=Parameter(negative=()))
    for name, (at, line) in known_commands().items():
        app.command(f"repave.cli.{at}", name=name, help=line)
    return app


def show_help() -> None:
    """`repave --help`."""
    import shutil
    import textwrap

    columns = min(shutil.get_terminal_size((110, 24)).columns, 110)
    commands = known_commands()

    def rows(named: dict[str, str]) -> list[str]:
        indent = max(len(name) for name in named) + 4
        return [textwrap.fill(f"  {name.ljust(indent - 4)}  {line}", columns, subsequent_indent=" " * indent) for name, line in named.items()]

    parts = ["Usage: repave COMMAND [OPTIONS]", "", ABOUT, "", "Commands (repave COMMAND --help):", *rows({name: line for name, (_, line) in commands.items()})]
    show("\n".join([*parts, "", "With every command:", *rows(GLOBALS), "", textwrap.fill(epilogue(), columns)]))


def _take_globals(argv: list[str]) -> list[str]:
    """What is left of `argv`; the options of every command are in the environment then. Raises Usage."""
    left: list[str] = []
    words = iter(argv)
    for word in words:
        name, is_joined, value = word.partition("=")
        if word == "--":
            return [*left, word, *words]
        if word in ("-q", "--quiet"):
            os.environ["REPAVE_QUIET"] = "1"
        elif name in ("--progress", "--context"):
            value = value if is_joined else next(words, "")
            if name == "--progress" and value not in PROGRESS:
                raise Usage(f"--progress is one of {', '.join(PROGRESS)}.")
            if not value:
                raise Usage(f"{name} wants a value.")
            os.environ[f"REPAVE_{name[2:].upper()}"] = value
        else:
            left.append(word)
    return left


def _command_of(argv: list[str]) -> list[str]:
    """The words of `argv` that name a command."""
    found: list[str] = []
    at = build_app()
    for word in argv:
        if word.startswith("-") or word not in at:
            break
        found, at = [*found, word], at[word]
    return found


def _dispatch(argv: list[str]) -> int:
    if not argv:
        from repave.cli.site import show_overview

        show_overview()
        return Exit.OK
    if argv[0] in ("-h", "--help", "--version"):
        importlib.import_module("repave.cli.shell").version() if argv[0] == "--version" else show_help()
        return Exit.OK
    from cyclopts import CycloptsError

    try:
        code = build_app()(argv, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        warn(f"{error}\nNothing was sent. Help: repave {' '.join([*_command_of(argv), '--help'])}")
        return Exit.USAGE
    return code if isinstance(code, int) else Exit.OK


def run(argv: list[str]) -> int:
    """The command's exit code."""
    try:
        return _dispatch(_take_globals(argv))
    except Usage as error:
        warn(f"{error}\nNothing was sent.")
        return Exit.USAGE
    except Refused as error:
        warn(str(error))
        return Exit.REFUSED
    except RepaveError as error:
        show_error(error)
        return exit_code(error)
    except KeyboardInterrupt:
        warn("\nStopped.")
        return Exit.CTRL_C
    except BrokenPipeError:
        # The reader has seen enough (`| head`). Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return Exit.OK


def main() -> int:
    code = run(sys.argv[1:])
    gc.freeze()  # Python looks for garbage once more at its end: a tenth of all the time that a short command takes, for memory that goes with it
    return code


if __name__ == "__main__":
    sys.exit(main())
