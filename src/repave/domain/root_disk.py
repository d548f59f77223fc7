"""Which disk is the root disk: the pure rule (design.md, "How servers and instances come to be").

In this order: the recorded serial or WWN; the owner's hints; the disk that today's UEFI boot entry points to; the only candidate;
else refuse and name the candidates. Removable, virtual and read-only disks are never candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from repave.errors import RunFailed

HINTS = ("serial", "wwn", "model", "size", "hctl", "by_path", "rotational")
Disk = Mapping[str, Any]  # agent.protocol.Disk as JSON values


def parse_hints(text: str) -> dict[str, Any]:
    """ "serial=ABC,rotational=false" as hints. Raises ValueError naming the hint. `size` is in GiB, as in Ironic."""
    hints: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, found, value = part.partition("=")
        if not found or name not in HINTS:
            raise ValueError(f"{name!r} is no root disk hint; known: {', '.join(HINTS)}")
        if name == "rotational":
            if value not in ("true", "false"):
                raise ValueError("rotational must be true or false")
            hints[name] = value == "true"
        else:
            hints[name] = int(value) if name == "size" else value
    return hints


def is_candidate(disk: Disk) -> bool:
    return not (disk["removable"] or disk["virtual"] or disk["read_only"]) and disk["size_bytes"] > 0


def choose_root_disk(disks: Sequence[Disk], hints: Mapping[str, Any]) -> Disk:
    """The one disk. Raises RunFailed no-root-disk or ambiguous-root-disk, naming what was seen."""
    candidates = [d for d in disks if is_candidate(d)]
    if not candidates:
        raise RunFailed("no-root-disk", f"Seen: {_names(disks) or 'no disk at all'}.")
    for disk in candidates:
        same = [d for d in candidates if d["serial"] and d["serial"] == disk["serial"]]
        if len(same) > 1:  # also where their WWNs differ: the new OS proves its disk by the serial
            raise RunFailed("ambiguous-root-disk", f"Two disks have the same serial: {_names(same)}.")
    if hints:
        matching = [d for d in candidates if all(_fits(d, name, value) for name, value in hints.items())]
        if len(matching) == 1:
            return _identified(matching[0])
        slug = "ambiguous-root-disk" if matching else "no-root-disk"
        raise RunFailed(slug, f"The hints fit {len(matching)} of: {_names(candidates)}.")
    booting = [d for d in candidates if d["boots"]]
    if len(booting) == 1:
        return _identified(booting[0])
    if len(candidates) == 1:
        return _identified(candidates[0])
    raise RunFailed("ambiguous-root-disk", f"Candidates: {_names(candidates)}.")


def find_misfit(disk: Disk, *, sector_bytes: int, needed_bytes: int) -> RunFailed | None:
    """Why an image of these sectors, which needs so many bytes, can not be written to the disk: sector-size or disk-too-small."""
    if disk["sector_bytes"] != sector_bytes:
        return RunFailed("sector-size", f"{disk['path']} has sectors of {disk['sector_bytes']} bytes, the image of {sector_bytes}.")
    if disk["size_bytes"] < needed_bytes:
        return RunFailed("disk-too-small", f"{disk['path']} has {disk['size_bytes']} bytes, {needed_bytes} are needed.")
    return None


def find_known_misfit(seen: Sequence[Disk], hints: Mapping[str, Any], *, sector_bytes: int, needed_bytes: int) -> RunFailed | None:
    """The same of the disk that `hints` name by serial or WWN, as an earlier run saw it: nothing has to be powered off to know.

    None where no such disk was seen. Disks that are chosen by another rule may have been replaced since.
    """
    if not {"serial", "wwn"} & hints.keys():
        return None
    matching = [d for d in seen if all(_fits(d, name, value) for name, value in hints.items())]
    return find_misfit(matching[0], sector_bytes=sector_bytes, needed_bytes=needed_bytes) if len(matching) == 1 else None


def _identified(disk: Disk) -> Disk:
    if not disk["serial"]:
        raise RunFailed("no-root-disk", f"{disk['path']} has no serial, so no plan and no proof can name it.")
    return disk


def _fits(disk: Disk, name: str, value: Any) -> bool:
    if name == "size":
        return bool(disk["size_bytes"] // 2**30 == value)
    if name == "model":
        return str(value).lower() in str(disk["model"]).lower()
    return bool(disk[name] == value)


def _names(disks: Sequence[Disk]) -> str:
    return ", ".join(f"{d['path']} (serial {d['serial'] or 'none'}, {d['size_bytes'] // 10**9} GB)" for d in disks)
