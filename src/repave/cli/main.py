"""`repave`: one file per noun, loaded when it is used. Errors become exit codes here and nowhere else (output.py names them)."""

from __future__ import annotations

import importlib.util
import os
import sys

from cyclopts import App, CycloptsError, Parameter

from repave import __version__
from repave.cli.output import Exit, Refused, Usage, exit_code, say, show, show_error
from repave.errors import RepaveError

app = App(
    name="repave",
    help="Reinstalls the operating system of a fleet of bare-metal servers with one call.",
    help_epilogue="Exit codes: " + " · ".join(f"{code.value} {code.meaning}" for code in Exit) + ".",
    version=__version__,
    default_parameter=Parameter(negative=()),  # no --no-json: each flag says what it does, its absence is the default
)

for _name, _help in {
    "rack": "The virtual rack: QEMU machines with real firmware and Redfish BMCs.",
    "server": "Servers: add, ls, show, set, lock, unlock, replace, rm.",
    "image": "Images: import, ls, show, verify, rm, pack.",
    "batch": "Batches: ls, show, watch, cancel, pause, resume, retry.",
    "project": "Projects: add, ls.",
    "key": "Keys (AK/SK and token): add, ls, rm.",
    "webhook": "Webhooks, told when a batch or a run ends: add, ls, test, rm.",
    "db": "The site's database: copy it into another one.",
    "bmc": "One BMC, without server or database: probe, boot-media, eject, power.",
}.items():
    _module = {"project": "site", "key": "site"}.get(_name, _name)
    if importlib.util.find_spec(f"repave.cli.{_module}"):
        app.command(f"repave.cli.{_module}:{'app' if _module == _name else _name}", name=_name, help=_help)
app.command("repave.cli.site:init", name="init", help="Make a site here: settings, key, CA, database; prints the first key once.")
app.command("repave.cli.site:serve", name="serve", help="Run the service of the site here, until Ctrl-C.")
app.command("repave.cli.site:serve_chunks", name="serve-chunks", help="Run the chunk server alone, beside an image folder.")
app.command("repave.cli.backup:backup", name="backup", help="Write the whole site but its images into one file.")
app.command("repave.cli.backup:restore", name="restore", help="Put a backup in place; its live runs end, no server is touched.")
app.command("repave.cli.backup:health", name="health", help="Whether the service and its database are well.")
app.command("repave.cli.site:whoami", name="whoami", help="Which key this is, and what it may do.")
app.command("repave.cli.site:explain", name="explain", help="What an error code means, what to do, what was left untouched.")
app.command("repave.cli.reinstall:reinstall", name="reinstall", help="Erase servers and install an image on them: plan, confirmation, progress.")
app.command("repave.cli.batch:watch", name="watch", help="Follow a batch (the newest) until it ends.")
app.command("repave.cli.batch:cancel", name="cancel", help="Cancel what has not crossed the line of a batch (the newest).")
app.command("repave.cli.batch:retry", name="retry", help="Reinstall again what did not end well in a batch (the newest).")


@app.command
def version() -> None:
    """The version of Repave."""
    show(__version__)


@app.default
def overview() -> None:
    """What is here, what runs now, the next useful command."""
    from repave.cli.site import show_overview

    show_overview()


def _command_of(argv: list[str]) -> list[str]:
    """The words of `argv` that name a command."""
    found: list[str] = []
    at = app
    for word in argv:
        if word.startswith("-") or word not in at:
            break
        found, at = [*found, word], at[word]
    return found


def run(argv: list[str]) -> int:
    """The command's exit code."""
    try:
        code = app(argv, exit_on_error=False, print_error=False, result_action="return_value")
        return code if isinstance(code, int) else Exit.OK
    except CycloptsError as error:
        say(f"{error}\nNothing was sent. Help: repave {' '.join(_command_of(argv))} --help")
        return Exit.USAGE
    except Usage as error:
        say(f"{error}\nNothing was sent.")
        return Exit.USAGE
    except Refused as error:
        say(str(error))
        return Exit.REFUSED
    except RepaveError as error:
        show_error(error)
        return exit_code(error)
    except KeyboardInterrupt:
        say("\nStopped.")
        return Exit.CTRL_C
    except BrokenPipeError:
        # The reader has seen enough (`| head`). Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return Exit.OK


def main() -> int:
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
