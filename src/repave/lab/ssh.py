"""Logging in over SSH with a password, as a person would: the proof that a password works, or does not any more.

OpenSSH's own client; the password reaches it by SSH_ASKPASS and the environment, never by a command line.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


class SshFailed(RuntimeError):
    """No login: no answer, another host key, or the command failed."""


class SshRefused(SshFailed):
    """The server answered and refused this user and password."""


def ssh_login(host: str, port: int, password: str, command: str, *, user: str = "root", timeout_s: float = 60, host_keys: Sequence[str] = ()) -> str:
    """The command's standard output, run on the machine by password login.

    Args:
        host_keys: "TYPE BASE64" lines; when given, the machine must have one of them. Otherwise any key is taken.

    Raises: SshRefused when the password is not taken, SshFailed for all else.
    """
    with tempfile.TemporaryDirectory() as folder:
        askpass, known = Path(folder, "askpass"), Path(folder, "known_hosts")
        askpass.write_text("#!/bin/sh\nprintf '%s\\n' \"$REPAVE_SSH_PASSWORD\"\n")
        askpass.chmod(0o700)
        known.write_text("".join(f"[{host}]:{port} {key}\n{host} {key}\n" for key in host_keys))
        options = {
            "PreferredAuthentications": "password,keyboard-interactive",
            "PubkeyAuthentication": "no",
            "NumberOfPasswordPrompts": "1",
            "StrictHostKeyChecking": "yes" if host_keys else "no",
            "UserKnownHostsFile": str(known),
            "GlobalKnownHostsFile": "/dev/null",
            "ConnectTimeout": "20",  # an emulated machine takes seconds for its key exchange
            "LogLevel": "ERROR",
        }
        arguments = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        env = os.environ | {"SSH_ASKPASS": str(askpass), "SSH_ASKPASS_REQUIRE": "force", "REPAVE_SSH_PASSWORD": password}
        try:
            done = subprocess.run(
                ["ssh", "-F", "/dev/null", *arguments, "-p", str(port), f"{user}@{host}", command],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env, timeout=timeout_s, start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise SshFailed(f"{host}:{port} did not answer within {timeout_s:.0f} s") from None
    if "Permission denied" in done.stderr and done.returncode == 255:
        raise SshRefused(f"{host}:{port} refuses {user}")
    if done.returncode:
        raise SshFailed(f"{host}:{port}: status {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout
