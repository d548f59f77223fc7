"""/repave/v1/servers: add (the BMC is asked first), list, show, change, remove. A BMC's password comes in and never goes out."""

import re
from dataclasses import replace
from ipaddress import ip_address, ip_interface
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from repave.api.operator.answers import After, Body, Json, Limit, ProblemRoute, cut_page, must_exist, one_more, render_list
from repave.api.operator.images import get_image
from repave.api.operator.scope import Admin, Operator, Scope, Viewer
from repave.bmc import BmcAddress, BmcFacts
from repave.domain.kept_partitions import parse_names
from repave.domain.model import Instance, Role, Server
from repave.domain.own_host import are_of_two
from repave.domain.root_disk import parse_hints
from repave.domain.urls import find_url_fault
from repave.errors import RequestError
from repave.store import new_id
from repave.workflow.bmc_login import find_password, rotate_password

router = APIRouter(route_class=ProblemRoute, prefix="/servers")


def _bmc_url(url: str) -> str:
    if fault := find_url_fault(url):
        raise ValueError(fault)
    return url.rstrip("/")


def _hints(text: str) -> str:
    parse_hints(text)
    return text


def _names(text: str) -> str:
    return ",".join(parse_names(text))


def _mac(text: str) -> str:
    if not re.fullmatch(r"([0-9a-f]{2}:){5}[0-9a-f]{2}", text.lower()):
        raise ValueError("must be a MAC address as aa:bb:cc:dd:ee:ff")
    return text.lower()


def _ip(text: str) -> str:
    return str(ip_address(text))


Address = Annotated[str, AfterValidator(_ip)]


class Network(Body):
    """Static settings of the NIC that the ramdisk and the new OS use; absent = DHCP. `vlan`: the address is on this tagged VLAN."""

    mac: Annotated[str, AfterValidator(_mac)]
    address: Address
    prefix: int = Field(ge=1, le=128)
    gateway: Address | None = None
    dns: list[Address] = Field(default=[])
    vlan: int | None = Field(default=None, ge=1, le=4094)

    @field_validator("prefix")
    @classmethod
    def _prefix_fits(cls, prefix: int, seen: ValidationInfo) -> int:
        if "address" in seen.data:
            ip_interface(f"{seen.data['address']}/{prefix}")
        return prefix

    @field_validator("gateway")
    @classmethod
    def _gateway_is_near(cls, gateway: str | None, seen: ValidationInfo) -> str | None:
        """Neither the ramdisk nor the new OS could reach another one: the server would be lost to us at its next boot."""
        if gateway is not None and {"address", "prefix"} <= seen.data.keys():
            network = ip_interface(f"{seen.data['address']}/{seen.data['prefix']}").network
            if ip_address(gateway) not in network:
                raise ValueError(f"is not in {network}")
        return gateway

    def as_json(self) -> Json:
        return self.model_dump(exclude_none=True)


class ServerSettings(Body):
    """What may be said of a server at any time."""

    bmc_url: Annotated[str, AfterValidator(_bmc_url)] | None = None
    bmc_username: str | None = Field(default=None, max_length=200)
    bmc_password: str | None = Field(default=None, min_length=1, max_length=200)
    tls_verify: str | None = Field(
        default=None, pattern="^(true|false|/.*)$"
    )  # true, false (then the certificate seen first is pinned), or a path to a CA bundle
    certificate_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    system_uri: str | None = Field(default=None, pattern="^/")
    rack: str | None = Field(default=None, max_length=100)
    unit: str | None = Field(default=None, max_length=20)
    root_disk: Annotated[str, AfterValidator(_hints)] | None = None
    keep_partitions: Annotated[str, AfterValidator(_names)] | None = Field(default=None, max_length=1000)  # names or GUIDs, by commas; "": none
    network: Network | None = None
    arch: Literal["amd64", "arm64"] | None = None
    boot: Literal["uefi", "bios"] | None = None


class NewServer(ServerSettings):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,62}$")
    bmc_url: Annotated[str, AfterValidator(_bmc_url)]
    bmc_username: str = Field(max_length=200)
    bmc_password: str = Field(min_length=1, max_length=200)
    blank: bool = False
    os_type: Literal["Linux", "Windows"] = "Linux"
    image: str | None = None  # name or id of what its OS was made from, where that is known


class ChangedServer(ServerSettings):
    repin: bool = False  # the certificate the BMC shows now is the one we trust


class Lock(Body):
    reason: str = Field(min_length=1, max_length=200)


class Replacement(Body):
    """A board swap. Without `serial` and `uuid` nothing changes: the answer says what the BMC shows. With them it must still show the same."""

    serial: str | None = Field(default=None, max_length=200)
    uuid: str | None = Field(default=None, max_length=200)
    bmc_password: str | None = Field(default=None, min_length=1, max_length=200)
    repin: bool = False  # a new board brings a new certificate


def instance_json(instance: Instance, images: dict[str, str]) -> Json:
    return {
        "id": instance.id, "state": instance.state.value, "operation_state": instance.operation_state, "image_id": instance.image_id,
        "image": images.get(instance.image_id or ""), "os_type": instance.os_type, "error": instance.error,
        "updated_at": instance.updated_at, "launched_at": instance.launched_at, "ssh_host_keys": instance.ssh_host_keys,
    }  # fmt: skip


def _server_json(scope: Scope, server: Server, instance: Instance, images: dict[str, str]) -> Json:
    power = scope.store.servers.read_power_seen(server.id)
    shown: Json = {
        "id": server.id, "name": server.name, "rack": server.rack, "unit": server.unit, "manufacturer": server.manufacturer,
        "model": server.model, "serial": server.serial, "uuid": server.uuid, "macs": server.macs, "arch": server.arch, "boot": server.boot,
        "root_disk": server.root_disk, "keep_partitions": server.keep_partitions, "network": server.network, "created_at": server.created_at,
        "lock": {"reason": server.lock_reason, "by": server.locked_by, "at": server.locked_at} if server.locked_at else None,
        "power": {"state": power[0], "at": power[1]} if power else None, "instance": instance_json(instance, images),
    }  # fmt: skip
    if scope.credential.role.includes(Role.OPERATOR):
        shown["bmc"] = {
            "url": server.bmc_url, "username": server.bmc_username, "tls_verify": server.bmc_tls_verify,
            "certificate_sha256": server.bmc_certificate_sha256, "system_uri": server.bmc_system_uri,
        }  # fmt: skip
    return shown


def _image_names(scope: Scope) -> dict[str, str]:
    return {i.id: i.name for i in scope.store.images.list_images(scope.project_id)}


def get_server(scope: Scope, reference: str) -> Server:
    """By name or id, in this project only."""
    return must_exist(scope.store.servers.find_server(scope.project_id, reference), "server", reference)


@router.get("")
def list_servers(scope: Viewer, after: After = None, limit: Limit = None) -> Json:
    """In the order of their names."""
    found, following = cut_page(scope.store.servers.list_named(scope.project_id, after=after, limit=one_more(limit)), limit, lambda s: s.name)
    only = [s.id for s in found] if limit is not None else None
    instances = {i.server_id: i for i in scope.store.servers.list_instances(scope.project_id, server_ids=only)[0]}
    names = _image_names(scope)
    # A server removed between the two reads has no instance any more; it is not shown.
    return render_list([_server_json(scope, s, instances[s.id], names) for s in found if s.id in instances], following)


@router.get("/{reference}")
def show_server(scope: Viewer, reference: str) -> Json:
    server = get_server(scope, reference)
    instance = scope.store.servers.list_instances(scope.project_id, server_ids=[server.id])[0][0]
    return _server_json(scope, server, instance, _image_names(scope))


