"""Which partitions of the root disk stay where they are: the pure rule.

A server's setting names them, by partition name or GUID. They are found in the table that the ramdisk sees, or, where a write that did not end
well has left no table, in the plan of that write: the table is gone then, what it pointed to is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from repave.errors import RunFailed

OURS = ("config-2",)  # the config drive's, made anew by each write
_ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"  # UEFI 2.10, table 5-7
Partition = Mapping[str, Any]  # agent.gpt.Partition as JSON values


def parse_names(text: str) -> list[str]:
    """ "data,scratch" as names. Raises ValueError naming the one that can not be."""
    names = list(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))
    for name in names:
        if name in OURS or len(name) > 36:  # UEFI 2.10, table 5-6: 36 UTF-16 units; a GUID has as many characters
            raise ValueError(f"{name!r} is no partition that can be kept")
    return names


def choose_kept(disk: Mapping[str, Any], names: Sequence[str], *, unfinished: Mapping[str, Any] | None) -> list[Partition]:
    """The partitions that the names name, each once. `unfinished`: the plan of the server's last write where it did not end well.

    Raises RunFailed kept-partition.
    """
    seen: Sequence[Partition] = disk.get("partitions", ())
    if names and not seen and unfinished is not None and _is_of(unfinished, disk):
        seen = unfinished.get("keep", ())
    found = [_find(name, seen, str(disk["path"])) for name in names]
    return list({p["number"]: p for p in found}.values())


def _is_of(plan: Mapping[str, Any], disk: Mapping[str, Any]) -> bool:
    planned = (plan["disk_serial"], plan["disk_wwn"], plan["disk_size_bytes"])
    return planned == (disk["serial"], disk["wwn"], disk["size_bytes"])


def _find(name: str, seen: Sequence[Partition], path: str) -> Partition:
    found = [p for p in seen if name == p["name"] or name.lower() == p["guid"]]
    if len(found) != 1:
        there = ", ".join(p["name"] or f"number {p['number']} without a name" for p in seen) or "no partition table"
        raise RunFailed("kept-partition", f"{len(found)} partitions of {path} are named {name}; it has {there}.")
    if found[0]["type_guid"] == _ESP:
        raise RunFailed("kept-partition", f"{name} is an EFI system partition: firmware could boot the old OS from it.")
    if found[0]["name"] in OURS:
        raise RunFailed("kept-partition", f"{name} is the config drive's, which each write makes anew.")
    return found[0]
