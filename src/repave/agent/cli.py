"""The command `repave-agent`: a run's agent on a scripted server, and the writer alone. The ramdisk starts main.py itself.

Each command imports what it needs and no more: Python's start is a tenth of a short write (docs/benchmarks.md).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="repave-agent")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do what the run of this boot's media wants")
    run.add_argument("--slot", type=Path, required=True, help="the run's slot, a JSON file of its boot media (agent/protocol.py)")
    run.add_argument("--machine-file", type=Path, help="a scripted server made of files, instead of this one")
    write = commands.add_parser("write", help="write an image that `repave image pack` made to a disk or a file, which becomes the image")
    write.add_argument("manifest_url", help="http(s)://.../manifests/SHA256.json; its chunks are beside it")
    write.add_argument("device", type=Path, help="the disk or file; what is on it is lost")
    write.add_argument("--sha256", default="", help="the manifest's digest, where its name does not say it")
    write.add_argument(
        "--cache", action="append", default=[], metavar="URL", help="another place with the chunks (URL/ab/SHA256), asked first; may be repeated"
    )
    write.add_argument("--resume", action="store_true", help="keep what of the image is on the disk already")
    write.add_argument("--verify", choices=("sample", "full"), default="sample", help="how much is read back past the cache")
    write.add_argument("--give-up-s", type=float, default=60.0, help="end where no chunk comes for so long (60)")
    write.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    sys.exit(_write(arguments) if arguments.command == "write" else _run(run, arguments))


def _write(arguments: argparse.Namespace) -> int:
    from repave.agent.alone import run_write

    return run_write(arguments)


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from repave.agent.machine import FileMachine, Machine, RealMachine, is_ramdisk
    from repave.agent.main import NOT_HERE, run_agent

    if arguments.machine_file is None and not is_ramdisk():
        parser.error(NOT_HERE)
    machine: Machine = FileMachine(arguments.machine_file) if arguments.machine_file else RealMachine()
    return run_agent(arguments.slot, machine)


if __name__ == "__main__":
    main()
