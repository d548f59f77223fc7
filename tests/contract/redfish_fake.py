"""A BMC on loopback for tests: serves one folder of recorded answers and takes writes as that vendor does.

The folder's files are what GET answers. How writes behave is from the corpus' README ("What to expect when writing").
A fault is a rule: `bmc.rule("POST", "ComputerSystem.Reset", fault)`; the fault gets the handler and `apply()`, the effect.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CORPUS = Path(os.environ.get("REPAVE_REDFISH_CORPUS") or Path(__file__).parents[3] / "shared/corpora/redfish")
MACHINES = sorted(p.name for p in CORPUS.glob("*") if (p / "redfish/v1/index.json").exists())

Answer = tuple[int, Any]
Fault = Callable[["Handler", Callable[[], Answer]], Answer | None]


@dataclass
class Seen:
    method: str
    path: str
    body: Any
    login: str | None
    if_match: str | None


class FakeBmc:
    """The BMC. `url` is where it listens; `seen` is what arrived; `get` reads a resource as it is now."""

    def __init__(self, machine: str, *, writes: bool = True, resources: dict[str, Any] | None = None) -> None:
        self.machine, self.writes = machine, writes
        self.resources: dict[str, Any] = resources or {}
        if resources is None:
            for file in (CORPUS / machine).rglob("index.json"):
                self.resources[_key("/" + str(file.parent.relative_to(CORPUS / machine)))] = json.loads(file.read_text())
        self.seen: list[Seen] = []
        self.rules: list[tuple[str, str, Fault]] = []
        self.url = ""

    def rule(self, method: str, path_end: str, fault: Fault) -> None:
        self.rules.append((method, path_end, fault))

    def get(self, path: str) -> Any:
        return self.resources[_key(path)]

    def sent(self, method: str, path_end: str = "") -> list[Any]:
        return [s.body for s in self.seen if s.method == method and s.path.rstrip("/").endswith(path_end)]

    @property
    def ibmc(self) -> bool:
        return "ibmc" in self.machine

    # Writes

    def post(self, path: str, body: Any) -> Answer:
        if not self.writes:
            return 405, None
        owner, _, action = path.partition("/Actions/")
        resource = self.resources.get(_key(owner))
        if resource is None:
            return 404, None
        if action == "ComputerSystem.Reset":
            return self._reset(resource, body["ResetType"])
        if action == "VirtualMedia.InsertMedia":
            return self._insert(owner, resource, body)
        if action == "VirtualMedia.EjectMedia":
            return self._eject(owner, resource, body)
        return 404, None

    def _reset(self, system: Any, kind: str) -> Answer:
        if "Restart" in kind or "Cycle" in kind:
            raise AssertionError(f"{kind} was sent: the driver asks for states, never for a restart")
        if "dell" in self.machine and kind == "On" and system["PowerState"] == "On":
            return 409, refusal("IDRAC.2.8.PSU501")
        system["PowerState"] = "On" if kind in ("On", "ForceOn") else "Off"
        return 204, None

    def _insert(self, owner: str, slot: Any, body: Any) -> Answer:
        if slot.get("Inserted"):
            return 500, refusal("IDRAC.2.8.VRM0012")
        if "nvidia" in self.machine and not body["Image"].startswith("https:"):
            return 400, refusal("Base.1.15.0.ResourceAtUriInUnknownFormat")
        if "supermicro" in self.machine and ("Inserted" in body or set(body["Image"]) & set("?=")):
            return 400, refusal("Base.1.0.PropertyNotWritable")
        slot.update(Inserted=True, Image=body["Image"], ImageName=body["Image"].rsplit("/", 1)[-1], ConnectedVia="URI")
        if "supermicro" in self.machine:
            slot["Actions"]["#VirtualMedia.EjectMedia"] = {"target": f"{owner}/Actions/VirtualMedia.EjectMedia"}
        return 202 if "hpe" not in self.machine else 200, None

    def _eject(self, owner: str, slot: Any, body: Any) -> Answer:
        if not slot.get("Inserted"):
            return 500, refusal("IDRAC.2.8.VRM0009")
        if body is None and "hpe" in self.machine:
            return 400, refusal("Base.1.4.MalformedJSON")
        slot.update(Inserted=False, Image=None, ConnectedVia="NotConnected")
        if "supermicro" in self.machine:
            del slot["Actions"]["#VirtualMedia.EjectMedia"]
        else:
            slot["ImageName"] = None
        return 204, None

    def patch(self, path: str, body: Any, if_match: str | None) -> Answer:
        resource = self.resources.get(_key(path))
        if not self.writes or resource is None:
            return 405, None
        if self.ibmc and if_match != '"fresh"':
            return 412, refusal("Base.1.0.PreconditionFailed")
        if "Boot" in body:
            if "nvidia" in self.machine and not path.endswith("/Settings"):
                return 400, refusal("Base.1.15.0.PropertyNotWritable")
            resource["Boot"].update(body["Boot"])
        elif "dmtf" in self.machine and "Image" in body:
            resource.update(body, ConnectedVia="URI" if body["Inserted"] else "NotConnected")
        else:
            return 400, refusal("Base.1.0.PropertyUnknown")
        return 200, resource


class Handler(BaseHTTPRequestHandler):
    bmc: FakeBmc

    def log_message(self, *args: Any) -> None: ...

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def hang_up(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        path = self.path.split("?")[0]
        login, if_match = self.headers.get("Authorization"), self.headers.get("If-Match")
        self.bmc.seen.append(Seen(self.command, path, body, login, if_match))

        def apply() -> Answer:
            if self.command == "GET":
                found = self.bmc.resources.get(_key(path))
                return (404, None) if found is None else (200, found)
            return self.bmc.post(path, body) if self.command == "POST" else self.bmc.patch(path, body, if_match)

        for method, end, fault in self.bmc.rules:
            if method == self.command and path.rstrip("/").endswith(end):
                answer = fault(self, apply)
                break
        else:
            answer = apply()
        if answer is not None:
            headers = {"ETag": '"fresh"'} if self.bmc.ibmc and self.command == "GET" else {}
            self.answer(*answer, headers)

    do_GET = do_POST = do_PATCH = _handle


@contextlib.contextmanager
def start_bmc(bmc: FakeBmc, *, certificate: Path | None = None) -> Iterator[FakeBmc]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"bmc": bmc}))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that go away are part of the tests
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    bmc.url = f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_port}"
    try:
        yield bmc
    finally:
        server.shutdown()
        server.server_close()


def small_bmc() -> dict[str, Any]:
    """The least that is Redfish with a server in it: for faults that need no vendor."""
    s = "/redfish/v1/Systems/1"
    return {
        "/redfish/v1": {"RedfishVersion": "1.15.0", "Systems": {"@odata.id": "/redfish/v1/Systems"}},
        "/redfish/v1/systems": {"Members": [{"@odata.id": s}]},
        "/redfish/v1/systems/1": {
            "Id": "1", "SystemType": "Physical", "PowerState": "On", "VirtualMedia": {"@odata.id": f"{s}/VirtualMedia"},
            "Boot": {"BootSourceOverrideTarget": "None", "BootSourceOverrideEnabled": "Disabled", "BootSourceOverrideMode": "UEFI"},
            "Actions": {"#ComputerSystem.Reset": {"target": f"{s}/Actions/ComputerSystem.Reset"}},
        },
        "/redfish/v1/systems/1/virtualmedia": {"Members": [{"@odata.id": f"{s}/VirtualMedia/CD"}]},
        "/redfish/v1/systems/1/virtualmedia/cd": {
            "Id": "CD", "Name": "Virtual CD", "MediaTypes": ["CD"], "Inserted": False, "Image": None, "ConnectedVia": "NotConnected",
            "Actions": {f"#VirtualMedia.{a}": {"target": f"{s}/VirtualMedia/CD/Actions/VirtualMedia.{a}"} for a in ("InsertMedia", "EjectMedia")},
        },
    }  # fmt: skip


def refusal(message_id: str, message: str = "Refused.") -> Any:
    return {"error": {"code": message_id, "message": message, "@Message.ExtendedInfo": [{"MessageId": message_id, "Message": message}]}}


def _key(path: str) -> str:
    return path.rstrip("/").lower()  # iLO's own links mix cases