@router.post("", status_code=201)
def add_server(scope: Admin, new: NewServer) -> Json:
    """The BMC was asked, its certificate is pinned, server and instance exist; or nothing was stored. Nothing was powered or written."""
    if scope.store.servers.find_server(scope.project_id, new.name):
        raise RequestError("conflict", f"A server {new.name!r} exists already.", field="name")
    image = get_image(scope, new.image) if new.image is not None else None
    if image is not None and (new.blank or image.os_type != new.os_type):
        raise RequestError("bad-request", "image: does not go with blank, nor with another os_type than its own.", field="image")
    asked = Server(
        id=new_id(), name=new.name, project_id=scope.project_id, bmc_url=new.bmc_url, bmc_username=new.bmc_username,
        bmc_tls_verify=new.tls_verify or "true", bmc_certificate_sha256=new.certificate_sha256, bmc_system_uri=new.system_uri,
        manufacturer="", model="", serial="", uuid="", macs=(), arch=new.arch or "", boot=new.boot or "uefi", rack=new.rack or "",
        unit=new.unit or "", root_disk=parse_hints(new.root_disk or ""), network=new.network.as_json() if new.network else None,
        created_at=scope.store.now(), keep_partitions=tuple(parse_names(new.keep_partitions or "")),
    )  # fmt: skip
    facts = scope.desk.probe(BmcAddress.of(asked, new.bmc_password))
    server = replace(asked, **_seen(asked, facts), arch=new.arch or facts.arch or "amd64")
    instance = scope.store.servers.add_server(
        server, bmc_password=new.bmc_password, blank=new.blank, os_type=new.os_type, image_id=image.id if image else None, actor=scope.actor
    )
    scope.store.servers.record_power(server.id, facts.power.value)
    return _server_json(scope, server, instance, _image_names(scope))


def _seen(server: Server, facts: BmcFacts) -> Json:
    macs = tuple(m.lower() for m in facts.macs) or ((server.network["mac"],) if server.network else ())
    return {
        "manufacturer": facts.manufacturer, "model": facts.model, "serial": facts.serial, "uuid": facts.uuid, "macs": macs,
        "bmc_system_uri": facts.system_uri, "bmc_certificate_sha256": facts.certificate_sha256 or server.bmc_certificate_sha256,
    }  # fmt: skip


@router.patch("/{reference}")
def set_server(scope: Admin, reference: str, change: ChangedServer) -> Json:
    """Only the fields given change. Where one says how to reach the BMC, it is asked first, and must be the same server's."""
    server = get_server(scope, reference)
    given = change.model_dump(exclude_unset=True, exclude={"repin", "bmc_password"})
    renamed = {"tls_verify": "bmc_tls_verify", "certificate_sha256": "bmc_certificate_sha256", "system_uri": "bmc_system_uri"}
    changes: dict[str, Any] = {renamed.get(name, name): value for name, value in given.items() if value is not None}
    if change.root_disk is not None:
        changes["root_disk"] = parse_hints(change.root_disk)
    if change.keep_partitions is not None:
        changes["keep_partitions"] = parse_names(change.keep_partitions)
    if "network" in given:
        changes["network"] = change.network.as_json() if change.network else None
    if change.repin or change.bmc_password is not None or any(name.startswith("bmc_") for name in changes):
        changes |= _verify_same_server(scope, server, change, changes)
    if changes or change.bmc_password is not None:
        scope.store.servers.set_server(server.id, bmc_password=change.bmc_password, actor=scope.actor, **changes)
    return show_server(scope, server.id)


def _verify_same_server(scope: Scope, server: Server, change: ChangedServer, changes: dict[str, Any]) -> Json:
    after = replace(server, **{n: v for n, v in changes.items() if n.startswith("bmc_")})
    if after.bmc_url != server.bmc_url:
        if change.bmc_password is None:
            raise RequestError("bad-request", "bmc_password: is needed with another bmc_url; the stored one is not sent elsewhere.", field="bmc_password")
        after = replace(after, bmc_certificate_sha256=change.certificate_sha256)
    if change.repin:
        # The admin has compared fingerprints: whatever it shows now is trusted, and pinned.
        after = replace(after, bmc_certificate_sha256=change.certificate_sha256, bmc_tls_verify="false")
    facts = scope.desk.probe(BmcAddress.of(after, change.bmc_password or find_password(scope.store, server, scope.desk.probe)))
    for mine, theirs in ((server.uuid, facts.uuid), (server.serial, facts.serial)):
        if are_of_two(mine, theirs):
            raise RequestError("wrong-server", f"{server.name}: serial or UUID differ from those recorded; nothing was changed.", kind="server")
    return {"bmc_certificate_sha256": facts.certificate_sha256 or after.bmc_certificate_sha256, "bmc_system_uri": facts.system_uri}


