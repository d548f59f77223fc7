"""Servers: one, a nodeset paired with a nodeset of BMC addresses, a CSV file, or NetBox's devices. A password never stands in a file or on the command line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from repave.cli.client import Client
from repave.cli.lists import TABLE, Form, show_list
from repave.cli.options import AsJson, PasswordStdin, Project, Yes
from repave.cli.output import (
    Exit,
    Json,
    Refused,
    Usage,
    check_known,
    confirm,
    count,
    exit_code,
    fold,
    read_secret,
    say,
    show_error,
    show_fields,
    show_json,
    unfold,
    warn,
)
from repave.cli.server_csv import read_servers
from repave.cli.server_netbox import read_devices
from repave.errors import RepaveError

app = App(name="server")
_FEW = 10  # pairs that are all shown
_AT_ONCE = 8  # probes; BMCs are slow, and we wait, not compute
_LIST = {
    "NAME": "name", "STATE": "instance.state", "IMAGE": "instance.image", "MODEL": "model", "SERIAL": "serial", "RACK": "rack", "UNIT": "unit",
    "ERROR": "instance.error.code", "LOCKED": "lock.reason",
}  # fmt: skip
_PROBE = {
    "SERVER": "server", "SAME": "same", "POWER": "power", "MODEL": "model", "SERIAL": "serial", "CARRIER": "carrier", "ROOT DISK": "root_disk",
    "ERROR": "error.code", "IN THE WAY": "in_the_way",
}  # fmt: skip


@Parameter(name="*")
@dataclass(frozen=True)
class Settings:
    """What may be said of a server."""

    bmc: str | None = None
    "Its BMC: https://ADDRESS. With a nodeset of servers, a nodeset too: 'https://10.9.0.[11-60]'."
    user: str | None = None
    "User name at the BMC. The password: REPAVE_BMC_PASSWORD, --password-stdin, or asked for."
    tls_verify: str | None = None
    "true, false (the certificate seen first is pinned), or a path to a CA bundle on the service's machine."
    fingerprint: str | None = None
    "SHA-256 of the BMC's certificate, in hex: nothing else is trusted."
    system: str | None = None
    "The ComputerSystem's URI, where the BMC names several."
    rack: str | None = None
    "Rack, as on its label."
    unit: str | None = None
    "Rack unit."
    root_disk: str | None = None
    "Which disk may be erased: serial=S, or wwn, model, size (GiB), hctl, by_path, rotational."
    keep_partitions: str | None = None
    "Partitions of the root disk that outlive a reinstall, by name or GUID, separated by commas; '' keeps none."
    mac: str | None = None
    "NIC with static settings; without it DHCP."
    address: str | None = None
    "Its IP address."
    prefix: int | None = None
    "Its prefix length."
    gateway: str | None = None
    "Its gateway."
    dns: str | None = None
    "DNS servers, separated by blanks or commas."
    vlan: int | None = None
    "Its tagged VLAN."
    arch: str | None = None
    "amd64 or arm64, where the BMC does not say."

    def body(self) -> Json:
        """The fields given, as the API calls them."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        network: Json = {name: given.pop(name) for name in ("mac", "address", "prefix", "gateway", "vlan") if name in given}
        if "dns" in given:
            network["dns"] = given.pop("dns").replace(",", " ").split()
        if network and {"mac", "address", "prefix"} - network.keys():
            raise Usage("--mac, --address and --prefix belong together.")
        renamed = {"bmc": "bmc_url", "user": "bmc_username", "fingerprint": "certificate_sha256", "system": "system_uri"}
        return {renamed.get(name, name): value for name, value in given.items()} | ({"network": network} if network else {})


_NOTHING_SAID = Settings()


