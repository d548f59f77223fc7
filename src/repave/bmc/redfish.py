"""The Redfish driver: `Bmc` over HTTP, on sushy's quirk handling and our connector.

Each call: take the BMC's lock, find what is asked for, read it, write at most once, read back until it shows.
A write whose answer is lost or refused is judged by the state that is read afterwards, never by hope.
Paths are remembered, states never: what may change is read from the BMC each time.

Owns: the order of requests and the choice of system, slot and boot target. Not: the wire (connector.py), what vendors
mean by their JSON (quirks.py), retries of a whole step (workflow).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from sushy import exceptions as sushy_errors
from sushy.resources.manager.virtual_media import VirtualMedia

from repave.bmc import Bmc, BmcAddress, BmcFacts, Power, quirks
from repave.bmc.connector import Connector, CountRequest, Exchange, LostAnswer, NotJson, parse_json
from repave.bmc.quirks import action_of, as_dict, as_list, as_text, link_of
from repave.errors import BmcError

ROOT = "/redfish/v1/"
POWER_SETTLE_S = 60.0  # ForceOff shows within 10 s on real machines; some show On only after a self test of the board
INSERT_SETTLE_S = 25.0  # iBMC needs 12-15 s (peers.md 4.1), others under 5
EJECT_SETTLE_S = 15.0
BOOT_SETTLE_S = 10.0  # iDRAC shows the override a few seconds after it took it
POLL_S = (0.2, 0.3, 0.5, 1.0)  # pauses between readings; the last one repeats
BUSY_TRIES = 4
BUSY_PAUSE_S = 3.0  # iLO and iDRAC refuse for some seconds after a power change
MAX_MEMBERS = 64  # of a collection; more is no server's BMC
MAX_NICS = 16

_POWER = {"On": Power.ON, "Off": Power.OFF}
_locks: dict[str, threading.Lock] = {}
_locks_guard = threading.Lock()


def _lock_of(origin: str) -> threading.Lock:
    """One lock per BMC in this process: BMCs mishandle parallel calls, and `requests` sessions are not promised thread-safe."""
    with _locks_guard:
        return _locks.setdefault(origin, threading.Lock())


@dataclass
class Paths:
    """Where a BMC keeps its host system and its CD slots; never what they hold. A slow BMC takes a second for each answer that this saves."""

    system: str | None = None
    slots: list[str] | None = None
    way: str = ""  # how media get into the first slot; "" where no way is offered

    def forget(self) -> None:
        self.system = self.slots = None


class RedfishBmc(Bmc):
    """The BMC at `address`. Every call ends within `deadline_s` (plus its own `graceful_s`).

    `recognize` is given serial and UUID with each reading of the system, so before each call changes anything; what it raises is the answer.
    `observe` is told each request and what came of it.
    `paths` may be kept for the next RedfishBmc of the same address; `probe` finds them anew, and so does whatever follows a failure.
    Where the BMC has HttpBootUri and `http_boot` is `always`, or `where-needed` and no CD slot takes media, "media" below are what the firmware
    fetches itself (UEFI HTTP boot).
    """

    def __init__(
        self, address: BmcAddress, *, deadline_s: float = 80, observe: Callable[[Exchange], None] = lambda exchange: None,
        before_write: Callable[[], None] = lambda: None, recognize: Callable[[str, str], None] = lambda serial, uuid: None, paths: Paths | None = None,
        http_boot: Literal["never", "where-needed", "always"] = "never", count: CountRequest = lambda method, outcome: None,
    ) -> None:  # fmt: skip
        self.deadline_s = deadline_s
        self._recognize, self._http_boot, self._username = recognize, http_boot, address.username
        self._connector = Connector(address, observe=observe, before_write=before_write, count=count)
        self._lock = _lock_of(self._connector.origin)
        path = urlsplit(address.url).path
        named = address.system_uri or (path if "/Systems/" in path else None)
        self._named_system = named
        self._root: dict[str, Any] | None = None
        self._paths = paths or Paths()

    def close(self) -> None:
        self._connector.close()

    def __enter__(self) -> RedfishBmc:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The contract

    def probe(self) -> BmcFacts:
        with self._call():
            self._paths.forget()
            system = self._read_system()
            slots = self._find_slots()
            return BmcFacts(
                system_uri=self._paths.system or "",
                manufacturer=as_text(system.get("Manufacturer")),
                model=as_text(system.get("Model")),
                serial=as_text(system.get("SerialNumber")),
                uuid=as_text(system.get("UUID")),
                power=_power_of(system),
                virtual_media=tuple(slots),
                boot_targets=tuple(self._boot(system)[2]),
                macs=self._macs(system),
                certificate_sha256=self._connector.certificate_sha256,
                arch=self._arch(system),
                by_http=self._comes_by_http(system),
            )

    def check_media(self, urls: Sequence[str]) -> None:
        """What can be known without touching anything: a slot is there, it takes one of `urls`, and its CD can be booted; or HTTP boot can be.

        Raises: no_virtual_media, media_protocol, boot_override_rejected.
        """
        with self._call():
            system = self._read_system()
            if self._comes_by_http(system):
                _order_for_firmware(urls)
                return
            self._choose_slot(urls)
            self._cd_target(system)

    def read_power(self) -> Power:
        with self._call():
            return _power_of(self._read_system())

    def power_on(self) -> None:
        with self._call():
            self._reach_power(self._read_system(), Power.ON, "On")

    def power_off(self, *, graceful_s: float = 0, while_waiting: Callable[[], None] = lambda: None) -> bool:
        def is_off() -> bool:
            while_waiting()
            return _power_of(self._read_system()) is Power.OFF

        with self._call(extra_s=graceful_s):
            system = self._read_system()
            if self._is_already(Power.OFF, system):
                return False
            if graceful_s > 0 and self._asked_to_shut_down(system) and self._until(is_off, graceful_s):
                return False
            self._reach_power(system, Power.OFF, "ForceOff")
            return True

    def wait_for_off(self, within_s: float) -> bool:
        with self._call(extra_s=within_s):
            return self._until(self._is(Power.OFF), within_s)

    def insert_media(self, urls: Sequence[str]) -> str:
        with self._call():
            system = self._read_system()  # nothing goes into another server's drive
            if self._comes_by_http(system):
                return self._insert_by_http(system, urls)
            slot_uri, way, usable = self._choose_slot(urls)
            self._eject_all(must=slot_uri)
            refused: list[BmcError] = []
            for url in usable:
                try:
                    return self._insert(slot_uri, way, url)
                except BmcError as e:
                    if e.slug not in ("media_protocol", "media_rejected"):
                        raise
                    refused.append(e)
            raise next((e for e in refused if e.slug == "media_rejected"), refused[0])

    def eject_media(self) -> None:
        with self._call():
            system = self._read_system()  # as for insert_media
            if self._comes_by_http(system):
                self._forget_http_uri(system)
            self._eject_all(must=None)

    def withdraw_media(self, folder: str) -> bool:
        with self._call():
            system = self._read_system()  # as for insert_media: another server's empty drive says nothing of ours
            by_http = folder.casefold() in quirks.http_uri(self._boot(system)[1]).casefold()
            is_ours = {uri: quirks.shows_image_under(self._get(uri)[0], folder) for uri in self._find_slots()}
            if not is_ours and not (self._http_boot != "never" and self._has_http_boot(system)):
                raise BmcError("no_virtual_media")  # a BMC that has just come back may show none yet
            if by_http or any(is_ours.values()):
                self._reach_boot_from_disk()  # first: while the media are in, it is known whose override it is
            if by_http:
                self._forget_http_uri(system)
            for uri in (uri for uri, ours in is_ours.items() if ours):
                self._eject(uri)
            if None in is_ours.values() and not any(is_ours.values()):
                raise BmcError("protocol", "A CD slot holds an image and does not tell its path.")
            return by_http or any(is_ours.values())

    def boot_from_media_once(self) -> None:
        with self._call():
            system = self._read_system()
            if not self._comes_by_http(system):
                self._reach_boot_once(system, {"BootSourceOverrideTarget": self._cd_target(system)})
            elif uri := quirks.http_uri(self._boot(system)[1]):
                self._reach_boot_once(system, {"BootSourceOverrideTarget": "UefiHttp", "HttpBootUri": uri})
            else:
                raise BmcError("media_not_inserted")

    def boot_from_disk(self) -> None:
        with self._call():
            self._reach_boot_from_disk()

    def set_password(self, password: str) -> None:
        with self._call():
            self._read_system()
            uri = self._find_account()

            def send() -> None:
                _, headers = self._get(uri)
                self._connector.patch(uri, data={"Password": password}, etag=headers.get("ETag"))

            # Nothing is read back: from here on the BMC may refuse the login that we have.
            try:
                self._write(send, lambda: False, "password_refused")
            except BmcError as refusal:  # some quote what they refuse
                raise BmcError(refusal.slug, refusal.detail.replace(password, "***")) from None

    def _find_account(self) -> str:
        """The account that we log in with. Source: Redfish DSP0266, AccountService."""
        service = self._find(link_of(self._service_root().get("AccountService")), needed=True)
        for uri in self._members(link_of(service.get("Accounts")), needed=True):
            if as_text(self._find(uri).get("UserName")) == self._username:
                return uri
        raise BmcError("forbidden", "It does not show the account that we log in with.")

    # Each call

    @contextlib.contextmanager
    def _call(self, *, extra_s: float = 0) -> Iterator[None]:
        """Lock and deadline around a call; whatever goes wrong inside leaves as BmcError."""
        deadline = time.monotonic() + self.deadline_s + extra_s
        if not self._lock.acquire(timeout=self.deadline_s):
            raise BmcError("busy", "Another call to this BMC is under way.")
        went_well = False
        try:
            self._connector.deadline = deadline
            yield
            went_well = True
        except LostAnswer as e:
            raise BmcError(e.slug, e.detail) from e
        except NotJson as e:
            raise BmcError("protocol", e.detail) from e
        except sushy_errors.HTTPError as e:
            raise _refused(e, "busy" if e.status_code >= 500 else "protocol") from e
        except (sushy_errors.SushyError, LookupError, TypeError, AttributeError, ValueError) as e:
            # sushy's parser meets JSON of any shape; what it cannot digest is the BMC's doing.
            raise BmcError("protocol", f"An answer has a shape that makes no sense ({type(e).__name__}).") from e
        finally:
            if not went_well:
                self._paths.forget()
            self._lock.release()

    def _get(self, uri: str) -> tuple[dict[str, Any], Any]:
        """The resource at `uri` now, and its headers."""
        response = self._connector.get(uri)
        return parse_json(response.content, urlsplit(uri).path), response.headers

    def _find(self, uri: str, *, needed: bool = False) -> dict[str, Any]:
        """The resource, or {} where there is none. Facts that are not `needed` may also be forbidden or broken."""
        try:
            return self._get(uri)[0] if uri else {}
        except sushy_errors.HTTPError as e:
            if needed and e.status_code != 404:
                raise
            return {}

    def _members(self, uri: str, *, needed: bool = False) -> list[str]:
        """The links in a collection, over its pages."""
        links: list[str] = []
        while uri and len(links) < MAX_MEMBERS:
            page = self._find(uri, needed=needed)
            found = [link for link in map(link_of, as_list(page.get("Members"))) if link]
            links += found
            uri = as_text(page.get("Members@odata.nextLink")) if found else ""
        return links[:MAX_MEMBERS]

    def _until(self, reached: Callable[[], bool], settle_s: float) -> bool:
        """Whether `reached` came true within `settle_s`, half a second before the deadline at the latest."""
        end = min(time.monotonic() + settle_s, self._connector.deadline - 0.5)
        for n in range(10_000):
            if reached():
                return True
            pause = POLL_S[min(n, len(POLL_S) - 1)]
            if time.monotonic() + pause > end:
                break
            time.sleep(pause)
        return False

    def _write(self, send: Callable[[], object], reached: Callable[[], bool], otherwise: str) -> None:
        """The request was sent and not refused, or the state is there anyway, or the answer is lost: read the state next.

        Sent again only after an answer that says "not now" (busy, or 409 as iDRAC10 says to On just after Off; bug 2162995),
        and only when the state is not reached.
        """
        for attempt in range(1, BUSY_TRIES + 1):
            try:
                send()
                return
            except LostAnswer:
                return
            except sushy_errors.HTTPError as e:
                refusal = _refused(e, otherwise)
                again = refusal.slug == "busy" or e.status_code == 409
            if reached():
                return
            if not again or attempt == BUSY_TRIES or self._connector.remaining_s() < 3 * BUSY_PAUSE_S:
                raise refusal
            time.sleep(BUSY_PAUSE_S)

    # The system

    def _service_root(self) -> dict[str, Any]:
        """The service root, asked without login first: whoever does not speak Redfish gets no password."""
        if self._root is None:
            try:
                root = parse_json(self._connector.get(ROOT, anonymous=True).content, ROOT)
            except sushy_errors.AccessError:
                root = self._get(ROOT)[0]
            except (NotJson, sushy_errors.ResourceNotFoundError) as e:
                raise BmcError("not_redfish", "There is no service root.") from e
            if not (root.get("RedfishVersion") or "ServiceRoot" in as_text(root.get("@odata.type"))):
                raise BmcError("not_redfish", "The answer is not a service root.")
            self._root = root
        return self._root

    def _read_system(self) -> dict[str, Any]:
        """The host's ComputerSystem as it is now, and it is the one that is meant."""
        uri, system = self._paths.system or self._named_system, dict[str, Any]()
        if self._paths.system is None:
            self._service_root()
        if uri is None:
            uri, system = self._find_host()
        else:
            try:
                system = self._get(uri)[0]
            except sushy_errors.ResourceNotFoundError as e:
                # Where the path has the UUID or serial number in it, another machine's BMC only says that it knows no such system: what has it?
                with contextlib.suppress(BmcError, sushy_errors.SushyError):
                    self._look_who(self._find_host()[1])
                raise BmcError("no_system", f"There is no {uri}.") from e
        self._look_who(system)
        self._paths.system = uri
        return system

    def _look_who(self, system: dict[str, Any]) -> None:
        self._recognize(as_text(system.get("SerialNumber")), as_text(system.get("UUID")))

    def _find_host(self) -> tuple[str, dict[str, Any]]:
        """The one system that is a host, and where it is."""
        links = self._members(link_of(self._service_root().get("Systems")), needed=True)
        systems = {uri: self._find(uri, needed=True) for uri in links}
        hosts = quirks.hosts_of({uri: system for uri, system in systems.items() if system})
        if not hosts:
            raise BmcError("no_system")
        if len(hosts) > 1:
            raise BmcError("ambiguous_system", ", ".join(hosts))
        return hosts[0], systems[hosts[0]]

    def _macs(self, system: dict[str, Any]) -> tuple[str, ...]:
        found: dict[str, None] = {}
        for uri in self._members(link_of(system.get("EthernetInterfaces")))[:MAX_NICS]:
            if self._connector.remaining_s() < self.deadline_s / 3:  # a slow BMC: better some than no answer at all
                break
            nic = self._find(uri)
            mac = as_text(nic.get("MACAddress")) or as_text(nic.get("PermanentMACAddress"))
            if mac:
                found[mac.lower()] = None
        return tuple(found)

    def _arch(self, system: dict[str, Any]) -> str:
        known = quirks.arch_of(as_dict(system.get("ProcessorSummary")))
        first = self._members(link_of(system.get("Processors")))[:1] if not known else []
        return known or quirks.arch_of(*(self._find(uri) for uri in first))

    # Power

    def _is(self, power: Power) -> Callable[[], bool]:
        return lambda: _power_of(self._read_system()) is power

    def _is_already(self, power: Power, system: dict[str, Any]) -> bool:
        """Nothing need be sent. Read twice: an answer out of a cache must not pass for a server that is off (trust.md T34)."""
        return _power_of(system) is power and self._is(power)()

    def _reset_types(self, system: dict[str, Any]) -> tuple[str, list[str]]:
        """Where to POST a reset, and the values on offer ([] = not told)."""
        action = action_of(system, quirks.RESET)
        target = as_text(action.get("target"))
        if not target:
            raise BmcError("power_failed", "The system offers no reset action.")
        return target, self._allowable(action, "ResetType")

    def _allowable(self, action: dict[str, Any], name: str) -> list[str]:
        """The values that an action takes for a parameter, told beside it or in its ActionInfo; [] = not told."""
        values = as_list(action.get(f"{name}@Redfish.AllowableValues"))
        if not values:
            for parameter in as_list(self._find(as_text(action.get("@Redfish.ActionInfo"))).get("Parameters")):
                if as_dict(parameter).get("Name") == name:
                    values = as_list(as_dict(parameter).get("AllowableValues"))
        return [as_text(v) for v in values]

    def _reach_power(self, system: dict[str, Any], wanted: Power, reset_type: str) -> None:
        if self._is_already(wanted, system):
            return
        target, offered = self._reset_types(system)
        if offered and reset_type not in offered and f"Force{reset_type}" in offered:
            reset_type = f"Force{reset_type}"  # ForceOn where On is not on offer
        reached = self._is(wanted)
        self._write(lambda: self._connector.post(target, data={"ResetType": reset_type}), reached, "power_failed")
        if not self._until(reached, POWER_SETTLE_S):
            raise BmcError("power_failed", f"{reset_type} was sent; the power state is not {wanted}.")

    def _asked_to_shut_down(self, system: dict[str, Any]) -> bool:
        """Whether GracefulShutdown was sent and not refused; a refusal is no failure, ForceOff follows."""
        target, offered = self._reset_types(system)
        if offered and "GracefulShutdown" not in offered:
            return False
        try:
            self._connector.post(target, data={"ResetType": "GracefulShutdown"})
        except sushy_errors.HTTPError:
            return False
        except LostAnswer:
            pass
        return True

    # Virtual media

    def _find_slots(self) -> list[str]:
        """URIs of the slots that take a CD, the one we would use first.

        The system's own come before its managers' (iDRAC9 moved them at 6.00 and kept the old ones; N), slots with the
        standard action before those with PATCH or only a vendor's action.
        """
        if self._paths.slots is None:
            system = self._read_system()
            named = [link_of(m) for m in as_list(as_dict(system.get("Links")).get("ManagedBy"))]
            managers = [m for m in (self._find(uri, needed=True) for uri in named) if m]
            if not managers:  # xFusion names none (N), some name one that is not there (S)
                everyone = self._members(link_of(self._service_root().get("Managers")), needed=True)
                managers = [self._find(uri) for uri in everyone]
            collections = dict.fromkeys(link_of(owner.get("VirtualMedia")) for owner in (system, *managers))
            found: dict[str, str] = {}
            for uri in dict.fromkeys(u for c in collections for u in self._members(c, needed=True)):
                with contextlib.suppress(sushy_errors.ResourceNotFoundError):
                    slot, headers = self._get(uri)
                    if quirks.takes_cd(slot):
                        found[uri] = quirks.insert_way(slot, headers.get("Allow"))
            self._paths.way = next((way for way in ("action", "patch") if way in found.values()), "")
            self._paths.slots = sorted(found, key=lambda uri: ("action", "patch", "").index(found[uri]))
        return self._paths.slots

    def _choose_slot(self, urls: Sequence[str]) -> tuple[str, str, list[str]]:
        """The slot, how to insert, and those of `urls` that it may take, in their order."""
        for uri in self._find_slots()[:1]:
            slot, headers = self._get(uri)
            way = quirks.insert_way(slot, headers.get("Allow"))
            if not way:
                raise BmcError("no_virtual_media", "The CD slot offers no standard way to insert media.")
            told = self._allowable(action_of(slot, quirks.INSERT), "TransferProtocolType")
            told = told or self._allowable(slot, "TransferProtocolType")
            usable = [url for url in urls if not told or urlsplit(url).scheme in quirks.schemes_of(told)]
            if not usable:
                raise BmcError("media_protocol", f"It takes {', '.join(told) or 'none of no URLs'}.")
            return uri, way, usable
        raise BmcError("no_virtual_media")

    def _insert(self, slot_uri: str, way: str, url: str) -> str:
        """The image at `url` is in the slot. Raises media_protocol or media_rejected when refused: another URL may do."""
        is_in = False
        failure: str | None = None

        def send() -> None:
            self._connector.last_accepted = None
            if way == "patch":
                _, headers = self._get(slot_uri)
                body = {"Image": url, "Inserted": True, "WriteProtected": True}
                self._connector.patch(slot_uri, data=body, etag=headers.get("ETag"))
            else:
                VirtualMedia(self._connector, slot_uri).insert_media(url)

        def shown() -> bool:
            return quirks.shows_image(self._get(slot_uri)[0], url)

        def settled() -> bool:
            nonlocal is_in, failure
            is_in = shown()
            failure = None if is_in else self._task_failure(task)
            return is_in or failure is not None

        try:
            self._write(send, shown, "media_rejected")
        except BmcError as e:
            if e.slug == "media_rejected" and quirks.refuses_protocol(_cause_text(e)):
                raise BmcError("media_protocol", _hide(e.detail, url)) from None
            raise BmcError(e.slug, _hide(e.detail, url)) from None
        task = self._task_of(self._connector.last_accepted)
        self._until(settled, INSERT_SETTLE_S)
        if is_in:
            return url
        if failure is not None:
            slug = "media_protocol" if quirks.refuses_protocol(failure.lower()) else "media_rejected"
            raise BmcError(slug, _hide(failure, url))
        raise BmcError("media_not_inserted")

    def _task_of(self, response: Any) -> str:
        """The URI of the task that a 202 names, or ""."""
        if response is None or response.status_code != 202:
            return ""
        with contextlib.suppress(BmcError):
            body = parse_json(response.content, "task")
            if "Task" in as_text(body.get("@odata.type")) and link_of(body):
                return link_of(body)
        return as_text(response.headers.get("Location"))

    def _task_failure(self, task: str) -> str | None:
        """What a failed task says, or None. Unknown states go on running; a task that is gone tells nothing."""
        body = {}
        with contextlib.suppress(NotJson):
            body = self._find(task)
        if body.get("TaskState") not in quirks.TASK_FAILED:
            return None
        messages = [as_dict(m) for m in as_list(body.get("Messages"))]
        return " ".join(f"{as_text(m.get('MessageId'))} {as_text(m.get('Message'))}".strip() for m in messages) or "The task failed."

    def _eject_all(self, *, must: str | None) -> None:
        """No CD slot holds media: a second CD may be the one that boots. With `must`, only that slot's failure counts."""
        for uri in self._find_slots():
            try:
                self._eject(uri)
            except BmcError:
                if must is None or uri == must:
                    raise

    def _eject(self, uri: str) -> None:
        def empty() -> bool:
            return not quirks.is_occupied(self._get(uri)[0])

        def send() -> None:
            if not target and quirks.insert_way(slot, headers.get("Allow")) == "patch":
                self._connector.patch(uri, data={"Image": None, "Inserted": False}, etag=headers.get("ETag"))
                return
            action = target or f"{uri.rstrip('/')}/Actions/VirtualMedia.EjectMedia"
            try:
                self._connector.post(action, data={})  # iLO wants the empty object (S)
            except sushy_errors.HTTPError as e:
                if e.status_code not in (400, 415) or empty():
                    raise
                self._connector.post(action)

        slot, headers = self._get(uri)
        if not quirks.is_occupied(slot) and empty():
            return
        target = as_text(action_of(slot, quirks.EJECT).get("target"))
        self._write(send, empty, "media_rejected")
        if not self._until(empty, EJECT_SETTLE_S):
            raise BmcError("media_rejected", "EjectMedia was accepted, but the media are still in the drive.")

    # Boot override

    def _boot(self, system: dict[str, Any]) -> tuple[str, dict[str, Any], list[str]]:
        """Where the override is set, the override in force there, and the targets allowed ([] = not told).

        Some keep it in the Settings resource (GH200, Nokia: D, S); others have a Settings resource without it (Lenovo: S).
        """
        boot, uri = as_dict(system.get("Boot")), self._paths.system or ""
        settings_uri = link_of(as_dict(system.get("@Redfish.Settings")).get("SettingsObject"))
        pending = as_dict(self._find(settings_uri).get("Boot"))
        name = "BootSourceOverrideTarget@Redfish.AllowableValues"
        allowed = [as_text(v) for v in as_list(boot.get(name)) or as_list(pending.get(name))]
        if "BootSourceOverrideTarget" in pending:
            return settings_uri, pending, allowed
        return uri, boot, allowed

    def _shows_override(self, reached: Callable[[dict[str, Any]], bool]) -> bool:
        """Whether the override waiting in the Settings resource, or the one in force, satisfies `reached`."""
        system = self._read_system()
        return reached(self._boot(system)[1]) or reached(as_dict(system.get("Boot")))

    def _cd_target(self, system: dict[str, Any]) -> str:
        target = quirks.cd_target(as_text(system.get("Manufacturer")), self._boot(system)[2])
        if target is None:
            raise BmcError("boot_override_rejected", "A CD is not among the boot targets.")
        return target

    def _reach_boot_once(self, system: dict[str, Any], source: dict[str, str]) -> None:
        """The next boot is from `source`, read back."""
        uri, boot, _ = self._boot(system)
        wanted = source | {"BootSourceOverrideEnabled": "Once"}
        mode = as_text(boot.get("BootSourceOverrideMode"))
        # All together, as AMI wants them (N); the mode shown while Disabled may not be the one in use (iBMC; N).
        # But not when it is known to be right: OpenStack's emulator rewrites the firmware settings each time.
        sets_mode = mode and (mode != "UEFI" or boot.get("BootSourceOverrideEnabled") == "Disabled")

        def reached(now: dict[str, Any]) -> bool:
            once = now.get("BootSourceOverrideEnabled") in ("Once", "Continuous")
            uefi = not mode or now.get("BootSourceOverrideMode") == "UEFI"
            return once and uefi and source.items() <= now.items()

        try:
            self._reach_override(uri, wanted | ({"BootSourceOverrideMode": "UEFI"} if sets_mode else {}), reached)
        except BmcError as e:
            if e.slug != "boot_override_rejected" or not sets_mode or mode != "UEFI":
                raise
            self._reach_override(uri, wanted, reached)  # the mode is right, and may be read-only

    # UEFI HTTP boot

    def _has_http_boot(self, system: dict[str, Any]) -> bool:
        """Both are needed: Supermicro offers the target without a place for the URL, and then only DHCP could tell it (D)."""
        _, boot, allowed = self._boot(system)
        return "HttpBootUri" in boot and "UefiHttp" in allowed

    def _comes_by_http(self, system: dict[str, Any]) -> bool:
        if self._http_boot == "never" or not self._has_http_boot(system):
            return False
        return self._http_boot == "always" or not (self._find_slots() and self._paths.way)

    def _insert_by_http(self, system: dict[str, Any], urls: Sequence[str]) -> str:
        """The next boot fetches the image at the URL returned. Target and URL in one request: alone, some BMCs ignore the URL (S)."""
        refused: BmcError | None = None
        for url in _order_for_firmware(urls):
            try:
                self._reach_boot_once(system, {"BootSourceOverrideTarget": "UefiHttp", "HttpBootUri": url})
                return url
            except BmcError as e:
                if e.slug != "boot_override_rejected":
                    raise BmcError(e.slug, _hide(e.detail, url)) from None
                refused = BmcError("media_rejected", _hide(e.detail, url))
        assert refused is not None
        raise refused

    def _forget_http_uri(self, system: dict[str, Any]) -> None:
        """No URL is set; or it was not let go, and does nothing: the boot target is another by then."""
        uri, boot, _ = self._boot(system)
        if quirks.http_uri(boot):
            with contextlib.suppress(sushy_errors.HTTPError, LostAnswer):
                _, headers = self._get(uri)
                self._connector.patch(uri, data={"Boot": {"HttpBootUri": None}}, etag=headers.get("ETag"))

    def _reach_boot_from_disk(self) -> None:
        system = self._read_system()
        uri, boot, allowed = self._boot(system)
        if _boots_disk(boot) and _boots_disk(as_dict(system.get("Boot"))) and _boots_disk(as_dict(self._read_system().get("Boot"))):
            return
        ways = [{"BootSourceOverrideTarget": "None", "BootSourceOverrideEnabled": "Disabled"}]
        if "Hdd" in allowed:
            # OpenStack's emulator knows neither None nor Disabled: its disk comes by naming it.
            by_name = {"BootSourceOverrideTarget": "Hdd", "BootSourceOverrideEnabled": "Once"}
            ways.insert(0 if "None" not in allowed else 1, by_name)
        for way in ways[:-1]:
            try:
                return self._reach_override(uri, way, _boots_disk)
            except BmcError as e:
                if e.slug not in ("boot_override_rejected", "boot_override_ignored"):
                    raise
        self._reach_override(uri, ways[-1], _boots_disk)

    def _reach_override(self, uri: str, wanted: dict[str, str], reached: Callable[[dict[str, Any]], bool]) -> None:
        """The override satisfies `reached`, read back."""

        def send() -> None:
            _, headers = self._get(uri)  # iBMC wants the ETag of a fresh GET (N)
            self._connector.patch(uri, data={"Boot": wanted}, etag=headers.get("ETag"))

        def shown() -> bool:
            return self._shows_override(reached)

        self._write(send, shown, "boot_override_rejected")
        if not self._until(shown, BOOT_SETTLE_S):
            raise BmcError("boot_override_ignored", "It was accepted, but reading back shows another.")


def _power_of(system: dict[str, Any]) -> Power:
    return _POWER.get(as_text(system.get("PowerState")), Power.UNKNOWN)


def _boots_disk(boot: dict[str, Any]) -> bool:
    return boot.get("BootSourceOverrideEnabled") == "Disabled" or boot.get("BootSourceOverrideTarget") in (None, "None", "Hdd")


def _order_for_firmware(urls: Sequence[str]) -> list[str]:
    """Plain HTTP first: for HTTPS the firmware would have to know our certificate. Raises media_protocol where there is neither."""
    usable = [url for scheme in ("http", "https") for url in urls if urlsplit(url).scheme == scheme]
    if not usable:
        raise BmcError("media_protocol", "UEFI HTTP boot takes URLs of http and https.")
    return usable


def _refused(error: Any, otherwise: str) -> BmcError:
    """What a refusal means to us. The BMC's words are kept, cut to a line: they are what the operator searches for."""
    said = as_text(error.detail) or as_text(error.code)
    ids = [as_text(as_dict(m).get("MessageId")) for m in as_list(error.extended_info)]
    detail = f"HTTP {error.status_code}: {' '.join([*ids, said])}"[:300]
    refusal = BmcError(quirks.refusal_slug(error, otherwise), detail)
    refusal.__cause__ = error
    return refusal


def _cause_text(error: BmcError) -> str:
    cause = error.__cause__
    return quirks.refusal_text(cause) if isinstance(cause, sushy_errors.HTTPError) else error.detail.lower()


def _hide(text: str, url: str) -> str:
    """BMCs repeat the image's URL in their errors; its path is as good as a password."""
    path = urlsplit(url).path
    text = text.replace(url, "<media>")
    return text.replace(path, "<media>") if len(path) > 1 else text
