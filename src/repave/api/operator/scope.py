"""Who asks, and in which project: known by the same token or signature as on CloudDC's routes, they see one project: their own, or, for an admin of
project `default` (the site's admin), the one that ?project= names.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

from fastapi import Depends, Request

from repave.api.asgi import incoming
from repave.api.operator.desk import Desk
from repave.domain.model import Credential, Role
from repave.errors import RequestError
from repave.store import Store

SITE_PROJECT = "default"


@dataclass(frozen=True)
class Scope:
    """Who asks, in which project, and what to work with. `credential.project_id` is the project looked at."""

    credential: Credential
    desk: Desk
    replay_key: str | None = None  # names the signed request, where it was signed
    named: str = ""  # the project's name, where it is not their own: what they do there by a command says it too

    @property
    def store(self) -> Store:
        return self.desk.store

    @property
    def project_id(self) -> str:
        return self.credential.project_id

    @property
    def actor(self) -> str:
        return self.credential.name


def is_site_admin(credential: Credential, store: Store) -> bool:
    site = store.access.find_project(SITE_PROJECT)
    return site is not None and credential.project_id == site.id and credential.role is Role.ADMIN


def check_role(credential: Credential, role: Role) -> None:
    """Raises not-allowed where this is less."""
    if not credential.role.includes(role):
        raise RequestError("not-allowed", f"This needs the role {role.value}; this is {credential.role.value}.", role=role.value)


def open_scope(credential: Credential, desk: Desk, project: str | None, replay_key: str | None = None) -> Scope:
    """In the project that is named: their own, or any for the site's admin. Raises not-allowed, not-found."""
    named = desk.store.access.find_project(project) if project is not None else None
    if project is None or (named is not None and named.id == credential.project_id):
        return Scope(credential, desk, replay_key)
    if not is_site_admin(credential, desk.store):
        raise RequestError("not-allowed", "Another project may be named by an admin of project default only.", field="project")
    if named is None:
        raise RequestError("not-found", f"There is no project {project!r}.", field="project")
    return Scope(replace(credential, project_id=named.id), desk, replay_key, named.name)


def _needs(role: Role) -> Callable[[Request, str | None], Scope]:
    def scope(request: Request, project: str | None = None) -> Scope:
        desk: Desk = request.state.desk
        caller = desk.identify(incoming(request).presented)
        check_role(caller.credential, role)
        return open_scope(caller.credential, desk, project, caller.replay_key)

    return scope


Viewer = Annotated[Scope, Depends(_needs(Role.VIEWER))]
Operator = Annotated[Scope, Depends(_needs(Role.OPERATOR))]
Admin = Annotated[Scope, Depends(_needs(Role.ADMIN))]