@app.command
def add(
    nodeset: str | None = None,
    /,
    *,
    settings: Settings = _NOTHING_SAID,
    csv: Path | None = None,
    netbox: str | None = None,
    netbox_filter: list[str] | None = None,
    blank: bool = False,
    windows: bool = False,
    image: str | None = None,
    password_stdin: PasswordStdin = False,
    show_pairs: bool = False,
    project: Project = None,
    yes: Yes = False,
    json: AsJson = False,
) -> int:
    """Add servers. Each BMC is asked what it is and its certificate is pinned; nothing is powered or written.

    Parameters
    ----------
    nodeset
        Name, or names: web01, 'web[01-50]'.
    csv
        A file with the columns name, bmc, user, secret_env and, where wanted, rack, unit, mac, address, prefix, gateway, dns, vlan,
        root_disk, keep_partitions, blank, tls_verify, fingerprint, system, arch, os_type, image. secret_env names the environment variable
        that holds the BMC's password. A file with a mistake is refused whole; servers that are there already are left out.
    netbox
        URL of a NetBox whose active devices are the servers: name, rack, position, and oob_ip as the BMC's address. Its token: REPAVE_NETBOX_TOKEN.
        The login at the BMCs is one for all: --user and the password. As with a file, one mistake refuses all, and what is there already is left out.
    netbox_filter
        key=value for NetBox's list of devices, such as role=server or site=ams; may be given several times. status=... instead of the active ones.
    blank
        There is no OS yet: the first install is a reinstall.
    windows
        A Windows server.
    image
        The image that the OS it has was made from, name or id, where that is known: then a reinstall may leave the image out.
    show_pairs
        Show each server with its BMC's address before it is asked, however many they are.
    """
    if [nodeset, csv, netbox].count(None) != 2:
        raise Usage("Name the servers, or give --csv FILE, or --netbox URL.")
    if netbox_filter and netbox is None:
        raise Usage("--netbox-filter goes with --netbox URL.")
    if csv is not None and (settings != _NOTHING_SAID or password_stdin):
        raise Usage("With --csv the file says what each server is; other options than --blank, --windows and --image do not go with it.")
    common = {"blank": blank, "os_type": "Windows" if windows else "Linux", "image": image}
    if csv is not None:
        found, order = read_servers(csv), "as the file says"
    elif netbox is not None:
        found, order = _from_netbox(netbox, netbox_filter or [], settings, password_stdin), "as NetBox says"
    else:
        found, order = _paired(nodeset or "", settings, password_stdin), "paired in order"
    bodies: list[Json] = [common | body for body in found]
    client = Client(project)
    if nodeset is None:
        bodies = _leave_out_known(bodies, client)
        if not bodies:
            return Exit.OK
    if len(bodies) > 1:
        _show_pairs([(body["name"], body["bmc_url"]) for body in bodies], order, whole=show_pairs)
        confirm(f"Add {len(bodies)}? [y/N] ", "y", yes=yes)
        say(f"Asking {len(bodies)} BMCs, {_AT_ONCE} at a time.")
    by_name = {body["name"]: body for body in bodies}
    done = on_each(list(by_name), lambda name: client.post("/servers", by_name[name]))
    return _tell_added(done, as_json=json, may_repeat=nodeset is None)


def _show_pairs(pairs: Sequence[tuple[str, str]], order: str, *, whole: bool) -> None:
    """Who is behind which address: what is about to be confirmed. Many are told by the first and the last."""
    if whole or len(pairs) <= _FEW:
        warn("\n".join(f"  {name} → {url}" for name, url in pairs))
        warn(f"{len(pairs)} servers, {order}.")
    else:
        (first, first_url), (last, last_url) = pairs[0], pairs[-1]
        warn(f"{first} → {first_url} … {last} → {last_url}, {len(pairs)} {order} (--show-pairs).")


def _leave_out_known(bodies: list[Json], client: Client) -> list[Json]:
    """Those that are not there yet: the same may be sent again, when what was wrong is mended. Raises Usage on a name that another has."""
    known = {s["name"]: s.get("bmc", {}).get("url") for s in client.items("/servers")}
    for body in bodies:
        if body["name"] in known and known[body["name"]] != body["bmc_url"].rstrip("/"):
            raise Usage(f"A server {body['name']!r} with another BMC is there already.")
    left_out = [body["name"] for body in bodies if body["name"] in known]
    if left_out:
        say(f"{fold(left_out)}: there already, left as {'it is' if len(left_out) == 1 else 'they are'}.")
    return [body for body in bodies if body["name"] not in known]


