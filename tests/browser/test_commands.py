"""Each page shows the command that does what its button does, and the pasted command does it: asked of the command line itself and of the site."""

import html
import io
import json
import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from operator_site import NEW_PASSWORD, Site
from person import Person
from scene import Clock, Script, add_image, add_person, add_rack, begin, end, play

from repave.cli.main import build_app, run
from repave.domain.model import Role

Json = dict[str, Any]
ALL = ["web01", "web02", "web03", "web04"]
# A button by what it asks for -> the beginning of the command that is on the same page.
BUTTONS = {
    r'formaction="/b/(\S+)/pause"': "repave batch pause {}",
    r'formaction="/b/(\S+)/resume"': "repave batch resume {}",
    r'href="/b/(\S+)/cancel"': "repave cancel {}",
    r'action="/b/(\S+)/cancel"': "repave cancel {}",
    r'href="/plan\?retry=(\S+?)"': "repave batch retry {}",
    r'formaction="/s/(\S+)/unlock"': "repave server unlock {}",
    r'class="button" href="/lock\?servers=(\S+?)"': "repave server lock {} --reason",
    r'class="button" href="/plan\?servers=(\S+?)&amp;rehearse=1"': "repave reinstall {} --rehearse",
    r'class="button" href="/plan\?servers=([^&"]+)"': "repave reinstall {} --plan-only",
    r'method="post" action="/lock"()': "repave server lock ",
    r'method="post" action="/reinstall"()': "repave ",
    r'id="choose" method="get" action="/plan"()': "repave reinstall ",
}


@pytest.fixture
def ann(site: Site) -> Person:
    person = Person(site.url)
    person.log_in()
    return person


@pytest.fixture
def small(site: Site) -> Site:
    add_image(site, "tiny")
    add_image(site, "tiny-2", digest="01aa")
    add_rack(site, "r1", ALL, model="R650", image="tiny")
    return site


@pytest.fixture
def paste(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., None]]:
    """A command as it stands on a page, and what a script adds where a person would be asked."""
    monkeypatch.setenv("REPAVE_ENDPOINT", site.url)
    monkeypatch.setenv("REPAVE_TOKEN", site.tokens["operator"])
    monkeypatch.setenv("REPAVE_NEW_PASSWORD", NEW_PASSWORD)

    def paste(command: str, *more: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO())
        assert run([*shlex.split(command)[1:], *more]) == 0, (command, capsys.readouterr())

    yield paste


def commands(text: str) -> list[str]:
    found = [html.unescape(re.sub("<[^>]*>", "", code)) for code in re.findall(r"<code[^>]*>(.*?)</code>", text, re.S)]
    return [code for code in found if code.startswith("repave")]


def command_on(person: Person, path: str, beginning: str) -> str:
    answer = person.get(path)
    found = [command for command in commands(answer.text) if command.startswith(beginning)]
    assert found, (path, beginning, re.sub("<[^>]*>", "", answer.text))
    return found[0]


def test_q14_every_page_has_the_commands_of_its_buttons_and_the_command_line_knows_them(small: Site, clock: Clock, ann: Person) -> None:
    pages = {path: ann.get(path).text for path in ("/", "/b", "/i", "/events", "/login", "/s/web01", "/lock?servers=web[01-02]", "/plan?servers=web[01-02]")}
    pages |= {path: ann.get(path).text for path in ("/plan?servers=web01&rehearse=1&image=tiny-2&canary=1&at_once=2&max_failed=0", "/errors/Repave.2110")}
    batch = begin(small, ALL, image="tiny", at_once=2)
    play(small, clock, batch, {"web01": Script([4, 12, 6, 130], "boot_override_ignored"), "web02": Script([4, 12, 6, 130, 40])}, seconds=180)
    late = ["/b", f"/b/{batch}", f"/b/{batch}/cancel", f"/plan?retry={batch}", "/s/web01", "/s/web01/console", "/s/web02"]
    pages |= {f"{path} under way": ann.get(path).text for path in late}
    ann.send(f"/b/{batch}/pause", {})
    ann.send("/lock", {"servers": "web01", "reason": "mine"})
    pages |= {f"{path} paused, locked": ann.get(path).text for path in (f"/b/{batch}", "/s/web01")}
    seen, missing, unknown = set(), [], []
    for path, text in pages.items():
        shown = commands(text)
        for command in shown:
            try:
                build_app().parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)
            except Exception as error:
                unknown.append(f"{path}: {command}: {error}")
        for button, wanted in BUTTONS.items():
            for of in re.findall(button, text):
                seen.add(button)
                if not any(command.startswith(wanted.format(html.unescape(of))) for command in shown):
                    missing.append(f"{path}: {wanted.format(of)}: {shown}")
    assert (missing, unknown, set(BUTTONS) - seen) == ([], [], set())


def test_q14_a_command_names_the_project_that_its_page_shows(small: Site) -> None:
    small.bmcs.known["https://db07.bmc.invalid"] = "SN99"
    small.add_server("db07", project=small.other)
    add_person(small, "root", Role.ADMIN)
    root = Person(small.url)
    root.log_in("root")
    shown = [
        command for path in ("/?project=other", "/b", "/i", "/s/db07", "/lock?servers=db07", "/plan?servers=db07") for command in commands(root.get(path).text)
    ]
    assert len(shown) >= 9 and [command for command in shown if not command.endswith(" --project other")] == []
    for command in shown:
        build_app().parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)


# ---- the same request ----


