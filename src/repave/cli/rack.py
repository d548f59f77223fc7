"""The virtual rack: repave.lab.rack does the work."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from repave.cli.lists import TABLE, Form, show_list
from repave.cli.options import AsJson
from repave.cli.output import Exit, Usage, fold, say, show, show_json

app = App(name="rack")
FOLDER = Path(".repave")
SDK_REGIONS = ("CN_EAST_3", "CN_SOUTHWEST_2", "CN_SOUTH_1", "AP_SOUTHEAST_3")  # huaweicloudsdkclouddc 3.1.219, v1/region/clouddc_region.py


@app.command
def up(count: int = 2, /, *, scripted: bool = False, json: AsJson = False) -> int:
    """Bring up machines, their BMCs and the service; returns when all instances run.

    Parameters
    ----------
    count
        How many machines with Linux. A scripted rack has one with Windows beside them.
    scripted
        No QEMU: the real agent against a file as its disk; seconds instead of minutes.
    """
    try:
        from repave.lab.phases import PhaseFailed
        from repave.lab.rack import MOST_QEMU, MOST_SCRIPTED, rack_up
    except ModuleNotFoundError as missing:  # an installed Repave has what the service needs
        raise Usage(f"The virtual rack is part of the source tree ({missing.name} is not installed here): there, make run or make rack.") from None

    most = MOST_SCRIPTED if scripted else MOST_QEMU
    if not 1 <= count <= most:
        raise Usage(f"COUNT is {count}; it must be from 1 to {most}{'' if scripted else f' (--scripted: {MOST_SCRIPTED})'}.")
    try:
        state = rack_up(count, scripted=scripted, folder=FOLDER)
    except PhaseFailed as failed:
        say(str(failed))
        return Exit.OURS
    if json:
        show_json(state)
    else:
        say(f"Next: repave reinstall '{fold(i['name'] for i in state['instances'][:count])}' --image tiny-2")
    return Exit.OK


@app.command(name="ls")
def list_machines(*, digest: bool = False, form: Form = TABLE) -> None:
    """What is up.

    Parameters
    ----------
    digest
        Also the SHA-256 of what is on each root disk: the same before and after, nothing was written.
    """
    from repave.lab.rack import describe_machines

    columns = {"NAME": "name", "INSTANCE": "id", "SSH HOST": "ssh.host", "SSH PORT": "ssh.port"} | ({"DIGEST": "digest"} if digest else {})
    show_list(describe_machines(FOLDER, digest=digest), columns, form)


@app.command
def fault(machine: str, kind: str, /) -> None:
    """Make a machine misbehave until it is told none: slow-firmware, ignore-boot-override, and more by kind of rack (a wrong one lists them)."""
    from repave.lab.faults import set_fault

    try:
        set_fault(FOLDER / "rack", machine, kind)
    except ValueError as wrong:
        raise Usage(str(wrong)) from None
    say(f"{machine}: {kind}.  " + ("" if kind == "none" else f"It ends with: repave rack fault {machine} none"))


@app.command
def env() -> None:
    """Print what a program with the official SDK needs, as shell exports by the names its samples read: AK, SK, project id, endpoint of each region."""
    from repave.lab.rack import rack_state

    lab = rack_state(FOLDER)
    if lab is None:
        raise Usage("No rack is up here: make run, or repave rack up.")
    names = {"CLOUDDC_ENDPOINT": "endpoint", "HUAWEICLOUD_SDK_IAM_ENDPOINT": "endpoint"}
    names |= {f"HUAWEICLOUD_SDK_REGION_CLOUDDC_{region}": "endpoint" for region in SDK_REGIONS}
    names |= {"HUAWEICLOUD_SDK_PROJECT_ID": "project_id", "HUAWEICLOUD_SDK_AK": "ak", "HUAWEICLOUD_SDK_SK": "sk"}
    names |= {"CLOUD_SDK_AK": "ak", "CLOUD_SDK_SK": "sk"}  # what samples of Huawei's API Explorer read
    for name, key in names.items():
        show(f"export {name}={lab[key]}")


@app.command
def down() -> None:
    """End everything that `up` started."""
    from repave.lab.rack import rack_down

    rack_down(FOLDER)
