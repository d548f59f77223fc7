"""Servers from NetBox: its active devices, with name, rack, rack unit, and the out-of-band address as that of the BMC.

NetBox is read only. Its token comes from REPAVE_NETBOX_TOKEN and goes to the address that was named and nowhere else: of a page's `next` only the
query is followed, as a NetBox behind a proxy names itself by another address there. BMC logins are not in NetBox: one for all is given.

Source: NetBox's docs/integrations/rest-api.md (pagination, excluding config contexts, authentication), docs/models/dcim/device.md, as of 4.5.
"""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from ipaddress import ip_interface
from typing import Any
from urllib.parse import urlencode, urlsplit

from repave.cli.output import Json, Usage
from repave.cli.server_rows import Row, read_bodies

TOKEN = "REPAVE_NETBOX_TOKEN"  # noqa: S105 - the variable's name
_CALLED = {"bmc": "oob_ip", "unit": "position"}  # our column -> NetBox's field
_PAGE = 200
_MOST_PAGES = 1000
_ANSWER_S = 60.0
_SAID = 300  # characters of a refusal


def read_devices(url: str, filters: Sequence[str], common: Json) -> list[Json]:
    """The bodies of POST /servers, each with `common`. Raises Usage with all that is wrong, by device and field."""
    rows = [_row(device) for device in _list_devices(_Netbox(url), filters)]
    if not rows:
        raise Usage(f"{url} has no such devices.")
    try:
        return read_bodies(rows, needed=("name", "bmc"), common=common, called=_CALLED)
    except Usage as wrong:
        raise Usage(f"{wrong}\nDevices that are no servers are left out by a filter, such as --netbox-filter role=server.") from None


class _Netbox:
    """Where it is, and as whom it is asked. Raises Usage."""

    def __init__(self, url: str) -> None:
        at = urlsplit(url)
        if at.scheme not in ("http", "https") or not at.hostname:
            raise Usage(f"{url!r} is no address of a NetBox; write it as https://HOST.")
        if at.username or at.password:
            raise Usage(f"A login does not belong on the command line; the token is taken from {TOKEN}.")
        if not (token := os.environ.get(TOKEN, "").strip()):
            raise Usage(f"{TOKEN} is not set: a token of NetBox that may read devices.")
        if not token.isascii() or not token.isprintable():
            raise Usage(f"{TOKEN} is no token.")
        self._url, self._at = url, at
        # Tokens of version 2 (NetBox 4.5) are bearer tokens and begin with nbt_.
        self._headers = {"Authorization": f"{'Bearer' if token.startswith('nbt_') else 'Token'} {token}", "Accept": "application/json"}

    def get_devices(self, query: str) -> Json:
        """One page. Redirects are not followed."""
        try:
            connection = self._connect()
        except ValueError as error:
            raise Usage(f"{self._url!r} is no address of a NetBox: {error}.") from None
        try:
            connection.request("GET", f"{self._at.path.rstrip('/').removesuffix('/api')}/api/dcim/devices/?{query}", headers=self._headers)
            answer = connection.getresponse()
            status, text = answer.status, answer.read()
        except (OSError, HTTPException, ValueError) as error:
            raise Usage(f"NetBox at {self._url} does not answer: {error or type(error).__name__}.") from None
        finally:
            connection.close()
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if status != 200:
            said = f": {json.dumps(value)[:_SAID]}" if isinstance(value, dict) else ""
            raise Usage(f"NetBox at {self._url} answered {status}{said}.")
        if not isinstance(value, dict) or not isinstance(value.get("results"), list):
            raise Usage(f"{self._url} gave an answer that is not NetBox's.")
        return value

    def _connect(self) -> HTTPConnection:
        host, port = self._at.hostname or "", self._at.port
        if self._at.scheme == "http":
            return HTTPConnection(host, port, timeout=_ANSWER_S)
        return HTTPSConnection(host, port, timeout=_ANSWER_S, context=ssl.create_default_context())


def _list_devices(netbox: _Netbox, filters: Sequence[str]) -> Iterator[Json]:
    asked = [(key, value) for key, _, value in (text.partition("=") for text in filters)]
    if wrong := [text for text, pair in zip(filters, asked, strict=True) if not all(pair)]:
        raise Usage(f"--netbox-filter {wrong[0]!r}: write it as key=value.")
    if "status" not in dict(asked):
        asked.append(("status", "active"))
    query, seen = urlencode([*asked, ("exclude", "config_context"), ("limit", str(_PAGE))]), set[str]()
    while query not in seen and len(seen) < _MOST_PAGES:
        seen.add(query)
        page = netbox.get_devices(query)
        yield from page["results"]
        if not page.get("next"):
            return
        query = urlsplit(str(page["next"])).query
    raise Usage("NetBox's pages do not end.")


def _row(device: Any) -> Row:
    """What NetBox does not say is left out."""
    try:
        name, rack, position = str(device["name"] or ""), str((device.get("rack") or {}).get("name") or ""), device.get("position")
        place = f"NetBox device {device['id']} ({name!r})" if name else f"NetBox device {device['id']}"
        address = (device.get("oob_ip") or {}).get("address")
        unit = "" if position is None else f"{float(position):g}"  # 37.0; a device may stand at half a unit
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Usage("NetBox gave a device that is not as it describes them.") from None
    try:
        ip = ip_interface(address).ip if address else None
    except ValueError:
        return Row(place, {}, ("bmc", "is no IP address"))
    given = {"name": name, "rack": rack, "unit": unit, "bmc": "" if ip is None else f"https://[{ip}]" if ip.version == 6 else f"https://{ip}"}
    return Row(place, {column: value for column, value in given.items() if value})
