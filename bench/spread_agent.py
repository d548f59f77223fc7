"""One agent of `spread`: fetches the chunks of an image at a given time and prints the seconds it took. Imports little: 48 of them start at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from repave.agent.chunks import ChunkSource


def run_agent(folder: Path, starts_at: float, token: str, urls: Sequence[str]) -> None:
    names = (folder / "names").read_text().split()
    source = ChunkSource(urls, token=token, ca_pem=(folder / "ca.pem").read_text())
    if time.time() > starts_at:
        raise RuntimeError("started too late")
    time.sleep(starts_at - time.time())
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda name: source.fetch(name, while_true=lambda: True), names):
            pass
    print(time.time() - starts_at)


if __name__ == "__main__":
    run_agent(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4:])
