"""The cells of whole reinstalls: one fault on one request of a reinstall, and how it must end. Data only; `fault_rig` runs them.

running         the new OS proved itself; its disk is the image, media out, override off
returned        before the line: the disk's bytes are what they were, the old OS runs again
stopped         after the line: off, media out, the disk can not boot
stopped-whole   after the line, nobody heard that the image is whole: off, media out
stopped-clean   counted as crossed, nothing written: off, media out, the disk's bytes are what they were
unproved        the image is whole and on, nobody heard its proof; heard late, it counts
return-failed   before the line: the disk's bytes are what they were, the BMC can not be made to power on
"""

from __future__ import annotations

from dataclasses import dataclass, field

from repave.lab.fault_proxy import Rule

ONCE = ("latency", "black-hole", "reset", "status", "truncated", "twice", "lost-answer")
ALWAYS = ("black-hole", "reset", "status", "truncated", "lost-answer")
NEVER_HEARD = ("black-hole", "reset", "status")


@dataclass(frozen=True)
class Call:
    """A request of every reinstall: the `nth` that fits."""

    at: str  # which wire: agent, media, bmc
    name: str
    method: str
    path: str
    nth: int = 1

    def rule(self, fault: str, times: int | None) -> Rule:
        return Rule(fault, method=self.method, path=self.path, nth=self.nth, times=times, seconds=2.0, bytes_per_s=4_000_000)


AGENT = [
    Call("agent", "hello", "POST", "/hello$"),
    Call("agent", "plan", "GET", "/plan$"),
    Call("agent", "manifest", "GET", "/manifest$"),
    Call("agent", "cross", "POST", "/cross$"),
    Call("agent", "config-drive", "GET", "/config-drive$"),
    Call("agent", "chunk", "GET", "/chunks/"),
    Call("agent", "progress", "POST", "/progress$"),
    Call("agent", "report", "POST", "/report$"),
    Call("agent", "log", "POST", "/log$"),
    Call("agent", "call-home", "POST", "^/home/"),
]
MEDIA = Call("media", "media", "GET", "^/media/")
LATER_CHUNK = Call("agent", "later-chunk", "GET", "/chunks/", nth=4)
CUT = Call("agent", "network", "", "/(chunks/|progress|report)", nth=3)  # in the midst of writing
INSERT = Call("bmc", "insert-media", "POST", "InsertMedia$")
OVERRIDE = Call("bmc", "override", "PATCH", "Systems/")
POWER_ON = Call("bmc", "power-on", "POST", "ComputerSystem.Reset$", nth=2)
BMC = [
    Call("bmc", "power-off", "POST", "ComputerSystem.Reset$"),
    INSERT,
    OVERRIDE,
    POWER_ON,
    Call("bmc", "eject-media", "POST", "EjectMedia$"),
    Call("bmc", "override-off", "PATCH", "Systems/", nth=2),
    Call("bmc", "power-on-new-os", "POST", "ComputerSystem.Reset$", nth=3),
]
IDENTITY = Call("bmc", "any-request", "", "")
LATER = Call("bmc", "any-request-since-insert", "", "")


@dataclass(frozen=True)
class Cell:
    call: Call
    fault: str
    ends: str
    always: bool = False
    beside: tuple[Rule, ...] = field(default=())  # so that there is something to break

    def __str__(self) -> str:
        return f"{self.fault} {'always' if self.always else 'once'} at {self.call.name}"

    @property
    def since(self) -> str:
        """The step that must have begun before the fault is there."""
        return "insert-media" if self.call == LATER else ""

    @property
    def image(self) -> str:
        return "wide" if self.call.name in ("manifest", "chunk", "later-chunk", "progress", "network") else "tiny-1"

    def rules(self) -> list[Rule]:
        return [self.call.rule(self.fault, None if self.always else 1), *self.beside]


# Chunks this slow keep an agent writing for some seconds: progress is told every three.
_PACE = (Rule("latency", path="/chunks/", times=None, seconds=2.0),)


def list_cells() -> list[Cell]:
    """The long ones first: they are waiting, while others work."""
    return sorted([*_always(), *_once()], key=lambda cell: (not cell.always, cell.ends != "return-failed"))


