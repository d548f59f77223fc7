"""Open pages stay true: fifty runs that move at once, a link that is lost and found, rows that stay where they are looked at."""

import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import requests
from conftest import Open
from operator_site import Site
from person import Person
from playwright.sync_api import Page, expect
from scene import Clock, Script, add_image, add_rack, begin, end, play

from repave.domain.model import Step

NAMES = [f"web{n:02}" for n in range(1, 51)]


@pytest.fixture
def moving(site: Site, clock: Clock) -> str:
    """A batch of fifty, all writing. Its id."""
    add_image(site, "tiny")
    add_rack(site, "r1", NAMES, model="R650", image="tiny")
    batch = begin(site, NAMES, image="tiny")
    play(site, clock, batch, {n: Script([4, 12, 6, 130, 20]) for n in NAMES}, seconds=180)
    return batch


def runs_of(site: Site, batch: str) -> dict[str, str]:
    return {r["server"]: r["id"] for r in site.ask("GET", f"/batches/{batch}").json()["runs"]}


@contextmanager
def all_write(site: Site, clock: Clock, batch: str) -> Iterator[None]:
    """Each of them tells how far it is, again and again."""
    runs, over, total = runs_of(site, batch), threading.Event(), 100_000

    def write() -> None:
        done = 0
        while not over.is_set():
            done += 1
            for run in runs.values():
                clock.add(0.005)
                site.store.runs.record_progress(run, {"stage": "write", "bytes_done": min(total, done * 1000), "bytes_total": total})
            over.wait(0.1)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def order_of(page: Page) -> list[str]:
    ids: list[str] = page.locator("#rows > li").evaluate_all("rows => rows.map(r => r.id)")
    return ids


def test_fifty_runs_move_with_at_most_four_paints_a_second_and_no_row_moves_under_the_pointer(open_page: Open, site: Site, clock: Clock, moving: str) -> None:
    page = open_page(f"/b/{moving}")
    expect(page.locator("#rows > li")).to_have_count(1)
    expect(page.locator("#rows > li")).to_contain_text("web[01-50]")
    page.goto(f"/b/{moving}?unfold=1")
    assert len(order_of(page)) == 50
    page.evaluate("window.paints = []; document.addEventListener('repave:painted', () => paints.push(performance.now()))")
    with all_write(site, clock, moving):
        page.wait_for_timeout(3000)
        paints = page.evaluate("paints")
        percents = page.locator("#rows .text").evaluate_all("all => all.filter(t => / [1-9][0-9]* %/.test(t.textContent)).length")
    assert percents == 50
    assert 3 <= len(paints) <= 14 and all(late - early > 100 for early, late in itertools.pairwise(paints)), paints

    page.locator("#row-web40").hover()
    before, run = order_of(page), runs_of(site, moving)["web45"]
    y = page.locator("#row-web40").bounding_box()
    end(site, run, "read-back")
    expect(page.locator("#row-web45")).to_have_class("row failed")
    assert order_of(page) == before
    page.mouse.move(5, 5)
    expect(page.locator("#rows > li").first).to_have_id("row-web45")
    expect(page.locator("#failures h2")).to_contain_text("1 × Repave.3109")
    assert y is not None

    page.locator("#row-web50 a").focus()
    before = order_of(page)
    end(site, runs_of(site, moving)["web49"], "read-back")
    expect(page.locator("#row-web49")).to_have_class("row failed")
    assert order_of(page) == before and page.evaluate("document.activeElement.textContent") == "web50"


def test_a_change_is_spoken_as_one_sentence_of_counts_and_not_at_each_tick(open_page: Open, site: Site, clock: Clock, moving: str) -> None:
    page = open_page(f"/b/{moving}")
    page.evaluate("""window.said = [];
        new MutationObserver(() => said.push(document.getElementById('said').textContent)).observe(
            document.getElementById('said'), {childList: true, characterData: true, subtree: true})""")
    with all_write(site, clock, moving):
        page.wait_for_timeout(1500)
    end(site, runs_of(site, moving)["web45"], "read-back")
    expect(page.locator("#said")).to_have_text("49 working, 1 failed")
    assert page.evaluate("said") == ["49 working, 1 failed"]


def test_what_is_paused_stays_and_goes_on_with_all_that_happened(open_page: Open, site: Site, moving: str) -> None:
    page = open_page(f"/b/{moving}")
    expect(page.locator("#live")).to_have_text("● live")
    page.keyboard.press("p")
    expect(page.locator("#live")).to_contain_text("paused at")
    end(site, runs_of(site, moving)["web45"], "read-back")
    page.wait_for_timeout(700)
    expect(page.locator("#counts")).not_to_contain_text("failed")
    page.keyboard.press("p")
    expect(page.locator("#counts")).to_contain_text("1 failed")


def messages(person: Person, path: str, seconds: float, **headers: str) -> list[tuple[str, str, str]]:
    """What a stream says in so many seconds: event, id, data."""
    found: list[tuple[str, str, str]] = []
    fields: dict[str, str] = {}
    with person.session.get(person.url + path, headers=headers, stream=True, timeout=(5, seconds)) as answer:
        assert answer.status_code == 200
        give_up_at = time.monotonic() + seconds
        try:
            for line in answer.iter_lines(chunk_size=1, decode_unicode=True):
                name, _, value = line.partition(": ")
                if line:
                    fields[name] = value
                elif "event" in fields:
                    found.append((fields["event"], fields.get("id", ""), fields["data"]))
                    fields = {}
                if time.monotonic() > give_up_at or found:
                    break
        except requests.ConnectionError:
            pass
    return found


def test_who_comes_back_with_what_they_saw_is_sent_nothing_where_nothing_changed_and_else_all_of_it(site: Site, moving: str) -> None:
    ann = Person(site.url)
    ann.log_in()
    ((event, first, body),) = messages(ann, f"/live/b/{moving}", 3)
    assert event == "frame" and "1 failed" not in body
    assert messages(ann, f"/live/b/{moving}", 3, **{"Last-Event-ID": first})[0][0] == "beat"
    end(site, runs_of(site, moving)["web45"], "read-back")
    ((event, second, body),) = messages(ann, f"/live/b/{moving}", 3, **{"Last-Event-ID": first})
    assert (
        event == "frame"
        and second != first
        and "web45" in json.loads(body)["parts"]["f-Repave-3109-" + json.loads(body)["lists"]["failures"][0].rpartition("-")[2]]
    )


def test_a_stream_ends_when_its_login_does(site: Site, clock: Clock, moving: str) -> None:
    ann = Person(site.url)
    ann.log_in()
    token = ann.form_token("/")
    with ann.session.get(f"{site.url}/live/b/{moving}", stream=True, timeout=(5, 15)) as answer:
        lines = answer.iter_lines(chunk_size=1)
        next(lines)
        ann.post("/logout", {"form": token})
        began = time.monotonic()
        for _ in lines:  # ends by itself
            pass
        assert time.monotonic() - began < 12


def test_a_new_event_does_not_push_the_row_that_is_pointed_at(open_page: Open, site: Site, moving: str) -> None:
    page = open_page("/events")
    expect(page.locator("#live")).to_have_text("● live")
    row = page.locator("#audit tr").nth(3)
    row.hover()
    before = row.bounding_box()
    site.store.runs.record_step(runs_of(site, moving)["web01"], Step.BOOT_NEW_OS)
    expect(page.locator("#audit tr").last).to_contain_text("boot-new-os")
    assert row.bounding_box() == before
    page.mouse.move(5, 5)
    expect(page.locator("#audit tr").first).to_contain_text("boot-new-os")