def _tell_added(done: dict[str, Json | RepaveError], *, as_json: bool, may_repeat: bool) -> int:
    good = [a for a in done.values() if isinstance(a, dict)]
    bad = {name: a for name, a in done.items() if isinstance(a, RepaveError)}
    tell_errors(bad)
    if any(error.slug == "tls" for error in bad.values()):
        warn("  or         --fingerprint SHA256 where you know it; --tls-verify false pins what the BMC shows now")
    if as_json:
        show_json({"items": good, "next": None})
    elif good:
        show_list(good, _LIST, TABLE)
    following = "the same command again adds the rest" if bad and may_repeat else "repave image ls" if good else ""
    told = f"{len(good)} added{f', {len(bad)} not: {fold(bad)}' if bad else ''}"
    say(f"{told}. Nothing was powered or written." + (f"  Next: {following}" if following else ""))
    codes = {exit_code(error) for error in bad.values()}
    if bad and not good:
        code = codes.pop() if len(codes) == 1 else Exit.REFUSED
        return code if code is not Exit.REFUSED or len(bad) == 1 else Exit.ALL_FAILED
    return Exit.FAILED if bad else Exit.OK


def _paired(nodeset: str, settings: Settings, password_stdin: bool) -> list[Json]:
    if not settings.bmc or not settings.user:
        raise Usage("--bmc and --user are needed.")
    names, body = unfold(nodeset), settings.body()
    urls = [settings.bmc] if len(names) == 1 else _unfold_url(settings.bmc)
    if len(names) != len(urls):
        raise Usage(f"{count(len(names), 'server')} and {len(urls)} BMC address{'' if len(urls) == 1 else 'es'} do not pair.")
    if len(names) > 1 and "network" in body:
        raise Usage("--mac and --address are one server's; use --csv for many.")
    password = read_secret("BMC password", from_stdin=password_stdin, variable="REPAVE_BMC_PASSWORD")
    return [body | {"name": name, "bmc_url": url, "bmc_password": password} for name, url in zip(names, urls, strict=True)]


def _from_netbox(url: str, filters: Sequence[str], settings: Settings, password_stdin: bool) -> list[Json]:
    """What is said of all of them goes with what NetBox says of each."""
    if not settings.user:
        raise Usage("--user is needed: NetBox does not know the login at the BMCs.")
    common = settings.body()
    if own := common.keys() - {"bmc_username", "tls_verify", "root_disk", "keep_partitions", "arch"}:
        raise Usage(f"{', '.join(sorted(own))}: what is one server's does not go with --netbox.")
    password = read_secret("BMC password", from_stdin=password_stdin, variable="REPAVE_BMC_PASSWORD")
    return read_devices(url, filters, common | {"bmc_password": password})


def _unfold_url(url: str) -> list[str]:
    """A URL with one bracketed range. NodeSet sees only the range: a path or a port would confuse it."""
    before, found, rest = url.partition("[")
    inside, _, after = rest.partition("]")
    return [f"{before}{name[1:]}{after}" for name in unfold(f"n[{inside}]")] if found else [url]


@app.command(name="ls")
def list_servers(*, project: Project = None, form: Form = TABLE) -> None:
    """List servers and what runs on them."""
    show_list(Client(project).items("/servers"), _LIST, form)


@app.command(name="show")
def show_server(name: str, /, *, project: Project = None, json: AsJson = False) -> None:
    """Everything known of one server."""
    found = Client(project).get(f"/servers/{name}")
    if json:
        show_json(found)
    else:
        show_fields(found)


