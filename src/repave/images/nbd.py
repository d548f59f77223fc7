"""Our end of an NBD connection: read a disk that qemu-nbd holds open, and ask it where there are data.

Only what reading needs: newstyle handshake, structured replies (holes come without bytes), block status.
Source: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from contextlib import suppress
from pathlib import Path

_IHAVEOPT = b"IHAVEOPT"
_OPTION_REPLY, _REQUEST, _STRUCTURED_REPLY = 0x3E889045565A9, 0x25609513, 0x668E33EF
_OPT_GO, _OPT_STRUCTURED_REPLY, _OPT_SET_META_CONTEXT = 7, 8, 10
_REP_ACK, _REP_INFO, _REP_META_CONTEXT = 1, 3, 4
_CMD_READ, _CMD_DISCONNECT, _CMD_BLOCK_STATUS = 0, 2, 7
_DONE, _CHUNK_NONE, _CHUNK_DATA, _CHUNK_HOLE, _CHUNK_STATUS, _CHUNK_ERROR = 1, 0, 1, 2, 5, 1 << 15
_STATE_ZERO = 2  # of base:allocation: reads as zeros
_MOST_ASKED_BYTES = 1 << 31
_SHORT = 1 << 16  # bytes of an answer that is no data
_STATUS_BYTES = 1 << 24


class NbdError(Exception):
    """The other end refused a request, or does not keep to the protocol."""


class NbdConnection:
    """One connection; not safe to share between threads."""

    def __init__(self, path: Path, *, timeout_s: float) -> None:
        """Raises OSError or NbdError."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._cookie = 0  # of the last request; its answer repeats it
        self._extents = deque[tuple[int, bool]]()  # what next_data was told and has not passed
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(str(path))
            self._shake_hands()
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        with suppress(OSError):
            self._ask(_CMD_DISCONNECT, 0, 0)
        self._socket.close()

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fills `view` with the disk's bytes from `offset` on."""
        length = left = len(view)
        self._ask(_CMD_READ, offset, length)
        while True:
            flags, kind, size = self._reply()
            if kind in (_CHUNK_DATA, _CHUNK_HOLE):
                at = struct.unpack(">Q", self._receive(8))[0] - offset
                count = size - 8 if kind == _CHUNK_DATA else struct.unpack(">I", self._receive(4))[0]
                if at < 0 or count < 0 or at + count > length:
                    raise NbdError("an answer outside of what was asked")
                left -= count
                if kind == _CHUNK_DATA:
                    self._fill(view[at : at + count])
                else:
                    view[at : at + count] = bytes(count)
            elif kind != _CHUNK_NONE:
                raise NbdError(self._refusal(kind, size))
            if flags & _DONE:
                break
        if left:
            raise NbdError("an answer that is not whole")

    def next_data(self, offset: int) -> int:
        """Where the next bytes that may not be zero begin, at or after `offset`; the disk's size where there are none. `offset` must not become smaller."""
        while True:
            while self._extents:
                end, is_zero = self._extents[0]
                if offset < end and not is_zero:
                    return offset
                offset = max(offset, end)
                self._extents.popleft()
            if offset >= self.size:
                return self.size
            self._extents = self._ask_status(offset)

    def _ask_status(self, offset: int) -> deque[tuple[int, bool]]:
        """What is at and behind `offset`, in pieces: where each ends, and whether it reads as zeros. At least one."""
        self._ask(_CMD_BLOCK_STATUS, offset, min(self.size - offset, _MOST_ASKED_BYTES))
        described, done = b"", 0
        while not done:
            flags, kind, size = self._reply()
            done = flags & _DONE
            if kind == _CHUNK_STATUS and size <= _STATUS_BYTES:
                described = self._receive(size)[4:]
            elif kind != _CHUNK_NONE:
                raise NbdError(self._refusal(kind, size))
        extents = deque[tuple[int, bool]]()
        for length, state in struct.iter_unpack(">II", described[: len(described) // 8 * 8]):
            offset += length
            extents.append((offset, bool(state & _STATE_ZERO)))
            if not length:
                raise NbdError("a block of no length")
        if not extents:
            raise NbdError("an answer without a block status")
        return extents

    def _shake_hands(self) -> None:
        if self._receive(8) != b"NBDMAGIC" or self._receive(8) != _IHAVEOPT:
            raise NbdError("no NBD server")
        self._receive(2)
        self._socket.sendall(struct.pack(">I", 3))  # fixed newstyle, no zeroes behind the export's size
        self._option(_OPT_STRUCTURED_REPLY, b"")
        context = b"base:allocation"
        if _REP_META_CONTEXT not in self._option(_OPT_SET_META_CONTEXT, struct.pack(">III", 0, 1, len(context)) + context):
            raise NbdError("no block status")
        info = self._option(_OPT_GO, struct.pack(">IH", 0, 0)).get(_REP_INFO, b"")
        if len(info) < 10:
            raise NbdError("no size")
        self.size: int = struct.unpack(">Q", info[2:10])[0]

    def _option(self, option: int, data: bytes) -> dict[int, bytes]:
        """What was answered before the acknowledgement, by kind."""
        self._socket.sendall(_IHAVEOPT + struct.pack(">II", option, len(data)) + data)
        answers: dict[int, bytes] = {}
        while True:
            magic, _, kind, length = struct.unpack(">QIII", self._receive(20))
            if magic != _OPTION_REPLY or length > _SHORT:
                raise NbdError("an answer that is no answer")
            answer = self._receive(length)
            if kind == _REP_ACK:
                return answers
            if kind >= 1 << 31:
                raise NbdError(f"option {option} is refused: {answer.decode(errors='replace')}")
            if kind != _REP_INFO or answer[:2] == b"\0\0":  # of several kinds of info, the one with the size
                answers[kind] = answer

    def _ask(self, command: int, offset: int, length: int) -> None:
        self._cookie += 1
        self._socket.sendall(struct.pack(">IHHQQI", _REQUEST, 0, command, self._cookie, offset, length))

    def _reply(self) -> tuple[int, int, int]:
        """Flags, kind and length of the next part of an answer."""
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self._receive(20))
        if magic != _STRUCTURED_REPLY or cookie != self._cookie:
            raise NbdError("an answer that is no answer")
        return flags, kind, length

    def _refusal(self, kind: int, size: int) -> str:
        if not kind & _CHUNK_ERROR or not 6 <= size <= _SHORT:
            return "an answer that was not asked for"
        said = self._receive(size)
        return said[6 : 6 + int.from_bytes(said[4:6], "big")].decode(errors="replace") or f"error {int.from_bytes(said[:4], 'big')}"

    def _receive(self, count: int) -> bytes:
        data = bytearray(count)
        self._fill(memoryview(data))
        return bytes(data)

    def _fill(self, view: memoryview) -> None:
        while view:
            got = self._socket.recv_into(view)
            if not got:
                raise NbdError("the connection broke off")
            view = view[got:]
