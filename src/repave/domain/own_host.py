"""Which serial numbers and UUIDs tell machines apart, and whether a server is one that Repave itself runs on.

Reinstalling that one would erase who does it.
"""

from __future__ import annotations

from collections.abc import Sequence

from repave.domain.model import Host, Server

# What boards say whose maker wrote nothing: two of them are not the same machine (SMBIOS defaults, as dmidecode shows them in the field).
_NOTHING = frozenset((
    "", "none", "0", "default string", "not specified", "not applicable", "system serial number", "to be filled by o.e.m.", "123456789", "0123456789",
    "00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff", "03000200-0400-0500-0006-000700080009",
))  # fmt: skip


def says_something(value: str) -> bool:
    """A serial number or UUID that tells this machine from others."""
    return value.strip().lower() not in _NOTHING and value.strip(" 0") != ""


def are_of_two(known: str, seen: str) -> bool:
    """Two serial numbers or UUIDs, in any case of letters, that say of two machines that they are not the same one."""
    return says_something(known) and says_something(seen) and known.strip().lower() != seen.strip().lower()


def find_own_host(server: Server, hosts: Sequence[Host]) -> str | None:
    """What the server has in common with a machine of ours, in words; None where nothing."""
    for host in hosts:
        for name, mine, theirs in (("UUID", host.uuid, server.uuid), ("serial number", host.serial, server.serial)):
            if says_something(mine) and mine.strip().lower() == theirs.strip().lower():
                return f"the {name} of {host.name}, which Repave runs on"
        if shared := {m.lower() for m in host.macs} & {m.lower() for m in server.macs}:
            return f"the MAC address {min(shared)} of {host.name}, which Repave runs on"
    return None
