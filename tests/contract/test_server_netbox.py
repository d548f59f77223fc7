"""Servers taken from NetBox. The far end is a few lines of HTTP that answer as NetBox's list of devices does: pages, filters, refusals."""

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
from operator_site import BMC_PASSWORD, start_site
from test_cli_operator import Cli, known_bmcs

TOKEN = "0123456789abcdef0123456789abcdef01234567"


def device(number: int, **more: Any) -> dict[str, Any]:
    """As NetBox 4 lists it, with some of the fields that nobody here reads."""
    address = f"10.9.0.{10 + number}"
    return {
        "id": number, "url": f"http://inside/api/dcim/devices/{number}/", "display": f"web{number:02}", "name": f"web{number:02}",
        "device_type": {"id": 3, "model": "R650"}, "role": {"id": 2, "slug": "server"}, "site": {"id": 1, "slug": "ams"},
        "rack": {"id": 7, "display": "r1", "name": "r1"}, "position": 36.0 + number, "face": {"value": "front", "label": "Front"},
        "status": {"value": "active", "label": "Active"}, "primary_ip": None, "serial": "",
        "oob_ip": {"id": 90 + number, "display": f"{address}/24", "family": {"value": 4, "label": "IPv4"}, "address": f"{address}/24"},
    } | more  # fmt: skip


@dataclass
class NetBox:
    devices: list[dict[str, Any]]
    page: int = 2
    prefix: str = ""  # of its paths, behind a proxy
    answers: str = "well"  # or: moved, loops, html
    url: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)  # path and query, authorization

    def answer(self, path: str, query: dict[str, str]) -> dict[str, Any]:
        offset = int(query.get("offset", 0))
        items = [d for d in self.devices if d["status"]["value"] == query["status"] and d["role"]["slug"] == query.get("role", d["role"]["slug"])]
        behind = offset if self.answers == "loops" else offset + self.page
        # Its own idea of its address, which is not the one it was asked at.
        following = f"http://inside:8080{path}?{urlencode(query | {'offset': behind})}" if behind < len(items) else None
        return {"count": len(items), "next": following, "previous": None, "results": items[offset : offset + self.page]}


@contextlib.contextmanager
def start_netbox(box: NetBox) -> Iterator[NetBox]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            at = urlsplit(self.path)
            box.asked.append((self.path, self.headers["Authorization"]))
            if self.headers["Authorization"] not in (f"Token {TOKEN}", "Bearer nbt_key.secret"):
                self.give(403, {"detail": "Invalid v1 token"})
            elif at.path != f"{box.prefix}/api/dcim/devices/":
                self.give(404, {"detail": "Not found."})
            elif box.answers == "moved":
                self.give(302, {})
            else:
                self.give(200, box.answer(at.path, dict(parse_qsl(at.query))) if box.answers != "html" else "<html>")

        def give(self, status: int, value: Any) -> None:
            body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", f"{box.url}/elsewhere")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        box.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield box
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with start_site(tmp_path / "site") as site:
        yield Cli(site, tmp_path)


def add(cli: Cli, url: str, *argv: str, token: str = TOKEN) -> Any:
    given = ("--user", "root", "--password-stdin", *argv)
    return cli.run("server", "add", "--netbox", url, *given, stdin=BMC_PASSWORD + "\n", REPAVE_NETBOX_TOKEN=token)


def test_the_active_devices_of_all_pages_are_added_with_rack_unit_and_the_oob_address_as_the_bmc(cli: Cli) -> None:
    known_bmcs(cli, 5)
    cli.site.bmcs.known["https://[2001:db8::5]"] = "SN6"
    ip6 = {"id": 95, "family": {"value": 6, "label": "IPv6"}, "address": "2001:db8::5/64"}
    spare = device(6, status={"value": "offline", "label": "Offline"})
    with start_netbox(NetBox([device(1), device(2, position=None, rack=None), device(3, position=12.5), device(4), device(5, oob_ip=ip6), spare])) as box:
        done = add(cli, box.url + "/", "--yes", "--tls-verify", "false")
    assert done.returncode == 0 and "web05 → https://[2001:db8::5]" in done.stderr and "5 servers, as NetBox says." in done.stderr, done.stderr
    servers = {s["name"]: s for s in cli.items("server", "ls")}
    assert {n: (s["rack"], s["unit"], s["bmc"]["url"]) for n, s in servers.items()} == {
        "web01": ("r1", "37", "https://10.9.0.11"), "web02": ("", "", "https://10.9.0.12"), "web03": ("r1", "12.5", "https://10.9.0.13"),
        "web04": ("r1", "40", "https://10.9.0.14"), "web05": ("r1", "41", "https://[2001:db8::5]"),
    }  # fmt: skip
    assert servers["web01"]["bmc"] | {"tls_verify": "false", "username": "root"} == servers["web01"]["bmc"]
    assert len(box.asked) == 3 and all("status=active" in path and "exclude=config_context" in path for path, _ in box.asked)
    assert TOKEN not in done.stdout + done.stderr and BMC_PASSWORD not in done.stdout + done.stderr


def test_it_is_asked_before_anything_is_sent_and_the_same_again_adds_the_rest(cli: Cli) -> None:
    known_bmcs(cli, 1)
    with start_netbox(NetBox([device(1), device(2)], prefix="/netbox")) as box:
        assert add(cli, f"{box.url}/netbox").returncode == 3, "nobody was there to confirm"
        assert cli.site.bmcs.asked == []
        half = add(cli, f"{box.url}/netbox/api", "--yes", "--netbox-filter", "role=server", token="nbt_key.secret")
        assert half.returncode == 10 and "1 added, 1 not: web02." in half.stderr and "the same command again adds the rest" in half.stderr, half.stderr
        known_bmcs(cli, 2)
        rest = add(cli, f"{box.url}/netbox", "--yes")
    assert rest.returncode == 0 and "web01: there already" in rest.stderr
    assert [authorization for _, authorization in box.asked] == [f"Token {TOKEN}", "Bearer nbt_key.secret", f"Token {TOKEN}"]


def test_one_device_with_a_field_missing_refuses_all_and_is_named_and_a_filter_leaves_it_out(cli: Cli) -> None:
    known_bmcs(cli, 2)
    switch = {"id": 1, "slug": "switch"}
    odd = [device(2, name=None), device(3, oob_ip=None, role=switch), device(4, name="db 1"), device(5, oob_ip=device(1)["oob_ip"])]
    with start_netbox(NetBox([device(1), *odd])) as box:
        refused = add(cli, box.url, "--yes")
        assert (refused.returncode, cli.site.bmcs.asked) == (2, [])
        for said in (
            "NetBox device 2: name: is empty.", "NetBox device 3 ('web03'): oob_ip: is empty.", "NetBox device 4 ('db 1'): name: ",
            "NetBox device 5 ('web05'): oob_ip: is the same as in NetBox device 1 ('web01').", "--netbox-filter role=server",
        ):  # fmt: skip
            assert said in refused.stderr
        box.devices = [device(1), device(3, oob_ip=None, role=switch)]
        assert add(cli, box.url, "--netbox-filter", "role=server").returncode == 0, "one server is not asked about"
    assert [s["name"] for s in cli.items("server", "ls")] == ["web01"]


@pytest.mark.parametrize(
    ("argv", "token", "answers", "said"),
    [
        ((), "", "well", "REPAVE_NETBOX_TOKEN is not set"),
        ((), "wrong", "well", 'answered 403: {"detail": "Invalid v1 token"}'),
        ((), TOKEN, "moved", "answered 302"),
        ((), TOKEN, "loops", "pages do not end"),
        ((), TOKEN, "html", "not NetBox's"),
        (("--netbox-filter", "role=router"), TOKEN, "well", "no such devices"),
        (("--netbox-filter", "role"), TOKEN, "well", "key=value"),
        (("--rack", "r9"), TOKEN, "well", "rack: what is one server's"),
        (("web01",), TOKEN, "well", "Name the servers, or give --csv FILE, or --netbox URL."),
    ],
)
def test_what_is_not_as_it_should_be_is_told_in_a_line_and_nothing_is_sent(cli: Cli, argv: tuple[str, ...], token: str, answers: str, said: str) -> None:
    with start_netbox(NetBox([device(1), device(2), device(3)], answers=answers)) as box:
        refused = add(cli, box.url, "--yes", *argv, token=token)
    assert refused.returncode == 2 and said in refused.stderr and "Nothing was sent." in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr and cli.site.bmcs.asked == [] and not any("elsewhere" in path for path, _ in box.asked)


def test_a_netbox_that_does_not_answer_is_named(cli: Cli) -> None:
    refused = add(cli, "http://127.0.0.1:9", "--yes")
    assert refused.returncode == 2 and "NetBox at http://127.0.0.1:9 does not answer" in refused.stderr
    assert add(cli, "http://root:pw@127.0.0.1:9").returncode == 2


@pytest.mark.parametrize("url", ["https://nb:99999", "https://nb/ü", f"https://{'n' * 70}/"])
def test_an_address_that_can_be_none_is_refused_in_plain_words(cli: Cli, url: str) -> None:
    done = add(cli, url, "--yes")
    assert done.returncode == 2 and "NetBox" in done.stderr and "Traceback" not in done.stderr, done.stderr
