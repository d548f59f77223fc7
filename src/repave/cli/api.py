"""One request to the service, by hand."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from repave.cli.client import Client
from repave.cli.options import Project
from repave.cli.output import Exit, Json, Usage, show, show_json


def api(
    method: Annotated[Literal["GET", "POST", "PUT", "PATCH", "DELETE"], Parameter(converter=lambda _, tokens: tokens[0].value.upper())],
    path: str,
    /,
    *,
    data: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    project: Project = None,
) -> int:
    """Send one request as the key that this command line has, and print the answer. docs/api.md has the routes.

    Parameters
    ----------
    path
        From the root of the service: /repave/v1/servers, /v1/{project_id}/instances; or short: servers is /repave/v1/servers.
    data
        The body, JSON; @FILE reads it from a file, - from standard input (where no password stands in the shell's history).
    """
    path = path if path.startswith("/") else f"/repave/v1/{path}"
    answer = Client(project).ask(method, path, _body(data))
    if answer is not None:
        show(answer) if isinstance(answer, str) else show_json(answer)
    return Exit.OK


def _body(data: str | None) -> Json | None:
    if data is None:
        return None
    try:
        text = sys.stdin.read() if data == "-" else Path(data[1:]).read_text() if data.startswith("@") else data
        body = jsonlib.loads(text)
    except (OSError, ValueError) as error:
        raise Usage(f"--data: {error}.") from None
    if not isinstance(body, dict):
        raise Usage('--data: an object is needed, as in \'{"servers": ["web01"]}\'.')
    return body
