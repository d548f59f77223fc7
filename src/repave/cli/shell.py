"""What belongs to the shell around us: completion, the manual page, the version."""

from __future__ import annotations

from typing import Literal

from repave import __version__
from repave.cli.output import show


def version() -> None:
    """The version of Repave."""
    show(__version__)


def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Completion for this shell, for its start file: `source <(repave completion bash)`, the same with zsh; `repave completion fish | source`."""
    from repave.cli.main import build_app

    show(build_app().generate_completion(prog_name="repave", shell=shell))


def man() -> None:
    """The manual page: `repave man | man -l -`, or into /usr/share/man/man1/repave.1."""
    from repave.cli.manual import render_man

    show(render_man())
