"""The machine this process runs on, as its firmware and network cards name it: Repave never reinstalls it."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

from repave.domain.model import Host
from repave.domain.own_host import says_something


def read_own_host(sys_path: Path = Path("/sys")) -> Host:
    """Serial number and UUID need root (mode 0400); the MACs of physical cards are there for everyone, and are enough."""
    serial, uuid = (_read(sys_path / "class/dmi/id" / name) for name in ("product_serial", "product_uuid"))
    macs = tuple(sorted(_physical_macs(sys_path / "class/net")))
    name = socket.gethostname()
    identity = "|".join([uuid if says_something(uuid) else "", ",".join(macs)]).strip("|") or name
    return Host(hashlib.sha256(identity.lower().encode()).hexdigest()[:32], name, serial, uuid, macs)


def _physical_macs(folder: Path) -> set[str]:
    """Of the cards that have a device behind them: bridges, bonds, taps and containers' ends have none."""
    cards = [card for card in folder.iterdir() if (card / "device").exists()] if folder.is_dir() else []
    return {mac for card in cards if (mac := _read(card / "address").lower()) and mac != "00:00:00:00:00:00"}


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