@app.command(name="set")
def set_servers(
    nodeset: str,
    /,
    *,
    settings: Settings = _NOTHING_SAID,
    password_stdin: PasswordStdin = False,
    repin: Annotated[bool, Parameter(help="Trust and pin the certificate that the BMC shows now. Compare fingerprints first.")] = False,
    dhcp: Annotated[bool, Parameter(help="Forget the static network settings.")] = False,
    project: Project = None,
) -> int:
    """Change what is said of servers. Where it is about the BMC, the BMC is asked first and must be the same server's."""
    body = settings.body() | ({"repin": True} if repin else {}) | ({"network": None} if dhcp else {})
    if password_stdin:
        body["bmc_password"] = read_secret("BMC password", from_stdin=True)
    if not body:
        raise Usage("Nothing to change was given.")
    client, servers = find_named(nodeset, project)
    if len(servers) > 1 and (alone := {"bmc_url", "system_uri", "unit", "network", "certificate_sha256"} & body.keys() - ({"network"} if dhcp else set())):
        raise Usage(f"{', '.join(sorted(alone))}: what is one server's can not be said of {len(servers)}.")
    return _tell_done(on_each(servers, lambda name: client.patch(f"/servers/{name}", body)), "changed")


@app.command(name="probe")
def probe_servers(nodeset: str, /, *, project: Project = None, form: Form = TABLE) -> int:
    """Ask each server's BMC what it is: whether it is the server we know, what a reinstall would use, and what is in its way. Nothing is powered or changed.

    Carrier: how the boot media would come, in a virtual CD (media) or by UEFI HTTP boot (http). The root disk is what was set; where nothing was, the agent
    chooses it inside, if only one can be meant, and --rehearse tells which.
    """
    from repave.cli.doctor import judge_bmc

    client, servers = find_named(nodeset, project)
    done = on_each(servers, lambda name: client.post(f"/servers/{name}/probe", {}))
    found: list[Json] = []
    for name, answer in done.items():
        said = {"same": None, "error": answer.as_json()} if isinstance(answer, RepaveError) else answer | {"error": None}
        found.append({"server": name, "root_disk": servers[name]["root_disk"], "in_the_way": judge_bmc(answer).text} | said)
    show_list(found, _PROBE, form)
    bad = [f["server"] for f in found if f["error"] or not f["same"]]
    say(f"{count(len(found) - len(bad), 'BMC')} as we know {'it' if len(found) - len(bad) == 1 else 'them'}{f', not: {fold(bad)}' if bad else ''}.")
    return code_of(len(bad), len(found))


def code_of(bad: int, total: int) -> int:
    """The exit code where so many of all failed."""
    return Exit.OK if not bad else Exit.ALL_FAILED if bad == total > 1 else Exit.FAILED


def find_named(nodeset: str, project: str | None) -> tuple[Client, dict[str, Json]]:
    """The servers by name, in the nodeset's order; all of them are known. Raises Usage or RepaveError; then nothing was sent."""
    client, names = Client(project), unfold(nodeset)
    known: dict[str, Json] = {s["name"]: s for s in client.items("/servers")}
    check_known(names, list(known))
    return client, {name: known[name] for name in names}


def on_each(names: Collection[str], do: Callable[[str], Json]) -> dict[str, Json | RepaveError]:
    """Several at a time, each asked whatever became of the others; in the order of the names."""

    def attempt(name: str) -> Json | RepaveError:
        try:
            return do(name)
        except RepaveError as error:
            return error

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(names, pool.map(attempt, names), strict=True))


def _tell_done(done: dict[str, Json | RepaveError], what: str) -> int:
    """Which of them it was done to, and why not to the others. The exit code."""
    bad = {name: answer for name, answer in done.items() if isinstance(answer, RepaveError)}
    tell_errors(bad)
    if good := [name for name in done if name not in bad]:
        say(f"{fold(good)} {what}.")
    return exit_code(next(iter(bad.values()))) if len(bad) == len(done) == 1 else code_of(len(bad), len(done))


def tell_errors(bad: dict[str, RepaveError]) -> None:
    for detail in dict.fromkeys(str(error) for error in bad.values()):
        same = [name for name, error in bad.items() if str(error) == detail]
        warn(f"✗ {fold(same)}")
        show_error(bad[same[0]])


@app.command
def lock(nodeset: str, /, *, reason: str, project: Project = None) -> int:
    """Refuse every reinstall of these servers until they are unlocked; the reason is shown to whoever tries."""
    client, servers = find_named(nodeset, project)
    done = on_each(servers, lambda name: client.post(f"/servers/{name}/lock", {"reason": reason}))
    return _tell_done(done, f"locked: {reason}  A run that has begun goes on")


