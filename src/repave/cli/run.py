"""One server's run: its steps, on which side of the line it is, its proof, and the runs before it."""

from __future__ import annotations

from repave.cli.client import Client
from repave.cli.options import Project
from repave.cli.output import Exit, Json, show, show_json
from repave.domain.model import Step
from repave.errors import RequestError
from repave.folding import GLYPHS, LATE, duration, parse_time, row_cells, size, took

_LINE_BEFORE = Step.WRITE_IMAGE


def run(server: str, /, *, attempt: int | None = None, project: Project = None, json: bool = False) -> int:
    """The newest run of a server (its name or id): steps, attempts, proof; or what an earlier one was.

    Parameters
    ----------
    attempt
        Which of its runs: 1 is the oldest that is listed. Default: the newest.
    json
        The run with all that is known of it; `attempts` are its earlier and later ones.
    """
    runs = Client(project).items("/runs", server=server, limit=100)
    if not runs:
        raise RequestError("not-found", f"{server} was never reinstalled by Repave.", kind="run")
    if attempt is not None and not 1 <= attempt <= len(runs):
        raise RequestError("not-found", f"{server} has {len(runs)} runs.", kind="run")
    number = attempt or len(runs)
    chosen = runs[len(runs) - number]
    if json:
        attempts = [{"attempt": len(runs) - n} | {k: r[k] for k in ("id", "batch", "state", "started_at", "ended_at", "error")} for n, r in enumerate(runs)]
        show_json(chosen | {"attempt": number, "attempts": attempts[::-1]})
    else:
        show("\n".join([*_head(chosen, number, len(runs)), *_steps(chosen), *_end(chosen), *_others(runs, number)]))
        show(f"Next: {_next(chosen)}")
    return Exit.OK


def _head(run: Json, number: int, total: int) -> list[str]:
    side = "past the line: the old OS is gone" if run["past_the_line"] else "before the line: its root disk is untouched"
    glyph = LATE if run["late"] else GLYPHS[run["state"]]
    return [f"{glyph} {run['server']}  {run['state']} · {side} · attempt {number} of {total} · batch {run['batch']}"]


def _steps(run: Json) -> list[str]:
    lines = []
    for step in Step:
        if step is _LINE_BEFORE:
            lines.append(f"  ═══ the line, {'crossed' if run['past_the_line'] else 'not crossed'} ═══")
        seconds = run["durations_s"].get(step.value)
        at = step.value == run["step"]
        if at and run["state"] in ("working", "failed", "cancelled") and run["started_at"]:
            glyph = LATE if run["late"] else GLYPHS[run["state"]]
        else:
            glyph = "✓" if step.number < run["step_index"] or (run["state"] == "running") else "·"
        now = "  " + "  ".join(filter(None, row_cells([run])[1:])) if at and run["state"] == "working" else ""
        lines.append(f"  {glyph} {step.number} {step.value:12} {duration(seconds) if seconds is not None else '':>7}{now}".rstrip())
    return lines


def _end(run: Json) -> list[str]:
    error, proof = run["error"], run["proof"]
    if error:
        said = ("cause", "untouched", "do")
        return [f"  {error['code']} {error['title']}", *(f"      {name:10} {error[name]}" for name in said if error.get(name))]
    if run["state"] == "running":
        written = f", {size(run['bytes_written'])} written" if run["bytes_written"] else ""
        serial = (proof or {}).get("root_disk_serial") or run["disk_serial"]
        return [f"  runs {run['os_now'] or 'the image'} after {took([run])}{written}", f"      proof      the new OS called home from root disk {serial}"]
    return [f"  waits for {run['waits_for']}"] if run["waits_for"] else []


def _others(runs: list[Json], number: int) -> list[str]:
    lines = []
    for n, run in enumerate(reversed(runs), 1):
        if n != number:
            code = f" {run['error']['code']} {run['error']['title']}" if run["error"] else ""
            lines.append(f"  attempt {n}  {parse_time(run['created_at']):%Y-%m-%d %H:%MZ}  {run['state']}{code}")
    return lines[-5:]


def _next(run: Json) -> str:
    if run["state"] in ("working", "waiting"):
        return f"repave watch {run['batch']}"
    return f"repave batch retry {run['batch']}" if run["error"] else f"repave server show {run['server']}"
