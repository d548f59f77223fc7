"""A ramdisk that finds nobody, on a real machine: the agent gives the server back what it had, whatever the service does."""

from __future__ import annotations

from pathlib import Path

import pytest
from rack_site import PASSWORDS, open_site

from repave.bmc import Power
from repave.lab.rack import OLD_PASSWORD, start_service_again

pytestmark = pytest.mark.timeout(1500)  # it waits for the ramdisk and the image to be built


def test_an_agent_that_never_says_hello_gives_the_old_os_back_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_site(tmp_path, 1, debian=False) as site:
        before = site.login("lab01", OLD_PASSWORD, "hostname")
        site.kill_service()
        monkeypatch.setenv("REPAVE_AGENT_URL", "https://10.0.2.2:1")  # the agent finds nobody there
        monkeypatch.setenv("REPAVE_AGENT_READY_S", "45")
        start_service_again(site.folder)
        runs = site.wait_for_end(site.put(PASSWORDS[0], "lab01"))
        assert runs["lab01"]["error"]["code"] == "Repave.2110"
        assert not runs["lab01"]["past_the_line"]
        assert site.state("lab01") == ("running", "reinstall-failed")
        assert site.login("lab01", OLD_PASSWORD, "hostname") == before
        with site.bmc("lab01") as bmc:
            assert bmc.read_power() is Power.ON
        site.watch.assert_nothing_broken()
