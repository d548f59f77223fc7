"""Who wants to be told is told, signed, in order and at least once: also by a receiver that fails, over a restart, and with two workers."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from operator_site import NEW_PASSWORD, Site, start_site
from secret_scan import find_secret

from repave.domain.model import Step
from repave.domain.states import Ending
from repave.errors import RepaveError
from repave.outbound import OutboundConnection
from repave.store import new_id
from repave.webhooks import WebhookSender


@dataclass
class Receiver:
    """A web server elsewhere: what it got, and what it answers next (200 when nothing is said)."""

    url: str = ""
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)

    @property
    def bodies(self) -> list[Any]:
        return [json.loads(body) for _, body in self.got]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            made.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
            status = made.answers.pop(0) if made.answers else 200
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made.url = f"http://127.0.0.1:{server.server_port}/hooks/T0-canary?key=canary-9"
    yield made
    server.shutdown()
    server.server_close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with start_site(tmp_path / "site") as site:
        for name in ("web01", "web02"):
            site.add_server(name)
        site.add_image("tiny")
        yield site


def add_hook(site: Site, receiver: Receiver, *events: str, **more: Any) -> dict[str, Any]:
    body = {"name": "ops", "url": receiver.url, "events": events or ["batch.ended", "run.ended", "run.late"]} | more
    answer = site.ask("POST", "/webhooks", json=body)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def begin(site: Site) -> dict[str, str]:
    body = {"servers": ["web01", "web02"], "image": "tiny", "password": NEW_PASSWORD}
    return {run["server"]: run["id"] for run in site.ask("POST", "/reinstall", json=body).json()["runs"]}


def end(site: Site, run: str, ending: Ending = Ending.PROVED, slug: str = "") -> None:
    site.store.runs.record_ending(run, ending, RepaveError(slug).as_json() if slug else None)


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def look(site: Site, sender: WebhookSender | None = None) -> None:
    """All that is due now was tried."""
    sender = sender or WebhookSender(site.store, local_addresses=True)
    sender.look()
    wait_until(lambda: not sender._busy)


def later(site: Site, seconds: float) -> None:
    before = site.store.now
    site.store.now = lambda: before() + timedelta(seconds=seconds)


# ---- what is told ----


def test_each_event_is_told_once_in_order_and_signed_so_that_the_receiver_can_check_it(site: Site, receiver: Receiver) -> None:
    begin_before = begin(site)
    end(site, begin_before["web01"])  # before the hook was there: not told
    hook = add_hook(site, receiver)
    end(site, begin_before["web02"], Ending.RETURNED, "unreachable")
    look(site)
    assert [b["type"] for b in receiver.bodies] == ["run.ended", "batch.ended"]
    run, batch = (b["data"] for b in receiver.bodies)
    assert (run["server"], run["outcome"], run["error"]["class"]) == ("web02", "returned", "unreachable")
    assert (batch["state"], batch["counts"]["running"], batch["counts"]["failed"], batch["image"]) == ("failed", 1, 1, "tiny")
    assert batch["batch"] == run["batch"] and datetime.fromisoformat(receiver.bodies[0]["timestamp"]) <= datetime.now(UTC)
    key = base64.b64decode(hook["secret"].removeprefix("whsec_"))
    for headers, body in receiver.got:
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        assert headers["webhook-signature"] == "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
        assert abs(time.time() - int(headers["webhook-timestamp"])) < 60 and headers["content-type"] == "application/json"
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 2
    look(site)
    assert len(receiver.got) == 2
    shown = site.ask("GET", "/webhooks/ops").json()
    assert shown["trouble"] is None and shown["delivered_at"] and "canary" not in json.dumps(shown)


def test_a_late_run_is_told_to_those_who_asked_for_it(site: Site, receiver: Receiver) -> None:
    add_hook(site, receiver, "run.late")
    run = begin(site)["web01"]
    site.store.runs.record_step(run, Step.PREFLIGHT)
    later(site, 3000)
    site.store.runs.tell_late({})
    end(site, run)
    look(site)
    assert [(b["type"], b["data"]["server"], b["data"]["step"]) for b in receiver.bodies] == [("run.late", "web01", "preflight")]


def test_a_chat_gets_a_line_of_text(site: Site, receiver: Receiver) -> None:
    add_hook(site, receiver, shape="slack")
    runs = begin(site)
    end(site, runs["web01"])
    site.store.runs.record_ending(runs["web02"], Ending.RETURNED, RepaveError("unreachable", "<b>&").as_json())
    look(site)
    texts = [b.pop("text") for b in receiver.bodies]
    assert texts[0] == "web01: proved" and "web02: returned" in texts[1] and "&lt;b&gt;&amp;" in texts[1] and "<" not in texts[1]
    assert "failed: 1 running, 1 failed (tiny, by the admin)" in texts[2]


# ---- at least once ----


def test_what_is_not_taken_is_sent_again_with_the_same_id_and_nothing_overtakes_it(site: Site, receiver: Receiver) -> None:
    add_hook(site, receiver)
    receiver.answers = [500, 302]
    runs = begin(site)
    end(site, runs["web01"])
    look(site)
    assert (len(receiver.got), site.ask("GET", "/webhooks/ops").json()["trouble"]) == (1, "it answered 500")
    end(site, runs["web02"])
    look(site)
    assert len(receiver.got) == 1  # not yet
    for seconds, count in ((6, 2), (6, 2), (5, 5)):  # 5 seconds, then 10, then all that waited
        later(site, seconds)
        look(site)
        assert len(receiver.got) == count
    assert [b["type"] for b in receiver.bodies] == ["run.ended"] * 4 + ["batch.ended"]
    assert [b["data"]["server"] for b in receiver.bodies[:4]] == ["web01"] * 3 + ["web02"]
    assert len({headers["webhook-id"] for headers, _ in receiver.got[:3]}) == 1
    assert site.ask("GET", "/webhooks/ops").json()["tries"] == 0


def test_a_sender_that_dies_while_it_sends_has_its_event_sent_again_by_another(site: Site, receiver: Receiver) -> None:
    add_hook(site, receiver)
    runs = begin(site)
    end(site, runs["web01"])
    hook = site.store.webhooks.list_due()[0]
    assert site.store.webhooks.claim(hook, seconds=60)  # and dies
    assert not site.store.webhooks.claim(hook, seconds=60)
    look(site)
    assert receiver.got == []
    later(site, 61)
    look(site)
    assert [b["data"]["server"] for b in receiver.bodies] == ["web01"]


def test_two_workers_tell_each_event_once_and_in_order(site: Site, receiver: Receiver) -> None:
    add_hook(site, receiver, "run.ended")
    senders = [WebhookSender(site.store, local_addresses=True) for _ in range(2)]
    ended = []
    for _ in range(4):
        for server, run in begin(site).items():
            end(site, run)
            ended.append(server)
            threads = [threading.Thread(target=sender.look) for sender in senders]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    wait_until(lambda: [sender.look() for sender in senders] and len(receiver.got) >= len(ended))
    wait_until(lambda: not any(sender._busy for sender in senders))
    assert [b["data"]["server"] for b in receiver.bodies] == ended


def test_the_service_tells_by_itself_while_it_runs(site: Site, receiver: Receiver) -> None:
    add_hook(site, receiver, "batch.ended")
    with WebhookSender(site.store, local_addresses=True).running():
        for run in begin(site).values():
            end(site, run)
        wait_until(lambda: receiver.got)
    assert receiver.bodies[0]["data"]["state"] == "succeeded"


# ---- one receiver's time is no other's ----


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Addresses of receivers that keep whoever comes: one takes the connection and says nothing, of the other not even the name server answers."""
    over, resolve = threading.Event(), socket.getaddrinfo

    def ask(host: Any, *more: Any, **how: Any) -> Any:
        if host == "slow.invalid":
            over.wait(60)
        return resolve(host, *more, **how)

    monkeypatch.setattr(socket, "getaddrinfo", ask)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield [f"http://127.0.0.1:{listener.getsockname()[1]}/", "http://slow.invalid/"]
        over.set()