@router.post("/{reference}/probe")
def probe_server(scope: Operator, reference: str) -> Json:
    """What its BMC shows now, and whether that is the server we know. Nothing is powered or changed; the power state seen of that server is kept."""
    server = get_server(scope, reference)
    facts = scope.desk.probe(BmcAddress.of(server, find_password(scope.store, server, scope.desk.probe)))
    same = not any(are_of_two(mine, theirs) for mine, theirs in ((server.uuid, facts.uuid), (server.serial, facts.serial)))
    if same:
        scope.store.servers.record_power(server.id, facts.power.value)
    return {
        "server": server.name, "same": same, "power": facts.power.value, "manufacturer": facts.manufacturer, "model": facts.model,
        "serial": facts.serial, "uuid": facts.uuid, "macs": facts.macs, "carrier": facts.carrier, "media": facts.virtual_media,
        "certificate_sha256": facts.certificate_sha256,
        "pinned": server.bmc_certificate_sha256 is not None or server.bmc_tls_verify != "false", "unreachable": scope.desk.find_unreachable(server.bmc_url),
    }  # fmt: skip


class PowerOrder(Body):
    order: Literal["on", "off", "restart"]
    force: bool = False  # cut the power at once, the OS is not asked to shut down


@router.post("/{reference}/power")
def switch_power(scope: Operator, reference: str, asked: PowerOrder) -> Json:
    """The power is as ordered, read back. The OS is asked to shut down first, but for `force`. Never while a run of it is live; off and restart
    neither where it is locked nor where Repave runs on it."""
    server = get_server(scope, reference)
    power = scope.desk.power.carry_out(server, asked.order, force=asked.force, actor=scope.actor)
    return {"server": server.name, "power": power.value}


class Rotation(Body):
    password: str = Field(min_length=1, max_length=200)


@router.post("/{reference}/rotate")
def rotate_server(scope: Admin, reference: str, asked: Rotation) -> Json:
    """The account that we use at its BMC has this password, seen by a login; or the old one is in force. What opens the BMC is stored at each moment."""
    server = get_server(scope, reference)
    facts = scope.desk.probe(BmcAddress.of(server, find_password(scope.store, server, scope.desk.probe)))
    if any(are_of_two(mine, theirs) for mine, theirs in ((server.uuid, facts.uuid), (server.serial, facts.serial))):
        raise RequestError("wrong-server", f"{server.name}: serial or UUID differ from those recorded; nothing was changed.", kind="server")
    rotate_password(scope.store, server, asked.password, log_in=scope.desk.probe, change=scope.desk.set_bmc_password, actor=scope.actor)
    return show_server(scope, server.id)


# ---- protection ----


@router.post("/{reference}/lock")
def lock_server(scope: Operator, reference: str, lock: Lock) -> Json:
    """No reinstall of it is admitted; one that was admitted already goes on."""
    server = get_server(scope, reference)
    scope.store.servers.lock(server.id, reason=lock.reason, actor=scope.actor)
    return show_server(scope, server.id)


@router.post("/{reference}/unlock")
def unlock_server(scope: Operator, reference: str) -> Json:
    server = get_server(scope, reference)
    scope.store.servers.unlock(server.id, actor=scope.actor)
    return show_server(scope, server.id)


@router.post("/{reference}/replace")
def replace_server(scope: Admin, reference: str, asked: Replacement) -> Json:
    """`before` and `after`: what the server was known by and what its BMC shows now; `replaced` says whether it is known by that from now on."""
    server = get_server(scope, reference)
    asking = replace(server, bmc_certificate_sha256=None, bmc_tls_verify="false") if asked.repin else server
    facts = scope.desk.probe(BmcAddress.of(asking, asked.bmc_password or find_password(scope.store, server, scope.desk.probe)))
    seen = _seen(asking, facts)
    shown = ("serial", "uuid", "macs", "manufacturer", "model")
    before, after = {n: getattr(server, n) for n in shown}, {n: seen[n] for n in shown}
    confirmed = (asked.serial, asked.uuid) == (seen["serial"], seen["uuid"])
    if (asked.serial, asked.uuid) != (None, None) and not confirmed:
        raise RequestError("conflict", "The BMC shows another serial number or UUID than the one confirmed; nothing was changed.", field="serial")
    if confirmed:
        scope.store.servers.replace_server(server, seen, bmc_password=asked.bmc_password, actor=scope.actor)
    return {"server": server.name, "before": before, "after": after, "replaced": confirmed}


@router.delete("/{reference}", status_code=204)
def remove_server(scope: Admin, reference: str) -> None:
    scope.store.servers.remove_server(get_server(scope, reference).id, actor=scope.actor)
