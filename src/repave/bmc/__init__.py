"""The driver contract: what Repave may ask of a BMC.

Every call asks for a state, not a change, and returns only after it was read back; so each may be repeated.
All raise `errors.BmcError` with one of `errors.BMC_CLASSES` as its slug. All block (run them in a thread).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from repave.domain.model import Server


class Power(enum.StrEnum):
    """Power state as read from the BMC now."""

    ON = "on"
    OFF = "off"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class BmcAddress:
    """Where a BMC is and how to log in. `password` never leaves the driver."""

    url: str
    username: str
    password: str
    tls_verify: bool | str = True  # True, False, or a path to a CA bundle
    certificate_sha256: str | None = None  # pinned fingerprint (hex), wins over tls_verify
    system_uri: str | None = None  # only needed where the BMC names several systems

    def __repr__(self) -> str:
        return f"BmcAddress({self.url!r}, ***)"

    @classmethod
    def of(cls, server: Server, password: str) -> BmcAddress:
        """The BMC of a server we know."""
        verify: bool | str = {"true": True, "false": False}.get(server.bmc_tls_verify, server.bmc_tls_verify)
        return cls(server.bmc_url, server.bmc_username, password, verify, server.bmc_certificate_sha256, server.bmc_system_uri)


@dataclass(frozen=True)
class BmcFacts:
    """What `probe` found; serial and uuid may be empty where the BMC does not know them."""

    system_uri: str
    manufacturer: str
    model: str
    serial: str
    uuid: str
    power: Power
    virtual_media: tuple[str, ...]  # URIs of slots that take a CD, the one we would use first
    boot_targets: tuple[str, ...]  # allowed BootSourceOverrideTarget values
    macs: tuple[str, ...] = ()
    certificate_sha256: str | None = None
    arch: str = ""  # "amd64", "arm64" or "" where unknown
    by_http: bool = False  # our media would come by UEFI HTTP boot, not in a slot

    @property
    def carrier(self) -> str | None:
        """How our media would come: `http` or `media`; None where neither can be."""
        return "http" if self.by_http else "media" if self.virtual_media else None


class Bmc(Protocol):
    """One server's BMC. One call at a time per BMC; the driver holds the lock."""

    def probe(self) -> BmcFacts:
        """What the BMC says of itself and its server. Touches nothing."""

    def check_media(self, urls: Sequence[str]) -> None:
        """The BMC could take one of `urls` and boot it, as far as it says. Touches nothing."""

    def read_power(self) -> Power:
        """The power state now."""

    def power_on(self) -> None:
        """The server is on, read back."""

    def power_off(self, *, graceful_s: float = 0, while_waiting: Callable[[], None] = lambda: None) -> bool:
        """The server is off, read back. With `graceful_s` it is asked first for that long. Returns True when forced.
        `while_waiting` is called before each reading of that wait: what it raises ends the wait, and the BMC is free at once."""

    def wait_for_off(self, within_s: float) -> bool:
        """Whether the server is off by then. Asks for nothing: a shutdown that was asked for earlier ends."""

    def insert_media(self, urls: Sequence[str]) -> str:
        """The image at one of `urls` (same image, several protocols) is in the CD slot, read back. Returns the URL taken.
        An occupied slot is ejected first."""

    def eject_media(self) -> None:
        """No media of ours are in any CD slot. Succeeds when there is nothing to do."""

    def withdraw_media(self, folder: str) -> bool:
        """No media with this part of a path (`/media/RUN/`) in their URL are in any CD slot, and where there were, the next boot is from the disk.
        Power and all other media stay as they are, with their override. Returns whether there was anything to take out.
        Raises: no_virtual_media where no slot is shown, protocol where one does not tell what is in it."""

    def boot_from_media_once(self) -> None:
        """The next boot is from the CD, read back (`Continuous` after `Once` was asked counts: see `boot_from_disk`)."""

    def boot_from_disk(self) -> None:
        """No override is in force, or it names the disk; read back."""

    def set_password(self, password: str) -> None:
        """The account that we log in with was told to have this password, and did not refuse. Only a login tells whether it has it.
        Raises: password_refused, no account of ours shown: forbidden."""
