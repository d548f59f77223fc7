"""Which password opens a server's BMC, also while it is being changed, and whatever died in between.

The new password is stored, sealed, beside the old one before the BMC is told. So both orders of failure are harmless: where we die before the BMC has
changed it, the old one still opens it; where we die after, the old one is refused and the next login finds the new one, and that one alone is kept.
The old one is always tried first: a rotation that never reached its BMC costs no refused login, of which some BMCs count three and lock the account.
"""

from __future__ import annotations

from collections.abc import Callable

from repave.bmc import BmcAddress, BmcFacts
from repave.domain.model import Server
from repave.domain.own_host import are_of_two
from repave.errors import BmcError, RunFailed
from repave.store import Store

Login = Callable[[BmcAddress], BmcFacts]  # asks the BMC something that needs a login; raises BmcError, `auth` where it is refused


def _log_in(server: Server, password: str, log_in: Login) -> None:
    """The password opens the BMC of this server. Raises BmcError; RunFailed wrong-server where another one answers at its address."""
    facts = log_in(BmcAddress.of(server, password))
    if any(are_of_two(mine, theirs) for mine, theirs in ((server.uuid, facts.uuid), (server.serial, facts.serial))):
        raise RunFailed("wrong-server", f"At {server.name}'s BMC address another one answers; no password was changed or forgotten.")


def find_password(store: Store, server: Server, log_in: Login) -> str:
    """The password to use. Only where a rotation was not seen to its end the BMC is asked, and then what opens it is stored.

    Where none does, the first: what uses it says so. Raises BmcError where the BMC can not be asked.
    """
    known = store.servers.list_bmc_passwords(server.id)
    refused: list[str] = []
    for password in known if len(known) > 1 else ():
        try:
            _log_in(server, password, log_in)
        except BmcError as error:
            if error.slug != "auth":
                raise
            refused.append(password)
            continue
        if refused:
            store.servers.end_rotation(server.id, password, forget=refused, actor="repave")
        return password
    return known[0]


def rotate_password(store: Store, server: Server, new: str, *, log_in: Login, change: Callable[[BmcAddress, str], None], actor: str) -> None:
    """The BMC's account has the new password, seen by a login, and it alone is stored.

    Raises BmcError: where the BMC refused it, the old one is in force; where it stopped answering, both are kept until a login tells.
    Repeatable: asked again with the same password it finds out and finishes. Where the two are the same nothing is asked.
    """
    old = find_password(store, server, log_in)
    if old == new:
        return
    store.servers.begin_rotation(server.id, new)
    failure: BmcError | None = None
    try:
        change(BmcAddress.of(server, old), new)
    except BmcError as error:
        failure = error
    for password in (old, new) if failure else (new, old):
        try:
            _log_in(server, password, log_in)
        except BmcError as error:
            if error.slug == "auth":
                continue
            raise BmcError(error.slug, f"{error.detail} Whether it took the new password is not known: both are kept until one opens it.") from error
        if password == new:
            store.servers.end_rotation(server.id, new, forget=[old], actor=actor)
            return
        if failure and failure.slug == "password_refused":  # any other answer proves nothing: it may take it yet
            store.servers.end_rotation(server.id, old, forget=[new], actor=actor, rotated=False)
        break
    raise failure or BmcError("password_refused", "It said yes, and the old one is still in force.")