def test_the_slow_receivers_of_one_project_hold_up_nobody_elses(site: Site, receiver: Receiver, silent: list[str]) -> None:
    for number in range(10):
        add_hook(site, Receiver(silent[number % 2]), "run.ended", name=f"slow{number}")
    server = site.add_server("db07", project=site.other)
    image = replace(site.add_image("theirs"), id=new_id(), project_id=site.other.id)
    site.store.images.add_image(image)
    site.ask("POST", "/webhooks", json={"name": "theirs", "url": receiver.url, "events": ["run.ended"]}, as_="other")
    sender = WebhookSender(site.store, local_addresses=True)
    with sender.running():
        end(site, begin(site)["web01"])
        wait_until(lambda: len(sender._busy) == 2)
        held = set(sender._busy)
        began = time.monotonic()
        body = {"servers": [server["name"]], "image": "theirs", "password": NEW_PASSWORD}
        end(site, site.ask("POST", "/reinstall", json=body, as_="other").json()["runs"][0]["id"])
        wait_until(lambda: receiver.got)
        assert time.monotonic() - began < 9  # a slow one is given up after 10 seconds
        wait_until(lambda: set(sender._busy) == held)  # no third of theirs
    assert [b["data"]["server"] for b in receiver.bodies] == ["db07"]


def test_hooks_that_have_nothing_to_tell_take_nobodys_place(site: Site, receiver: Receiver) -> None:
    for number in range(20):
        add_hook(site, receiver, "run.late", name=f"idle{number}")
    add_hook(site, receiver, "run.ended")
    end(site, begin(site)["web01"])
    look(site)
    assert [b["type"] for b in receiver.bodies] == ["run.ended"]


def test_a_name_that_is_not_answered_and_a_handshake_that_drips_take_no_longer_than_they_may(silent: list[str]) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        OutboundConnection("slow.invalid", 80, "http", False, timeout_s=0.3).connect()
    assert time.monotonic() - began < 2
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over = threading.Event()

        def drip() -> None:
            peer, _ = listener.accept()
            threading.Timer(0.5, connection.cut).start()
            with peer, contextlib.suppress(OSError):
                peer.sendall(b"\x16\x03\x03\x40\x00")  # a handshake of 16 KiB is announced
                while not over.wait(0.1):
                    peer.sendall(b"\x02")

        connection = OutboundConnection("127.0.0.1", listener.getsockname()[1], "https", True, timeout_s=5)
        threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(OSError):
            connection.connect()
        assert time.monotonic() - began < 20  # 16 KiB would take half an hour
        over.set()
        connection.close()


# ---- where it may lead, and who may ----


def test_a_url_that_makes_no_sense_is_refused_without_repeating_it(site: Site) -> None:
    for url in ("ftp://x/", "http://user:pw-canary@x/", "http://x/#a", "http://x/?a b", "no url", "http:///x", "https://x:0/"):
        answer = site.ask("POST", "/webhooks", json={"name": "ops", "url": url})
        assert answer.status_code == 400 and "canary" not in answer.text and "url" in answer.json()["cause"], url


def test_nothing_is_sent_to_this_machine_or_to_where_clouds_keep_their_metadata(site: Site, receiver: Receiver) -> None:
    port = receiver.url.split(":")[2].split("/")[0]
    sender = WebhookSender(site.store, local_addresses=False)
    for number, host in enumerate(("127.0.0.1", "localhost", "169.254.169.254", "[::1]", "0.0.0.0", "[::ffff:127.0.0.1]", "100.100.100.200")):
        add_hook(site, Receiver(f"http://{host}:{port}/x"), name=f"ops{number}")
    end(site, begin(site)["web01"])
    for _ in range(4):  # two of a project at once
        look(site, sender)
    hooks = site.store.webhooks.list_webhooks(site.project.id)
    assert receiver.got == [] and all("webhook_local_addresses" in (hook.trouble or "") for hook in hooks)
    with pytest.raises(RepaveError, match="webhook_local_addresses"):
        sender.send_test(hooks[0])


def test_webhooks_are_an_admins_and_of_one_project(site: Site, receiver: Receiver) -> None:
    add_hook(site, receiver)
    for method, path in (("GET", "/webhooks"), ("POST", "/webhooks/ops/test"), ("DELETE", "/webhooks/ops")):
        assert site.ask(method, path, as_="operator").status_code == 403
    assert site.ask("GET", "/webhooks", as_="other").json()["items"] == []
    assert site.ask("DELETE", "/webhooks/ops", as_="other").status_code == 404
    assert site.ask("POST", "/webhooks", json={"name": "ops", "url": "https://x/"}).status_code == 409
    site.ask("POST", "/webhooks", json={"name": "theirs", "url": receiver.url, "events": ["run.ended"]}, as_="other")
    end(site, begin(site)["web01"])
    look(site)
    assert [b["data"]["server"] for b in receiver.bodies] == ["web01"]  # by the hook of its project alone


def test_neither_secret_nor_url_is_in_the_database_or_the_audit(site: Site, receiver: Receiver) -> None:
    hook = add_hook(site, receiver)
    receiver.answers = [500]
    end(site, begin(site)["web01"])
    look(site)
    files = [p for p in site.images.folder.parent.iterdir() if p.name.startswith("repave.db")]
    assert files and find_secret(iter(files), hook["secret"].removeprefix("whsec_")) == find_secret(iter(files), "canary-9") == []
    assert "canary" not in site.ask("GET", "/events").text + site.ask("GET", "/webhooks").text


def test_the_command_line_adds_tests_lists_and_removes_a_webhook(site: Site, receiver: Receiver, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("REPAVE_")} | {"REPAVE_ENDPOINT": site.url, "REPAVE_TOKEN": site.tokens["admin"]}

    def repave(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "repave.cli.main", "webhook", *words]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)

    added = repave("add", "ops", receiver.url, "--event", "run.ended", "--event", "batch.ended")
    assert added.returncode == 0 and added.stdout.startswith("whsec_") and "once" in added.stderr
    assert repave("test", "ops").returncode == 0 and receiver.bodies[0]["type"] == "webhook.test"
    listed = json.loads(repave("ls", "--json").stdout)["items"]
    assert [(h["name"], h["events"]) for h in listed] == [("ops", ["batch.ended", "run.ended"])]
    receiver.answers = [500]
    refused = repave("test", "ops")
    assert refused.returncode != 0 and "it answered 500" in refused.stderr and "canary" not in refused.stderr
    assert repave("rm", "ops").returncode != 0 and repave("rm", "ops", "--yes").returncode == 0
    assert "Nothing here yet" in repave("ls").stderr
