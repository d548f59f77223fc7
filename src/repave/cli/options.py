"""Options that many commands have, with their help."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

Project = Annotated[str | None, Parameter(help="Another project than the key's own: for an admin of project default.")]
AsJson = Annotated[bool, Parameter(help="As JSON, with all that is known.")]
PasswordStdin = Annotated[bool, Parameter(help="The password is the first line of standard input.")]
Yes = Annotated[bool, Parameter(help="Do not ask.")]