@app.command
def unlock(nodeset: str, /, *, project: Project = None) -> int:
    """Let these servers be reinstalled again."""
    client, servers = find_named(nodeset, project)
    return _tell_done(on_each(servers, lambda name: client.post(f"/servers/{name}/unlock", {})), "unlocked")


@app.command
def replace(
    name: str, /, *, password_stdin: bool = False, repin: Annotated[bool, Parameter(help="Trust and pin the new board's certificate.")] = False,
    yes: bool = False, expect_serial: str | None = None, project: Project = None, json: AsJson = False,
) -> None:  # fmt: skip
    """After a board swap: the server is known by the serial number, UUID and MACs that its BMC shows now. Both are shown, and confirmed by typing.

    Parameters
    ----------
    password_stdin
        The new board's BMC password is the first line of stdin.
    yes
        Do not ask; wants --expect-serial.
    expect_serial
        The new serial number; another one is refused.
    """
    if yes and not expect_serial:
        raise Usage("--yes wants --expect-serial SERIAL, the new board's.")
    client = Client(project)
    body: Json = {"repin": repin}
    if password_stdin:
        body["bmc_password"] = read_secret("BMC password", from_stdin=True)
    found = client.post(f"/servers/{name}/replace", body)
    before, after = found["before"], found["after"]
    for field in before:
        changed = "" if before[field] == after[field] else "   ← changes"
        say(f"  {field:14} {_plain(before[field])} → {_plain(after[field])}{changed}")
    if before == after:
        say(f"{name} is the server we know; nothing to change.")
        return
    if expect_serial is not None and expect_serial != after["serial"]:
        raise Refused(f"The BMC shows serial number {after['serial']}, not {expect_serial}; nothing was changed.")
    confirm(f"Type  {after['serial'] or name}  to take it as {name}: ", after["serial"] or name, yes=yes)
    done = client.post(f"/servers/{name}/replace", body | {"serial": after["serial"], "uuid": after["uuid"]})
    if json:
        show_json(done)
    say(f"{name} is known by the new board from now on; its disks and its OS are taken as the same.")


def _plain(value: object) -> str:
    return ", ".join(str(v) for v in value) if isinstance(value, list) else str(value or "-")


@app.command
def rotate(nodeset: str, /, *, password_stdin: bool = False, yes: bool = False, project: Project = None) -> int:
    """Give the account that Repave uses at these servers' BMCs a new password, and store it. The first server goes alone: where it fails, no other is asked.

    At each moment what opens a BMC is stored: a rotation that was cut off is finished by the next login, or by the same command again.

    Parameters
    ----------
    password_stdin
        The new password is the first line of standard input.
    yes
        Do not ask.
    """
    client, servers = find_named(nodeset, project)
    names = list(servers)
    password = read_secret("New BMC password", from_stdin=password_stdin, variable="REPAVE_NEW_BMC_PASSWORD", twice=True)
    confirm(f"Change the BMC password of {fold(names)} ({count(len(names), 'server')})? [y/N] ", "y", yes=yes)

    def change(name: str) -> Json:
        return client.post(f"/servers/{name}/rotate", {"password": password})

    done = on_each(names[:1], change)
    if not isinstance(done[names[0]], RepaveError):
        done |= on_each(names[1:], change)
    code = _tell_done(done, "changed: the BMCs have the new password, and so have we")
    if left := names[len(done) :]:
        warn(f"{fold(left)} not asked: {names[0]} failed.")
    return code


@app.command(name="rm")
def remove_servers(nodeset: str, /, *, yes: Yes = False, project: Project = None) -> int:
    """Forget servers, their instances and their runs. The servers themselves are not touched."""
    client, servers = find_named(nodeset, project)
    confirm(f"Forget {fold(servers)} ({count(len(servers), 'server')})? [y/N] ", "y", yes=yes)

    def forget(name: str) -> Json:
        client.delete(f"/servers/{name}")
        return {}

    return _tell_done(on_each(servers, forget), "forgotten")


app.command("repave.cli.server_power:power", name="power")
app.command("repave.cli.console:console", name="console")
