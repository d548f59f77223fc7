"""The pages in a real browser: what is shown, what can be done with it, and that it is shown to everybody."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import Open, log_in
from operator_site import NEW_PASSWORD, Site, start_site
from playwright.sync_api import Browser, Page, expect
from scene import Clock, Script, add_image, add_person, add_rack, begin, break_a_row, busy_day, play

from repave.domain.model import Role

PICTURES = Path("docs/pictures")
ALL_RULES = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}}
WIDTH_RULES = {"runOnly": {"type": "rule", "values": ["target-size", "scrollable-region-focusable", "link-in-text-block"]}}  # colours are the same
COLOUR_RULES = {"runOnly": {"type": "rule", "values": ["color-contrast"]}}  # the same in each width
VARIANTS = ("fleet-table", "batch-table", "server-working")  # of pages that are looked at four times
TALL = 3000  # nothing is under the strip at the foot: axe takes what is half covered for a target too small
SHOWN = ("fleet-light-1366", "batch-light-1366", "batch-dark-1366", "batch-light-390", "server-light-1366", "plan-light-1366")


# ---- a busy day, looked at ----


class Day:
    """A site in the middle of its day; nothing changes in it."""

    def __init__(self, site: Site, batch: str) -> None:
        self.site, self.batch = site, batch
        self.pages = {
            "fleet": "/", "fleet-table": "/?view=table&q=web[01-09]", "batches": "/b", "batch": f"/b/{batch}", "batch-table": f"/b/{batch}?view=table",
            "server": "/s/web07", "server-working": "/s/web09", "images": "/i", "audit": "/events", "plan": "/plan?servers=web[15-20]&image=deb12-gpu",
            "cancel": f"/b/{batch}/cancel", "lock": "/lock?servers=web20", "error": "/s/nobody",
            "console": "/s/web07/console", "explain": "/errors/Repave.2110",
        }  # fmt: skip


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Day]:
    clock = Clock()
    with start_site(tmp_path_factory.mktemp("day"), now=clock) as site:
        add_person(site, "ann")
        yield Day(site, busy_day(site, clock))


def test_every_page_is_fit_for_everybody_in_both_colours_and_widths_and_fits_its_window(browser: Browser, day: Day) -> None:
    """axe finds nothing, nothing is wider than the window. With REPAVE_PICTURES=1 those that are shown are in docs/pictures; =FOLDER has all."""
    context = browser.new_context(base_url=day.site.url)
    page, found = context.new_page(), dict[str, list[str]]()
    for name, path in {"login": "/login", **day.pages}.items():
        page.emulate_media(color_scheme="light")
        page.set_viewport_size({"width": 1366, "height": TALL})
        if name == "fleet":
            log_in(page, day.site.url)
        page.goto(path)
        found |= {f"{name}, light, 1366": faults(page, Axe().run(page, options=ALL_RULES).response)}  # leaves axe in the page
        picture(page, f"{name}-light-1366")
        if name in VARIANTS:
            continue
        for scheme, width, rules in (("light", 390, WIDTH_RULES), ("dark", 390, COLOUR_RULES), ("dark", 1366, None)):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            page.set_viewport_size({"width": width, "height": TALL})
            if rules is not None:
                found[f"{name}, {scheme}, {width}"] = faults(page, page.evaluate("rules => axe.run(rules)", rules))
            picture(page, f"{name}-{scheme}-{width}")
    context.close()
    said = [f"{name}: {fault}" for name, of in found.items() for fault in of]
    assert len(found) == 3 * 16 - 2 * len(VARIANTS) and not said, "\n".join(said[:: max(1, len(said) // 25)])


def faults(page: Page, response: dict[str, Any]) -> list[str]:
    wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    found = [f"{v['id']}: {n['html'][:120]} {n['failureSummary'][:200]}" for v in response["violations"] for n in v["nodes"]]
    return found + ([f"{wide} px too wide"] if wide > 0 else [])


def picture(page: Page, name: str) -> None:
    wanted = os.environ.get("REPAVE_PICTURES", "")
    folder = PICTURES if wanted == "1" else Path(wanted)
    if wanted and (name in SHOWN or wanted != "1"):
        folder.mkdir(parents=True, exist_ok=True)
        page.set_viewport_size({"width": int(name.rpartition("-")[2]), "height": 768})
        page.wait_for_timeout(400)
        page.screenshot(path=folder / f"{name}.png")


def test_counts_are_of_the_tiles_shown_and_each_state_has_a_word_and_a_glyph(browser: Browser, day: Day) -> None:
    context = browser.new_context(viewport={"width": 1366, "height": 768}, base_url=day.site.url)
    page = context.new_page()
    log_in(page, day.site.url)
    expect(page.locator("#counts")).to_have_text(re.compile(r"50 servers ✓ 40 running ▶ 7 working ▲ 1 late ✗ 2 failed\s+2 locked"))
    tiles = page.locator(".tile").evaluate_all("all => all.map(t => t.className.split(' ')[1])")
    assert {s: tiles.count(s) for s in set(tiles)} == {"running": 40, "working": 7, "late": 1, "failed": 2}
    assert page.locator("#t-web08").inner_text().split() == ["35", "▲", "web08", "late", "6/8", "late"]
    page.goto(f"/b/{day.batch}")
    failure = page.locator("#failures")
    for text in ("1 × Repave.2110", "web07", "before the line", "BIOS 1.6.11", "the root disk was not written", f"repave batch retry {day.batch}"):
        expect(failure).to_contain_text(text)
    assert failure.bounding_box()["y"] < 700  # type: ignore[index]
    expect(page.locator("#row-web08 .text")).to_contain_text(re.compile(r"late: now 3:0\d, usual 1:3"))
    assert page.locator("#row-web09 line.line").count() == 1 and page.locator("#row-web11 line.line").count() == 0
    context.close()


def test_q18_in_greyscale_every_state_is_told_apart_by_its_glyph_and_its_word(browser: Browser, day: Day) -> None:
    context = browser.new_context(viewport={"width": 1366, "height": 768}, base_url=day.site.url)
    page = context.new_page()
    log_in(page, day.site.url)
    for path, rows, state in (("/", ".tile", "e.classList[1]"), (f"/b/{day.batch}?unfold=1", "#rows > li", "e.classList[1]")):
        page.goto(path)
        page.evaluate("document.documentElement.style.filter = 'grayscale(1)'")
        seen = page.locator(rows).evaluate_all(f"all => all.map(e => [{state}, e.querySelector('.glyph').textContent, e.innerText])")
        glyphs = {state: {glyph for its, glyph, _ in seen if its == state} for state, _, _ in seen}
        assert len(glyphs) >= 4 and all(len(its) == 1 for its in glyphs.values()), glyphs
        assert len(set.union(*glyphs.values())) == len(glyphs), glyphs
    fills = page.evaluate("Object.fromEntries(['late', 'first-boot', 'write'].map(k => [k, getComputedStyle(document.querySelector(`#rows rect.${k}`)).fill]))")
    assert "#striped" in fills["late"] and "#hatched" in fills["first-boot"] and fills["write"].startswith("rgb"), fills
    page.goto("/?view=table")
    words = page.locator("td.state").evaluate_all("all => all.map(e => e.textContent.trim().split(/\\s+/).slice(0, 2).join(' '))")
    assert {*words} == {"✓ running", "▶ working", "▲ late", "✗ failed"}
    page.goto(f"/b/{day.batch}?view=table")
    words = page.locator("td.state").all_inner_texts()
    assert {*words} == {"✓ running", "▶ working", "▲ late", "✗ failed"}
    context.close()


def test_everything_is_read_and_done_without_javascript(browser: Browser, day: Day) -> None:
    context = browser.new_context(java_script_enabled=False, base_url=day.site.url)
    page = context.new_page()
    log_in(page, day.site.url)
    page.locator("#t-web15 input").check()
    page.locator("#t-web16 input").check()
    page.get_by_label("Image").select_option("deb12-gpu")
    page.get_by_role("button", name="Plan reinstall…").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("2 servers · deb12-gpu · nothing touched yet")
    for path in day.pages.values():
        page.goto(path)
        assert page.locator("main").inner_text().strip()
    context.close()


def test_the_three_ways_in_are_shown_where_there_is_no_server(open_page: Open) -> None:
    page = open_page("/")
    assert page.locator(".ways code").all_inner_texts() == [
        "repave rack up 4", "repave server add --csv servers.csv", "repave server add web01 --bmc https://10.9.0.11 --user admin",
    ]  # fmt: skip
    page.goto("/b")
    expect(page.get_by_role("heading", name="No batch yet")).to_be_visible()


# ---- what can be done ----


@pytest.fixture
def small(site: Site) -> Site:
    add_image(site, "tiny")
    add_rack(site, "r1", ["web01", "web02", "web03", "web04"], model="R650", image="tiny")
    return site


def test_what_is_clicked_and_what_is_typed_are_one_selection(open_page: Open, small: Site) -> None:
    page = open_page("/")
    page.locator("#t-web04 input").click()
    page.locator("#t-web02 input").click(modifiers=["Shift"])
    expect(page.get_by_label("Selected")).to_have_value("web[02-04]")
    expect(page.locator("#chosen")).to_have_text("3")
    expect(page.locator("#command")).to_have_text("repave reinstall 'web[02-04]' --plan-only")
    page.get_by_label("Image").select_option("tiny")
    expect(page.locator("#command")).to_have_text("repave reinstall 'web[02-04]' --image 'tiny' --plan-only")
    page.get_by_label("Selected").fill("web[01-04]!web03")
    expect(page.locator("#t-web03 input")).not_to_be_checked()
    expect(page.locator("#t-web01 input")).to_be_checked()
    assert "sel=web" in page.url
    page.reload()
    expect(page.locator("#t-web01 input")).to_be_checked()


def test_a_selections_older_answer_that_comes_late_does_not_replace_the_newer_one(open_page: Open, small: Site) -> None:
    page, held = open_page("/"), []
    page.route("**/fold?*", lambda route: held.append(route))
    for name in ("web01", "web02"):
        with page.expect_request("**/fold?*"):
            page.locator(f"#t-{name} input").click()
    first, second = held
    second.continue_()
    expect(page.get_by_label("Selected")).to_have_value("web[01-02]")
    with page.expect_request_finished(lambda request: request.url == first.request.url):
        first.continue_()
    page.evaluate("new Promise((then) => setTimeout(then, 50))")  # what the answer would do, it has done
    expect(page.get_by_label("Selected")).to_have_value("web[01-02]")


def test_only_the_typed_words_erase_and_the_plan_is_the_one_that_was_shown(open_page: Open, small: Site) -> None:
    page = open_page("/plan?servers=web[01-02]&image=tiny")
    expect(page.locator(".plan .erased")).to_contain_text("web[01-02] R650")
    button = page.get_by_role("button", name="Erase and reinstall 2 servers")

    def fill(words: str, again: str = NEW_PASSWORD) -> None:
        page.get_by_label("New password of root").fill(NEW_PASSWORD)
        page.get_by_label("Again").fill(again)
        page.get_by_label("Type erase 2 to start").fill(words)
        button.click()

    fill("yes")
    expect(page.get_by_role("alert")).to_contain_text("Type 'erase 2' to start")
    assert NEW_PASSWORD not in page.content()
    fill("erase 2", again="Other-Pass-42")
    expect(page.get_by_role("alert")).to_contain_text("The two passwords are different")
    small.ask("PATCH", "/servers/web02", json={"root_disk": "serial=S1"})
    page.evaluate("document.querySelector('[name=plan]').value = 'p-00000000'")
    fill("erase 2")
    expect(page.get_by_role("alert")).to_contain_text("The plan is out of date")
    assert small.ask("GET", "/batches").json()["items"] == []
    fill("erase 2")
    page.wait_for_url("**/b/*")
    batch = small.ask("GET", "/batches").json()["items"][0]
    assert (batch["created_by"], batch["counts"]["waiting"]) == ("ann", 2)
    assert NEW_PASSWORD not in json.dumps(small.ask("GET", "/events").json())


def test_a_rehearsal_asks_for_no_password_and_other_words(open_page: Open, small: Site) -> None:
    page = open_page("/s/web01")
    page.get_by_role("link", name="Rehearse…").click()
    assert page.locator("input[type=password]").count() == 0
    page.get_by_label("Type rehearse 1 to start").fill("rehearse 1")
    page.get_by_role("button", name="Rehearse 1 server").click()
    page.wait_for_url("**/b/*")
    assert small.ask("GET", "/batches").json()["items"][0]["rehearse"] is True
    page.goto("/s/web01")
    expect(page.get_by_role("button", name="Plan reinstall…")).to_be_disabled()
    expect(page.locator("#why-plan")).to_have_text("a run is under way")


def test_a_batch_is_paused_goes_on_is_cancelled_and_what_failed_is_tried_again(open_page: Open, small: Site, clock: Clock) -> None:
    batch = begin(small, ["web01", "web02", "web03", "web04"], image="tiny", at_once=2)
    scripts = {"web01": Script([4, 12, 6, 130], "boot_override_ignored"), "web02": Script([4, 12, 6, 130, 40])}
    play(small, clock, batch, scripts, seconds=180)
    page = open_page(f"/b/{batch}")
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("#headline")).to_contain_text("paused")
    page.get_by_role("button", name="Go on").click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    page.get_by_role("link", name="Cancel…").click()
    rows = page.locator("tbody tr").all_inner_texts()
    assert [r.split("\t")[:2] for r in rows] == [["web[03-04]", "not started"], ["web02", "past the line"], ["web01", "already ended"]]
    page.get_by_role("button", name="Cancel 2").click()
    expect(page.locator("#counts")).to_contain_text("1 cancelled")
    page.get_by_role("link", name="Retry 2…").click()
    expect(page.locator(".plan")).to_contain_text("web[01,04]")
    expect(page.locator(".cmd code").last).to_have_text(f"repave batch retry {batch}")


def test_a_lock_is_set_with_its_reason_shown_everywhere_and_taken_off(open_page: Open, small: Site) -> None:
    page = open_page("/s/web01")
    page.get_by_role("link", name="Lock…").click()
    page.get_by_label("Reason").fill("database, ask first")
    page.get_by_role("button", name="Lock 1").click()
    expect(page.locator("#lock")).to_contain_text("locked by ann")
    page.goto("/plan?servers=web[01-02]")
    expect(page.locator(".plan .problem")).to_contain_text("database, ask first")
    expect(page.get_by_role("button", name="Erase and reinstall 2 servers")).to_be_disabled()
    expect(page.locator("#why-not")).to_have_text("Not possible: the plan has problems.")
    page.goto("/s/web01")
    page.get_by_role("button", name="Unlock").click()
    expect(page.get_by_role("link", name="Lock…")).to_be_visible()


def test_a_button_that_is_no_use_says_why(open_page: Open, small: Site) -> None:
    batch = begin(small, ["web01"], image="tiny")
    page = open_page(f"/b/{batch}", name="vic")
    for button, why in (("Pause", "why-pause"), ("Cancel…", "why-cancel"), ("Retry…", "why-retry")):
        expect(page.get_by_role("button", name=button)).to_be_disabled()
        expect(page.locator(f"#{why}")).to_contain_text("needs the role operator; yours is viewer")
        assert page.get_by_role("button", name=button).get_attribute("aria-describedby") == why


def test_with_keys_alone_servers_are_chosen_failures_found_and_nothing_is_erased(open_page: Open, small: Site, clock: Clock) -> None:
    batch = begin(small, ["web03"], image="tiny")
    play(small, clock, batch, {"web03": Script([4, 12, 6, 130], "boot_override_ignored")}, seconds=180)
    page = open_page("/")
    for key in "jxjx":
        page.keyboard.press(key)
    expect(page.get_by_label("Selected")).to_have_value("web[01-02]")
    page.keyboard.press("f")
    assert page.evaluate("document.activeElement.closest('[data-row]').id") == "t-web03"
    page.keyboard.press("?")
    expect(page.locator("dialog")).to_be_visible()
    page.locator("#keys-on").uncheck()
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") != "search"
    page.keyboard.press("?")
    page.locator("#keys-on").check()
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    page.keyboard.press("b")
    page.wait_for_url("**/b")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/b/{batch}")
    assert len(small.ask("GET", "/batches").json()["items"]) == 1


def reach(page: Page, name: str, key: str = "Tab") -> None:
    """The focus is on what has this name; a person gets there with one key, and sees where they are."""
    for _ in range(25):
        page.keyboard.press(key)
        if name in page.evaluate("[...(document.activeElement.labels || [])].concat(document.activeElement).map(e => e.textContent).join(' ')"):
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            return
    raise AssertionError(f"{name} is not within 25 times {key}")


def test_q19_with_keys_alone_four_are_chosen_and_rehearsed_the_failure_is_found_and_tried_again(open_page: Open, small: Site, clock: Clock) -> None:
    page = open_page("/")
    for key in "jxjxjxjx":
        page.keyboard.press(key)
    expect(page.get_by_label("Selected")).to_have_value("web[01-04]")
    page.keyboard.press("s")
    reach(page, "Rehearse…")
    page.keyboard.press("Enter")
    page.wait_for_url("**/plan?*")
    reach(page, "Type rehearse 4 to start")
    page.keyboard.type("rehearse 4")
    page.keyboard.press("Enter")
    page.wait_for_url("**/b/*")
    first = small.ask("GET", "/batches").json()["items"][0]
    assert (first["rehearse"], first["counts"]["waiting"]) == (True, 4)
    play(small, clock, first["id"], {"web03": Script([4, 12, 6, 130], "boot_override_ignored")}, seconds=180)
    expect(page.locator("#counts")).to_contain_text("1 failed")
    page.keyboard.press("f")
    assert "web03" in page.evaluate("document.activeElement.querySelector('h2').textContent")
    reach(page, "Retry 1…", "Shift+Tab")
    page.keyboard.press("Enter")
    page.wait_for_url("**/plan?retry=*")
    reach(page, "Type rehearse 1 to start")
    page.keyboard.type("rehearse 1")
    page.keyboard.press("Enter")
    page.wait_for_url(lambda where: "/b/" in where and first["id"] not in where)
    second = small.ask("GET", f"/batches/{small.ask('GET', '/batches').json()['items'][0]['id']}").json()
    assert (second["rehearse"], [r["server"] for r in second["runs"]], second["created_by"]) == (True, ["web03"], "ann")


def test_a_viewer_sees_no_bmc_and_the_colours_follow_the_switch(open_page: Open, small: Site) -> None:
    assert Role.VIEWER.value in open_page("/", name="vic").locator(".user").inner_text()
    page = open_page("/s/web01", name="vic", color_scheme="light")
    assert "BMC certificate" not in page.locator("main").inner_text()
    light = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    for wanted in ("light", "dark"):
        page.get_by_role("button", name="Colours").click()
        expect(page.locator("html")).to_have_attribute("data-theme", wanted)
    assert (light, page.evaluate("getComputedStyle(document.documentElement).backgroundColor")) == ("rgb(255, 255, 255)", "rgb(17, 22, 28)")
    assert page.url.endswith("/s/web01")


def test_the_projects_to_choose_from_and_the_page_of_our_own_fault_are_fit_for_everybody_too(browser: Browser, small: Site) -> None:
    add_person(small, "root", Role.ADMIN)
    context = browser.new_context(base_url=small.url)
    page, found = context.new_page(), dict[str, list[str]]()
    log_in(page, small.url, "root")
    for width in (1366, 390):
        page.set_viewport_size({"width": width, "height": TALL})
        page.goto("/")
        page.locator(".projects summary").click()
        found[f"projects, {width}"] = faults(page, Axe().run(page, options=ALL_RULES).response)
        picture(page, f"projects-light-{width}")
    page.get_by_role("link", name="other", exact=True).click()
    expect(page.locator(".projects summary")).to_have_text("Project other")
    expect(page.get_by_role("heading", name="No servers yet. Three ways in")).to_be_visible()
    page.goto("/?project=default")
    break_a_row(small)
    answer = page.goto("/")
    assert answer is not None and answer.status == 500
    expect(page.get_by_role("heading", level=1)).to_contain_text("Repave made a mistake.")
    for width in (1366, 390):
        page.set_viewport_size({"width": width, "height": TALL})
        found[f"fault, {width}"] = faults(page, Axe().run(page, options=ALL_RULES).response)
        picture(page, f"fault-light-{width}")
    context.close()
    assert not any(found.values()), found
