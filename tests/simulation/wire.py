"""The network between machines and the service: requests may be lost, late, come twice, or never be answered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from far_end import Refused, Unreachable
from virtual_time import Signal, VirtualTime

from repave.agent import protocol

if TYPE_CHECKING:
    from far_end import Machine
    from service import Service

TIMEOUT_S = 10.0  # agent/http_client.py


class Answer:
    """Where a request's answer will be."""

    __slots__ = ("body", "signal", "status")

    def __init__(self) -> None:
        self.status, self.body, self.signal = 0, None, Signal()


class Wire:
    def __init__(self, time: VirtualTime) -> None:
        self.time = time
        self.service: Service

    def call(self, machine: Machine, token: str, method: str, path: str, body: dict[str, Any] | None = None, *, boot_id: str = "") -> Any:
        """The answer's body. Raises Refused on 4xx, Unreachable on no answer and 5xx."""
        time, t = self.time, machine.trouble
        time.sleep(time.rng.uniform(0.001, 0.05) if not (t.has("wire-slow") and t.fire("wire-slow")) else time.rng.uniform(1, 8))
        if self._lost(machine, "request-lost") or self._is_cut(machine):
            time.sleep(TIMEOUT_S)
            raise Unreachable
        answer = Answer()
        if not self.service.deliver(token, method, path, body, answer):
            time.sleep(1)
            raise Unreachable
        for kind, least, most in (("twice", 0.0, 1.0), ("late-twice", 5.0, 600.0)):
            if self._lost(machine, kind):
                self.time.spawn(f"{kind} {path}", lambda: self.service.deliver(token, method, path, body, Answer()), after=time.rng.uniform(least, most))
        if not answer.status:
            time.wait(answer.signal, time.now + TIMEOUT_S)
        if path == "/agent/v1/plan" and answer.status == 200 and answer.body:
            machine.plans.append((time.now, boot_id, answer.body))
        if not answer.status or self._lost(machine, "answer-lost") or self._is_cut(machine) or answer.status >= 500:
            time.sleep(TIMEOUT_S if 0 < answer.status < 500 else 1)  # no answer: that long was waited already
            raise Unreachable
        if answer.status >= 400:
            raise Refused(answer.status)
        return answer.body

    def read_media(self, machine: Machine, url: str) -> protocol.Slot | None:
        """The BMC reads the media: the run's slot, or None where they are inert. Raises Unreachable."""
        answer = Answer()
        self.time.sleep(self.time.rng.uniform(1, 10))
        if not self.service.deliver("", "MEDIA", url, None, answer):
            raise Unreachable
        if not answer.status:
            self.time.wait(answer.signal, self.time.now + TIMEOUT_S)
        if answer.status != 200 and answer.status != 404:
            raise Unreachable
        return answer.body  # type: ignore[no-any-return]

    def _lost(self, machine: Machine, kind: str) -> bool:
        t = machine.trouble
        return t.has(kind) and self.time.rng.random() < t.get(kind)["share"] and t.fire(kind)

    def _is_cut(self, machine: Machine) -> bool:
        cut = machine.trouble.faults.get("cut")
        return bool(cut) and cut["from"] <= self.time.now < cut["until"] and machine.trouble.fire("cut")
