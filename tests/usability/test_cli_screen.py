"""Fifty servers on a screen of 24 rows: a real terminal (tmux), the real API and store; the runs are moved by hand."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from operator_site import NEW_PASSWORD, Site, start_site
from tmux_screen import Screen, open_screen

from repave.cli.client import Client, Endpoint
from repave.cli.following import follow_lines
from repave.domain.model import RunRow, Step
from repave.domain.states import Ending
from repave.errors import CATALOGUE, RepaveError

REPAVE = [sys.executable, "-m", "repave.cli.main"]
SERVERS = 50
FAILURES = [slug for slug in CATALOGUE if slug not in ("cancelled", "batch-stopped")]


class Fifty:
    """A batch of fifty runs, each where the test wants it."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.names = [f"web{n:02}" for n in range(1, SERVERS + 1)]
        body = {"servers": self.names, "image": "tiny", "password": NEW_PASSWORD, "max_failed": 49}
        self.batch = site.ask("POST", "/reinstall", json=body).json()["id"]
        by_id = {s.id: s.name for s in site.store.servers.list_servers(site.project.id)[0]}
        self.runs: dict[str, RunRow] = {by_id[r.server_id]: r for r in site.store.runs.list_runs(batch_id=self.batch)}

    def step(self, name: str, step: Step) -> None:
        self.site.store.runs.record_step(self.runs[name].id, step)

    def end(self, name: str, error: RepaveError | None = None) -> None:
        self.step(name, Step.BOOT_RAMDISK)
        ending = Ending.RETURNED if error else Ending.PROVED
        self.site.store.runs.record_ending(self.runs[name].id, ending, error.as_json() if error else None)

    def spread(self) -> None:
        """Twenty-two failures, each of a kind of its own; five kinds of what is under way; ten that run; the rest has not begun."""
        for n, name in enumerate(self.names[:22]):
            self.end(name, RepaveError(FAILURES[n]))
        for name, step in zip(self.names[22:32], [s for s in Step for _ in (1, 2)][:10], strict=False):
            self.step(name, step)
        for name in self.names[32:42]:
            self.end(name)

    def env(self) -> dict[str, str]:
        return {"REPAVE_ENDPOINT": self.site.url, "REPAVE_TOKEN": self.site.tokens["admin"]}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with start_site(tmp_path_factory.mktemp("screen") / "site") as site:
        for n in range(1, SERVERS + 1):
            site.add_server(f"web{n:02}", root_disk=f"serial=S{n}")
        site.add_image("tiny")
        yield site


@pytest.fixture
def fifty(site: Site) -> Iterator[Fifty]:
    batch = Fifty(site)
    yield batch
    for run in site.store.runs.list_runs(live=True):  # so that the next test may have a batch of its own
        site.store.runs.record_ending(run.id, Ending.RETURNED, None)


def wait_for_a_frame(screen: Screen) -> None:
    """One that was drawn from now on, keys read before it: the next change may be of one that was under way."""
    for _ in range(2):
        before = screen.read()
        screen.wait_until(lambda lines, before=before: lines != before, "another frame")


def counts_of(lines: list[str]) -> dict[str, int]:
    line = next(line for line in lines if " %   " in line)
    return {name: int(number) for name, number in re.findall(r"(running|working|waiting|failed) (\d+)", line)}


def test_fifty_servers_never_flood_a_screen_of_24_rows_and_every_count_is_visible(fifty: Fifty, tmp_path: Path) -> None:
    fifty.spread()
    with open_screen([*REPAVE, "watch"], env=fifty.env(), cwd=tmp_path) as screen:
        lines = screen.wait_for("and ")
        assert counts_of(lines) == {"running": 10, "working": 10, "waiting": 8, "failed": 22}
        assert next(line for line in lines if "✗" in line) and lines.index(next(line for line in lines if "▶" in line or "and " in line)) > 2
        more = next(line for line in lines if re.search(r"and \d+ more", line))
        shown = sum(1 for line in lines if line.lstrip().startswith("✗"))
        assert f"{22 - shown} failed" in more and "10 running" in more and "8 waiting" in more
        for name in fifty.names[22:32]:
            fifty.end(name)
        lines = screen.wait_for("running 20")
        time.sleep(2.5)  # some more frames
        assert len(screen.read()) <= 24
        assert len(screen.read(whole=True)) <= 25, "frames were left behind in the scrollback"
        assert sum("50 servers · tiny" in line for line in screen.read(whole=True)) == 1
        for name in fifty.names[42:]:
            fifty.end(name)
        screen.wait_for("EXIT=10")
        whole = screen.read(whole=True)
    frames = [line for line in whole if "█" in line]
    assert len(frames) == 1 and "running 28" in frames[0] and "failed 22" in frames[0], "the last frame stays, once"
    assert len(whole) < 150


def test_failures_that_differ_in_words_alone_share_a_row_and_a_block(fifty: Fifty, tmp_path: Path) -> None:
    for n, name in enumerate(fifty.names):
        fifty.end(name, RepaveError("media_rejected", f"The BMC said {n}.") if n < 22 else None)
    with open_screen([*REPAVE, "watch"], env=fifty.env(), cwd=tmp_path) as screen:
        lines = screen.wait_for("EXIT=10")
    assert sum("✗ web[01-22]" in line for line in lines) == 2, lines  # in the last frame, and in the summary
    assert any("The BMC said 0. (21 others beside it" in line for line in lines)


def test_without_colour_and_on_a_narrow_screen_each_state_is_a_glyph_and_a_word(fifty: Fifty, tmp_path: Path) -> None:
    fifty.end("web01", RepaveError("media_rejected"))
    fifty.step("web02", Step.POWER_OFF)
    fifty.end("web03")
    with open_screen([*REPAVE, "watch"], columns=80, rows=12, env=fifty.env() | {"NO_COLOR": "1"}, cwd=tmp_path) as screen:
        lines = screen.wait_for("waiting 47")
        coloured = "\n".join(screen.read(colours=True))
    rows = "\n".join(lines)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", coloured)
    for glyph, server, word in (
        ("✗", "web01", "4/8 boot-ramdisk"),
        ("▶", "web02", "2/8 power-off"),
        ("✓", "web03", "running tiny"),
        ("·", "web[04-50]", "waiting"),
    ):
        assert re.search(rf"{glyph} {re.escape(server)}\s+{word}", rows), rows
    assert all(len(line) <= 80 for line in lines)


# ---- keys ----


def rows_of(lines: list[str]) -> list[str]:
    """The rows of servers on a screen."""
    return [line for line in lines if re.match(r"[✗▲▶✓·-] web", line)]


def test_keys_show_the_failed_only_and_each_server_and_never_more_rows_than_the_screen_has(fifty: Fifty, tmp_path: Path) -> None:
    for name in fifty.names[:3]:
        fifty.end(name, RepaveError("media_rejected"))
    for name in fifty.names[3:10]:
        fifty.end(name)
    with open_screen([*REPAVE, "watch"], env=fifty.env(), cwd=tmp_path) as screen:
        first = screen.wait_for("f failed · u unfold · p pause · ? keys")
        assert len(rows_of(first)) == 3
        screen.type("f")
        assert [row[:14] for row in rows_of(screen.wait_for("f all"))] == ["✗ web[01-03]  "]
        screen.type("u")
        assert [row[:7] for row in rows_of(screen.wait_for("u fold"))] == ["✗ web01", "✗ web02", "✗ web03"]
        screen.type("f")
        lines = screen.wait_for("f failed")
        more = next(line for line in lines if re.search(r"and \d+ more", line))
        shown = len(rows_of(lines))
        assert 10 < shown < 24 and f"and {50 - shown} more   {43 - shown} waiting · 7 running" in more
        screen.type("?")
        assert any("pause what has not begun" in line for line in screen.wait_for("stop watching; the batch goes on"))
        time.sleep(1.5)  # another frame
        assert len(screen.read()) <= 24 and len(screen.read(whole=True)) <= 25
        screen.type("?", "Up", "x")
        for name in fifty.names[10:]:
            fifty.end(name)
        screen.wait_for("EXIT=10")
        whole = "\n".join(screen.read(whole=True))
    assert "✓ web[04-50]" in whole and "? keys" not in whole and "Ctrl-C  stop" not in whole, "what stays is folded, and names no key"


def test_p_pauses_the_batch_and_lets_it_go_on_and_a_viewer_is_refused_in_one_line(fifty: Fifty, tmp_path: Path) -> None:
    def is_paused() -> bool:
        return fifty.site.ask("GET", f"/batches/{fifty.batch}").json()["paused_at"] is not None

    with open_screen([*REPAVE, "watch"], env=fifty.env(), cwd=tmp_path) as screen:
        screen.wait_for("? keys")
        screen.type("-l", "repave batch ls")  # pasted, for the shell
        wait_for_a_frame(screen)  # what is typed while it was not read would belong to it
        screen.type("u")
        screen.wait_for("u fold")
        assert not is_paused()
        screen.type("p")
        assert "Paused: 50 wait, 0 under way go on." in screen.wait_for("p resume") and is_paused()
        screen.type("p")
        assert "It goes on." in screen.wait_for("p pause") and not is_paused()
    with open_screen([*REPAVE, "watch"], env=fifty.env() | {"REPAVE_TOKEN": fifty.site.tokens["viewer"]}, cwd=tmp_path) as screen:
        screen.wait_for("? keys")
        screen.type("p")
        said = [line for line in screen.wait_for("Not paused") if "Not paused" in line]
        assert len(said) == 1 and "needs the role operator" in said[0] and not is_paused()


def test_without_a_terminal_to_read_from_there_are_no_keys(fifty: Fifty, tmp_path: Path) -> None:
    with open_screen(["sh", "-c", f"{shlex.join([*REPAVE, 'watch'])} </dev/null"], env=fifty.env(), cwd=tmp_path) as screen:
        lines = screen.wait_for("waiting 50")
        screen.type("f")
        time.sleep(1.5)
        assert "? keys" not in "\n".join(lines + screen.read()) and rows_of(screen.read())


