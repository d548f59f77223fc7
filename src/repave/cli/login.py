"""`repave login`: a service that other commands ask by name (`--context NAME`), with a key of it."""

from __future__ import annotations

import json
import os

from repave.cli.client import Client, Endpoint, context_file
from repave.cli.output import Usage, is_terminal, read_secret, say, show


def login(url: str, /, *, name: str | None = None, token_stdin: bool = False) -> None:
    """Keep a service's address and a token of it, so that --context NAME means them. The service is asked whose the token is; nothing is changed there.

    The token is one that `repave key add` showed; it is asked for, or the first line of standard input.

    Parameters
    ----------
    url
        Where the service is: https://HOST:8470. REPAVE_CA names a CA bundle for it.
    name
        The context's name; without it the host's.
    token_stdin
        Take the token from standard input's first line.
    """
    if not token_stdin and not is_terminal():
        raise Usage("The token: give it with --token-stdin; it does not belong on the command line.")
    token = read_secret("Token", from_stdin=token_stdin).strip()
    client = Client(None, Endpoint(url.rstrip("/"), token))
    me = client.get("/whoami")
    file = context_file(name or client.host)
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    beside = file.with_suffix(".new")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as out:
        json.dump({"endpoint": client.endpoint.url, "token": token}, out)
    beside.replace(file)
    show(f"{me['name']} · {me['role']} of project {me['project']}")
    say(f"Kept in {file}.  Next: repave --context {file.stem} server ls; or export REPAVE_CONTEXT={file.stem}")
