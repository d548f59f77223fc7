"""Who is asking, and may they? Tokens, AK/SK signatures, roles. Refusals are RequestErrors; the wire is `api`'s.

The combinations follow clouddc-api.md section 10, "Authentication": whatever is presented must be valid, all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from repave.auth.aksk import Presented, SignatureRefused, parse_authorization, replay_key, verify_signature
from repave.domain.model import Credential, Role
from repave.errors import RequestError


class CredentialBook(Protocol):
    """What we ask of the store. Both give expired credentials too."""

    def find_credential_by_token(self, token: str) -> Credential | None: ...

    def find_credential_by_ak(self, ak: str) -> tuple[Credential, str] | None: ...


@dataclass(frozen=True)
class Caller:
    """A known caller. `replay_key` names the signed request; None for a token, which names no request."""

    credential: Credential
    replay_key: str | None = None


class Authenticator:
    """Answers who is asking."""

    def __init__(self, book: CredentialBook, *, now: Callable[[], datetime]) -> None:
        self._book, self._now = book, now

    def identify(self, request: Presented) -> Caller:
        """The caller of this request.

        Raises:
            RequestError: `not-logged-in`; `bad-request` where two tokens are sent.
        """
        tokens, authorizations = request.values("x-auth-token"), request.values("authorization")
        if len(tokens) > 1:
            raise RequestError("bad-request", "X-Auth-Token is sent twice", field="X-Auth-Token")
        if not tokens and not authorizations:
            raise RequestError("not-logged-in", "send X-Auth-Token or an SDK-HMAC-SHA256 signature")
        by_signature = self._by_signature(request, authorizations) if authorizations else None
        by_token = self._by_token(tokens[0]) if tokens else None
        if by_signature is None or by_token is None:
            found = by_signature or (Caller(by_token) if by_token else None)
            assert found is not None
            return found
        # Both: of one project, and never more than the lesser of the two may do.
        if by_token.project_id != by_signature.credential.project_id:
            raise RequestError("not-logged-in", "token and signature belong to different projects")
        lesser = by_token if by_signature.credential.role.includes(by_token.role) else by_signature.credential
        return Caller(lesser, by_signature.replay_key)

    def _by_token(self, token: str) -> Credential:
        found = self._book.find_credential_by_token(token) if token else None
        if found is None or self._expired(found):
            raise RequestError("not-logged-in", "the token is unknown or expired")
        return found

    def _by_signature(self, request: Presented, authorizations: list[str]) -> Caller:
        try:
            if len(authorizations) > 1:
                raise SignatureRefused("Authorization is sent twice")
            authorization = parse_authorization(authorizations[0])
            found = self._book.find_credential_by_ak(authorization.ak)
            # An unknown key is checked like any other, so that the answer does not tell which keys exist.
            credential, sk = found if found else (None, "")
            verify_signature(request, authorization, sk, now=self._now())
            if credential is None or self._expired(credential):
                raise SignatureRefused("the signature does not match")
        except SignatureRefused as refused:
            raise RequestError("not-logged-in", str(refused)) from None
        return Caller(credential, replay_key(request, authorization))

    def _expired(self, credential: Credential) -> bool:
        return credential.expires_at is not None and credential.expires_at <= self._now()


def check_may(credential: Credential, needed: Role, *, project_id: str) -> None:
    """Returns when this credential may act as `needed` in this project. Raises RequestError `not-allowed`."""
    if credential.project_id != project_id:
        raise RequestError("not-allowed", "this key is for another project than the one in the path")  # whether there is that one or not
    if not credential.role.includes(needed):
        raise RequestError("not-allowed", f"this needs the role {needed.value}, and this key is {credential.role.value}")


__all__ = ["Authenticator", "Caller", "CredentialBook", "Presented", "check_may"]
