"""HTTP connections to addresses that somebody told us: an image's URL, a webhook's. What a URL can not do: name this machine, a link-local address or one
where clouds keep their metadata, unless the site allows it. The address that was looked at is the one that is connected to.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import queue
import socket
import ssl
import threading

_METADATA = tuple(map(ipaddress.ip_network, ("100.64.0.0/10", "168.63.129.16/32", "fd00:ec2::/32")))  # Alibaba, Azure, AWS; the others' are link-local


class AddressRefused(Exception):
    """It says what the address is; nothing was sent there."""


class OutboundConnection(http.client.HTTPConnection):
    """To an address that may be asked, and that was looked at before it is connected to. `connect` raises AddressRefused, and TimeoutError after `timeout_s`
    for the name and as long again for the address."""

    def __init__(self, host: str, port: int, scheme: str, local_addresses: bool, *, timeout_s: float) -> None:
        super().__init__(host, port, timeout=timeout_s)
        self._timeout_s = timeout_s
        self._is_cut = False
        self._scheme, self._local_addresses = scheme, local_addresses

    def connect(self) -> None:
        found = _resolve(self.host, self.port, self._timeout_s)
        if not self._local_addresses and any(_is_local(address) for address in found):
            raise AddressRefused("this machine's or link-local")
        self.sock = socket.create_connection((found[0], self.port), self.timeout)
        if self._scheme == "https":  # the handshake comes when it can be cut: the other end may take its time for each byte of it
            self.sock = tls = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
        if self._is_cut:
            raise ConnectionAbortedError("cut")
        if self._scheme == "https":
            tls.do_handshake()

    def cut(self) -> None:
        """From another thread: whoever waits for the other end sees its end, and `connect` does not go on."""
        self._is_cut = True
        if (sock := self.sock) is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of the connection alone: SSLSocket's own forgets its TLS under who reads from it


def _resolve(host: str, port: int, timeout_s: float) -> list[str]:
    """The host's addresses. Raises OSError; TimeoutError in time: the resolver has a time of its own, up to minutes, and nothing ends it. Its thread does
    when it answers at last."""
    answers: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put([str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)])
        except Exception as error:  # whatever it is, it is raised where it was asked for
            answers.put(error)

    threading.Thread(target=ask, name="resolver", daemon=True).start()
    try:
        found = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError(f"no address in {timeout_s:.0f} seconds") from None
    if isinstance(found, Exception):
        raise found
    return found


def _is_local(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    if address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast or address.is_reserved:
        return True
    return any(address in network for network in _METADATA if network.version == address.version) or _is_ours(text)


def _is_ours(address: str) -> bool:
    """This machine has it: only then a socket can be bound to it."""
    family, place = (socket.AF_INET6, (address, 0, 0, 0)) if ":" in address else (socket.AF_INET, (address, 0))
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(place)
        except OSError:
            return False
    return True
