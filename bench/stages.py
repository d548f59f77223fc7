"""Run by `bench/write.py`: the CPU seconds of each stage alone, one after the other on one core, over the image's own bytes.

    stages.py PACK MANIFEST CHUNKS-URL DEVICE

receive: HTTP into one reused buffer. sha256: of the compressed bytes. decode: zstd into one buffer. write: O_DIRECT of the data, holes punched.
read back: as much as the agent's sample, hashed.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import zstandard

from repave.agent.target import TargetDisk
from repave.agent.writer import SAMPLE_BYTES, WHOLE_EVERY
from repave.images.manifest import parse_manifest

pack, manifest_name, chunks_url, device = sys.argv[1:]
manifest = parse_manifest((Path(pack) / "manifests" / manifest_name).read_bytes())
with_data = [i for i, c in enumerate(manifest.chunks) if c.extents]
stored = {i: (Path(pack) / "chunks" / manifest.chunks[i].sha256[:2] / manifest.chunks[i].sha256).read_bytes() for i in with_data}
buffer = memoryview(mmap.mmap(-1, manifest.window_bytes))
buffer[:] = hashlib.shake_128(b"x").digest(len(buffer))
seconds: dict[str, float] = {}


def stage(name: str, work: Callable[[], None]) -> None:
    began = time.process_time()
    work()
    seconds[name] = round(time.process_time() - began, 3)


def receive() -> None:
    parts = urlsplit(chunks_url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        for index in with_data:
            sha256 = manifest.chunks[index].sha256
            connection.sendall(f"GET {parts.path}/{sha256[:2]}/{sha256} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(4096)
            left = manifest.chunks[index].compressed_bytes - len(head.partition(b"\r\n\r\n")[2])
            while left:
                left -= connection.recv_into(buffer, min(left, len(buffer)))


def sha256() -> None:
    for data in stored.values():
        hashlib.sha256(data).digest()


def decode() -> None:
    for data in stored.values():
        reader = zstandard.ZstdDecompressor(max_window_size=8 << 20).stream_reader(data)
        filled = 0
        while filled < len(buffer) and (more := reader.readinto(buffer[filled:])):
            filled += more


def write() -> None:
    for index, chunk in enumerate(manifest.chunks):
        offset, length = manifest.window(index)
        end = 0
        for start, size in (*chunk.extents, (length, 0)):
            if start > end:
                disk.make_zero(offset + end, start - end)
            if size:
                disk.write(offset + start, buffer[start : start + size])
            end = start + size
    disk.flush()


def read_back() -> None:
    for number, index in enumerate(with_data):
        length = manifest.window(index)[1] if number % WHOLE_EVERY == 0 else SAMPLE_BYTES
        disk.read_into(manifest.window(index)[0], buffer[:length])
        hashlib.sha256(buffer[:length]).digest()


with TargetDisk(Path(device), sector_bytes=512, size_bytes=os.path.getsize(device) or manifest.size_bytes) as disk:
    for work in (receive, sha256, decode, write, read_back):
        stage(work.__name__, work)
print(json.dumps(seconds | {"sum_s": round(sum(seconds.values()), 3)}))
