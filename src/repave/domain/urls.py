"""Addresses that people write, judged before anything is asked of them. Names are not looked up: that is the network's."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

WEB = ("http", "https")
_HOST = re.compile(r"[\w.%:-]+")  # a name, an IPv4 address, or an IPv6 address without its brackets


def find_url_fault(url: str, *, schemes: Collection[str] = WEB, with_path: bool = True) -> str | None:
    """What is wrong with SCHEME://HOST[:PORT][/PATH] and nothing more, in words that never repeat it; None when nothing is."""
    fault = find_address_fault(url, schemes=schemes)
    if fault is not None:
        return fault
    parts = urlsplit(url)
    if parts.username is not None or parts.query or parts.fragment or not url.isprintable() or " " in url:
        return "must be a bare URL, without user, password, query or blanks"
    return "must end with the port" if parts.path.strip("/") and not with_path else None


def find_url_with_query_fault(url: str) -> str | None:
    """As `find_url_fault`, for an address that may end in a query."""
    bare, _, query = url.partition("?")
    if fault := find_url_fault(bare):
        return fault
    return None if query.isprintable() and not set(query) & set(" #") else "must be a URL without blanks and fragment"


def find_address_fault(url: str, *, schemes: Collection[str]) -> str | None:
    """What is wrong with scheme, host and port of a URL."""
    shape = f"must be {' or '.join(f'{scheme}://HOST' for scheme in schemes)}"
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that do not hold an IPv6 address
        return shape
    if parts.scheme not in schemes or not _HOST.fullmatch(parts.hostname or ""):
        return shape
    try:
        return "must have a port from 1 to 65535, or none" if parts.port == 0 else None
    except ValueError:
        return "must have a port from 1 to 65535, or none"


def is_loopback(url: str) -> bool:
    """Whether the host in `url` means, to whoever asks for it, the machine it asks from."""
    host = urlsplit(url).hostname or ""
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def find_unreachable_place(bmc_url: str, media_urls: Sequence[str], agent_url: str, chunks_url: str) -> str | None:
    """The setting whose address a server elsewhere would look for in itself; None where there is none, or the server is a lab's, here."""
    if is_loopback(bmc_url):
        return None
    if all(is_loopback(url) for url in media_urls):
        return "media_url"
    return next((name for name, url in (("agent_url", agent_url), ("chunks_url", chunks_url)) if is_loopback(url)), None)
