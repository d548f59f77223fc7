"""A person's afternoon on a scripted rack: the real service, the real agent, a browser. Nothing is reloaded by hand, and the service dies in between."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import log_in
from playwright.sync_api import Browser, expect

from repave.cli.client import Client, Endpoint
from repave.lab.processes import is_alive
from repave.lab.rack import find_service, rack_down, rack_up, start_service_again
from repave.lab.scripted import set_faults

PASSWORD = "Pages-7!canary"
PERSON = "correct-horse-battery"


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Client]]:
    folder = tmp_path_factory.mktemp("rack")
    lab = rack_up(3, scripted=True, folder=folder)
    try:
        client = Client(None, Endpoint(lab["endpoint"], lab["token"]))
        client.post("/users", {"name": "ann", "role": "operator", "password": PERSON})
        yield folder, client
    finally:
        rack_down(folder)


def test_servers_are_reinstalled_from_the_page_and_it_stays_true_while_the_service_dies_and_comes_back(browser: Browser, rack: tuple[Path, Client]) -> None:
    folder, client = rack
    context = browser.new_context(viewport={"width": 1366, "height": 768}, base_url=client.endpoint.url)
    context.set_default_timeout(15_000)
    page = context.new_page()
    log_in(page, client.endpoint.url, password=PERSON)
    expect(page.locator("#counts")).to_contain_text("4 running")
    set_faults(folder / "rack", {"lab02": ["no-hello"]})
    page.get_by_label("Selected").fill("lab[01-02]")
    page.get_by_label("Image").select_option("tiny-2")
    page.get_by_role("button", name="Plan reinstall…").click()
    page.get_by_label("New password of root").fill(PASSWORD)
    page.get_by_label("Again").fill(PASSWORD)
    page.get_by_label("Type erase 2 to start").fill("erase 2")
    page.get_by_role("button", name="Erase and reinstall 2 servers").click()
    page.wait_for_url("**/b/*")
    batch = page.url.rpartition("/")[2]
    page.evaluate("window.never_reloaded = true")
    expect(page.locator("#counts")).to_contain_text("1 running", timeout=60_000)
    expect(page.locator("#row-lab01")).to_contain_text("proved by the new OS")
    expect(page.locator("#row-lab02")).to_contain_text("4/8 boot-ramdisk")

    talk = context.new_page()
    talk.goto("/s/lab02/console")
    expect(talk.locator("#console-state")).to_have_text("live")
    expect(talk.locator("#console")).to_contain_text("ramdisk: hangs")

    service = find_service(folder)
    assert service is not None
    os.kill(service.pid, signal.SIGKILL)
    expect(page.locator("#live")).to_contain_text("not live since")
    expect(page.locator("#stale")).to_contain_text("What is shown is old.")
    while is_alive(service):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(service.pid, os.WNOHANG)
        time.sleep(0.05)
    start_service_again(folder)
    expect(page.locator("#live")).to_have_text("● live")
    expect(page.locator("#stale")).to_be_hidden()

    client.post(f"/batches/{batch}/cancel", {"servers": ["lab02"]})
    expect(page.locator("#counts")).to_contain_text("1 cancelled", timeout=60_000)
    expect(page.locator("#failures")).to_contain_text("before the line")
    assert page.evaluate("window.never_reloaded") is True

    expect(talk.locator("#console-state")).to_have_text("it has ended", timeout=20_000)
    page.goto("/s/lab01")
    expect(page.locator("#now")).to_contain_text("runs tiny-2 · proved by the new OS")
    expect(page.locator("#inventory")).to_contain_text("root")
    assert page.locator(".steps").first.locator("li.done").count() == 8
    page.get_by_role("link", name="all of it, from the first byte").click()
    expect(page.locator("#console")).to_contain_text("stage seal")
    expect(page.locator("#console")).not_to_contain_text(PASSWORD)
    page.goto("/errors/not-found")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Not found.")
    context.close()
