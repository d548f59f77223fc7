"""The virtual rack: repave.lab.rack does the work."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from repave.cli.output import Usage, fold, say, show_json, show_list

app = App(name="rack")
FOLDER = Path(".repave")


@app.command
def up(count: int = 2, /, *, scripted: bool = False, json: bool = False) -> None:
    """Bring up machines, their BMCs and the service; returns when all instances run.

    Parameters
    ----------
    count
        How many machines with Linux. A scripted rack has one with Windows beside them.
    scripted
        No QEMU: the real agent against a file as its disk; seconds instead of minutes.
    """
    try:
        from repave.lab.rack import MOST_QEMU, MOST_SCRIPTED, rack_up
    except ModuleNotFoundError as missing:  # an installed Repave has what the service needs
        raise Usage(f"The virtual rack is part of the source tree ({missing.name} is not installed here): there, make run or make rack.") from None

    most = MOST_SCRIPTED if scripted else MOST_QEMU
    if not 1 <= count <= most:
        raise Usage(f"COUNT is {count}; it must be from 1 to {most}{'' if scripted else f' (--scripted: {MOST_SCRIPTED})'}.")
    state = rack_up(count, scripted=scripted, folder=FOLDER)
    if json:
        show_json(state)
    else:
        say(f"Next: repave reinstall '{fold(i['name'] for i in state['instances'][:count])}' --image tiny-2")


@app.command(name="ls")
def list_machines(*, json: bool = False) -> None:
    """What is up."""
    from repave.lab.rack import rack_state

    instances = (rack_state(FOLDER) or {}).get("instances", [])
    show_list(instances, {"NAME": "name", "INSTANCE": "id", "SSH HOST": "ssh.host", "SSH PORT": "ssh.port"}, as_json=json)


@app.command
def down() -> None:
    """End everything that `up` started."""
    from repave.lab.rack import rack_down

    rack_down(FOLDER)