def _once() -> list[Cell]:
    cells = []
    for call in AGENT:
        beside = _PACE if call.name == "progress" else ()
        cells += [Cell(call, fault, "running", beside=beside) for fault in ONCE]
        if call.name in _STALE:
            cells.append(Cell(call, "stale", "running", beside=beside))
    cells += [Cell(MEDIA, fault, "running") for fault in (*ONCE, "slow")]
    cells += [Cell(CUT, fault, "running", beside=_PACE) for fault in ("black-hole", "reset", "lost-answer")]
    for call in BMC:
        cells += [Cell(call, fault, _BMC.get((call.name, fault), "running")) for fault in (*ONCE, "ignored", "elsewhere")]
    return cells


# An answer to another run's request: the agent, and the new OS's script, ask again.
_STALE = ("hello", "plan", "cross", "manifest", "config-drive", "chunk", "progress", "report", "call-home")
_BMC = {("insert-media", "elsewhere"): "returned"}  # the other machine says that it knows no such drive, which is no passing trouble


def _always() -> list[Cell]:
    ends = {
        "hello": dict.fromkeys(ALWAYS, "returned"),
        "plan": dict.fromkeys(ALWAYS, "returned"),
        "manifest": dict.fromkeys(ALWAYS, "returned"),
        "cross": dict.fromkeys(NEVER_HEARD, "returned") | dict.fromkeys(("truncated", "lost-answer"), "stopped-clean"),
        "config-drive": dict.fromkeys(ALWAYS, "stopped-clean"),
        "chunk": dict.fromkeys(ALWAYS, "returned"),  # the first is fetched before the line
        "later-chunk": dict.fromkeys((*ALWAYS, "stale"), "stopped"),
        "progress": dict.fromkeys((*ALWAYS, "stale"), "running"),
        "report": dict.fromkeys(NEVER_HEARD, "stopped-whole") | dict.fromkeys(("truncated", "lost-answer"), "running"),
        "log": dict.fromkeys(ALWAYS, "running"),
        "call-home": dict.fromkeys(NEVER_HEARD, "unproved") | dict.fromkeys(("truncated", "lost-answer"), "running"),
    }
    cells = []
    for call in (*AGENT, LATER_CHUNK):
        beside = _PACE if call.name == "progress" else ()
        cells += [Cell(call, fault, end, always=True, beside=beside) for fault, end in ends[call.name].items()]
    cells += [Cell(MEDIA, fault, "returned", always=True) for fault in ALWAYS]
    cells += [Cell(CUT, fault, "stopped", always=True) for fault in ("black-hole", "reset", "lost-answer")]
    cells += [Cell(call, "ignored", "returned", always=True) for call in (INSERT, OVERRIDE)]
    cells += [Cell(call, "status", "returned", always=True) for call in (INSERT, OVERRIDE)]
    cells += [Cell(POWER_ON, "ignored", "return-failed", always=True)]
    cells += [Cell(IDENTITY, fault, "returned", always=True) for fault in ("elsewhere", "black-hole", "status")]
    cells += [Cell(LATER, fault, "return-failed", always=True) for fault in ("elsewhere", "black-hole")]
    return cells


# Of these a cell ends within seconds: no time-out, no minute's pause before a step is done again.
_QUICK = {
    "agent": ("latency", "reset", "status", "truncated", "twice", "lost-answer", "stale"),
    "media": ("latency", "twice", "slow"),
    "bmc": ("latency", "status", "truncated", "twice", "lost-answer"),
}


def choose_slice(cells: list[Cell]) -> list[Cell]:
    """Each request once and each fault on each wire, of the cells that end within seconds."""
    quick = [c for c in cells if not c.always and not c.beside and c.ends == "running" and c.fault in _QUICK[c.call.at]]
    chosen: list[Cell] = []
    for call in dict.fromkeys(c.call for c in quick):
        chosen.append(min((c for c in quick if c.call == call), key=lambda c: sum((o.call.at, o.fault) == (call.at, c.fault) for o in chosen)))
    return chosen + [c for c in quick if c.call == MEDIA and c not in chosen]
