"""A real browser (Debian's chromium) in front of a site without a rack. One browser a worker, a fresh profile a test."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from operator_site import Site, start_site
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from scene import PERSON_PASSWORD, Clock, add_person

from repave.domain.model import Role

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
Open = Callable[..., Page]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # No sandbox: root has none. The pages are our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--font-render-hinting=none"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def site(tmp_path: Path, clock: Clock) -> Iterator[Site]:
    with start_site(tmp_path, now=clock) as site:
        add_person(site, "ann")
        add_person(site, "vic", Role.VIEWER)
        yield site


def log_in(page: Page, url: str, name: str = "ann", password: str = PERSON_PASSWORD) -> None:
    page.goto(f"{url}/login")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url(lambda where: "/login" not in where)


@pytest.fixture
def open_page(browser: Browser, site: Site) -> Iterator[Open]:
    """A page of the site, logged in. What a browser complains about fails the test: a broken script, a refused file, a policy that was met."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    def open_page(path: str = "/", *, name: str = "ann", width: int = 1366, height: int = 768, **how: object) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, base_url=site.url, **how)  # type: ignore[arg-type]
        context.set_default_timeout(8000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" and not re.search("net::ERR|status of 4", said.text) else None)
        log_in(page, site.url, name)
        if path != "/":
            page.goto(path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