@pytest.mark.parametrize(("end", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), ("not-allowed", 4)])
def test_the_terminal_is_left_as_it_was_found_however_the_watching_ends(fifty: Fifty, tmp_path: Path, end: signal.Signals | str, code: int) -> None:
    key = fifty.site.ask("POST", "/keys", json={"name": "short-lived", "role": "viewer"}).json()
    env = {k: v for k, v in os.environ.items() if k != "CI" and not k.startswith("REPAVE_")} | fifty.env() | {"REPAVE_TOKEN": key["token"], "TERM": "xterm"}
    person, terminal = pty.openpty()
    before, seen = termios.tcgetattr(terminal), bytearray()

    def sit_down() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def read() -> None:
        with contextlib.suppress(OSError):
            while piece := os.read(person, 4096):
                seen.extend(piece)

    watcher = subprocess.Popen(
        [*REPAVE, "watch"], stdin=terminal, stdout=terminal, stderr=terminal, env=env, cwd=tmp_path, start_new_session=True, preexec_fn=sit_down
    )
    reader = threading.Thread(target=read)
    reader.start()
    try:
        wait_until(lambda: b"? keys" in seen)
        assert not termios.tcgetattr(terminal)[3] & (termios.ICANON | termios.ECHO)
        if isinstance(end, str):
            fifty.site.ask("DELETE", f"/keys/{key['id']}")
        else:
            watcher.send_signal(end)
        assert watcher.wait(15) == code, bytes(seen).decode()
        assert termios.tcgetattr(terminal) == before
        wait_until(lambda: seen.rfind(b"\x1b[?25h") > seen.rfind(b"\x1b[?25l"))  # the cursor is shown again
    finally:
        watcher.kill()
        watcher.wait()
        os.close(terminal)
        reader.join()
        os.close(person)


def test_after_ctrl_z_and_fg_the_table_and_its_keys_are_there_again(fifty: Fifty, tmp_path: Path) -> None:
    fifty.spread()
    with open_screen(["bash", "--norc", "-i"], env=fifty.env() | {"PS1": "ready> "}, cwd=tmp_path) as screen:
        screen.wait_for("ready>")
        screen.type(f"{shlex.join(REPAVE)} watch", "Enter")
        screen.wait_for("? keys")
        screen.type("C-z")
        screen.wait_for("Stopped")
        screen.type("echo shell-$((40+2))", "Enter")  # the shell shows what is typed into it
        screen.wait_for("$((40+2))")
        screen.wait_for("shell-42")
        screen.type("clear; fg", "Enter")
        screen.wait_until(lambda lines: "shell-42" not in lines and any("? keys" in line for line in lines), "the table on a cleared screen")
        screen.type("?")
        screen.wait_for("failed runs only")
        assert len(screen.read()) <= 24
        screen.type("C-c")
        screen.wait_for("ready>")


def wait_until(holds: Callable[[], bool], *, deadline_s: float = 15.0) -> None:
    end = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_in_a_pipe_there_is_a_line_a_change_and_no_escape_code(fifty: Fifty, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("REPAVE_")} | fifty.env()
    watcher = subprocess.Popen([*REPAVE, "watch"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path)
    try:
        assert watcher.stdout is not None
        assert re.fullmatch(r"\d\d:\d\d:\d\dZ web\[01-50\] waiting( \(.*\))?\n", watcher.stdout.readline())
        for name in fifty.names:
            fifty.end(name)
        out, err = watcher.communicate(timeout=30)
    finally:
        watcher.kill()
    assert watcher.returncode == 0 and "\x1b" not in out + err
    assert len(out.splitlines()) < 12, out


def test_silence_is_broken_by_a_heartbeat_with_every_count(fifty: Fifty, capsys: pytest.CaptureFixture[str]) -> None:
    fifty.end("web01")
    client = Client(None, Endpoint(fifty.site.url, fifty.site.tokens["admin"]))
    assert follow_lines(client, fifty.batch, time.monotonic() + 2.5, heartbeat_s=1.0) is None
    beats = [line for line in capsys.readouterr().out.splitlines() if "waiting=49" in line]
    assert beats and re.search(rf"Z {fifty.batch} \d+% running=1 working=0 waiting=49 failed=0", beats[0])


@pytest.mark.parametrize(("mode", "lines"), [("none", 0), ("plain", 1), ("json", 1)])
def test_progress_can_be_chosen(fifty: Fifty, tmp_path: Path, mode: str, lines: int) -> None:
    def watch(*argv: str) -> subprocess.CompletedProcess[Any]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("REPAVE_")} | fifty.env()
        return subprocess.run([*REPAVE, "watch", *argv], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=30)

    seen = watch("--timeout", "1", "--progress", mode)
    assert seen.returncode == 124 and min(len(seen.stdout.splitlines()), 1) == lines
    assert watch("--progress", "loud").returncode == 2
    quiet = watch("-q", "--timeout", "1")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (124, "", "")