def happened(site: Site, act: Callable[[], object]) -> list[Json]:
    """What the audit has of an act, without who, when and which."""
    before = site.store.events.last_seq(site.project.id)
    act()
    events: list[Json] = site.ask("GET", "/events", params={"after": before, "limit": 100}).json()["items"]
    events.sort(key=lambda event: str(event.get("server", "")))  # the command line locks several at once
    volatile = ("seq", "at", "actor", "batch", "run", "mac")
    told = [{k: v for k, v in event.items() if k not in volatile} for event in events]
    same: list[Json] = json.loads(json.dumps(told).replace("by ann", "by them").replace("by the operator", "by them"))
    return same


def newest(site: Site) -> Json:
    found: Json = site.ask("GET", f"/batches/{site.ask('GET', '/batches').json()['items'][0]['id']}").json()
    return {name: found[name] for name in ("rehearse", "image", "canary", "at_once", "max_failed")} | {"servers": sorted(r["server"] for r in found["runs"])}


def let_end(site: Site) -> None:
    """What is under way ends, and its servers are free."""
    for live in site.store.runs.list_runs(project_id=site.project.id, live=True):
        end(site, live.id, "boot_override_ignored")


def press(person: Person, path: str, action: str, **typed: str) -> None:
    """The form of this page, sent with what a person typed in."""
    [form] = re.findall(rf'<form method="post" action="{re.escape(action)}".*?</form>', person.get(path).text, re.S)
    hidden = {name: html.unescape(value) for name, value in re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', form)}
    answer = person.post(action, hidden | typed)
    assert answer.status_code == 303, answer.text


def test_q14_a_lock_and_an_unlock_are_the_same_from_the_page_and_from_its_command(small: Site, ann: Person, paste: Callable[..., None]) -> None:
    path = "/lock?servers=web[01-02]"
    by_page = happened(small, lambda: press(ann, path, "/lock", reason="mine"))
    off_by_page = happened(small, lambda: [ann.send(f"/s/{name}/unlock", {}) for name in ("web01", "web02")])
    assert happened(small, lambda: paste(command_on(ann, path, "repave server lock").replace("TEXT", "mine"))) == by_page
    assert happened(small, lambda: [paste(command_on(ann, f"/s/{name}", "repave server unlock")) for name in ("web01", "web02")]) == off_by_page
    assert [e["type"] for e in by_page + off_by_page] == ["server.locked"] * 2 + ["server.unlocked"] * 2


def test_q14_pause_go_on_and_cancel_are_the_same_from_the_page_and_from_its_commands(small: Site, ann: Person, paste: Callable[..., None]) -> None:
    batch = begin(small, ALL, image="tiny", at_once=2)
    by_page = [happened(small, lambda verb=verb: ann.send(f"/b/{batch}/{verb}", {})) for verb in ("pause", "resume")]  # type: ignore[misc]
    paste_in = [happened(small, lambda verb=verb: paste(command_on(ann, f"/b/{batch}", f"repave batch {verb}"))) for verb in ("pause", "resume")]  # type: ignore[misc]
    assert paste_in == by_page and [e[0]["type"] for e in by_page] == ["batch.paused", "batch.resumed"]
    cancelled = happened(small, lambda: press(ann, f"/b/{batch}/cancel", f"/b/{batch}/cancel"))
    let_end(small)
    again = begin(small, ALL, image="tiny", at_once=2)
    assert happened(small, lambda: paste(command_on(ann, f"/b/{again}/cancel", "repave cancel"), "--yes")) == cancelled
    assert [e["type"] for e in cancelled].count("run.cancelled") == 4


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("servers=web[01-02]&image=tiny-2&rehearse=1", "rehearse 2"),
        ("servers=web[01-03]!web02&image=tiny-2&canary=1&at_once=2&max_failed=0", "erase 2"),
        ("servers=web04", "erase 1"),
    ],
)
def test_q14_a_reinstall_is_the_same_from_the_page_and_from_its_command(small: Site, ann: Person, paste: Callable[..., None], asked: str, words: str) -> None:
    path, made = f"/plan?{asked}", []
    password = {} if "rehearse" in words else {"password": NEW_PASSWORD, "again": NEW_PASSWORD}
    by_page = happened(small, lambda: press(ann, path, "/reinstall", words=words, **password))
    made.append(newest(small))
    let_end(small)
    command = command_on(ann, path, "repave reinstall")
    assert happened(small, lambda: paste(command, "--yes", "--expect", words.split()[1], "--detach")) == by_page
    made.append(newest(small))
    assert made[0] == made[1] and made[0]["rehearse"] is ("rehearse" in words)


def test_q14_a_retry_is_the_same_from_the_page_and_from_its_command(small: Site, clock: Clock, ann: Person, paste: Callable[..., None]) -> None:
    batch = begin(small, ["web01", "web02"], image="tiny-2")
    play(
        small, clock, batch, {"web01": Script([4, 12, 6, 130], "boot_override_ignored"), "web02": Script([4, 12, 6, 130, 40, 90, 70, 8], "proved")}, seconds=500
    )
    made = []
    by_page = happened(small, lambda: press(ann, f"/plan?retry={batch}", "/reinstall", words="erase 1", password=NEW_PASSWORD, again=NEW_PASSWORD))
    made.append(newest(small))
    let_end(small)  # as badly: then that batch may be retried in its turn
    path = f"/plan?retry={small.ask('GET', '/batches').json()['items'][0]['id']}"
    assert happened(small, lambda: paste(command_on(ann, path, "repave batch retry"), "--yes", "--expect", "1", "--detach")) == by_page
    made.append(newest(small))
    assert made[0] == made[1] and made[0]["servers"] == ["web01"]
