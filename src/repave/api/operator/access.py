"""/repave/v1/whoami, /projects, /keys, /users: who may do what. A person's password comes in and never goes out; a key's SK and token go out once."""

from dataclasses import asdict
from datetime import datetime

from fastapi import APIRouter
from pydantic import Field

from repave.api.operator.answers import After, Body, Json, Limit, ProblemRoute, cut_page, one_more, render_list
from repave.api.operator.scope import Admin, Viewer, is_site_admin
from repave.auth.login import hash_password
from repave.domain.model import Credential, Role, User
from repave.errors import RequestError

router = APIRouter(route_class=ProblemRoute)


def _credential_json(credential: Credential) -> Json:
    return asdict(credential) | {"role": credential.role.value}


@router.get("/whoami")
def whoami(scope: Viewer) -> Json:
    project = scope.store.access.find_project(scope.project_id)
    assert project is not None
    return {
        "name": scope.actor, "role": scope.credential.role.value, "project": project.name, "project_id": project.id,
        "site_admin": is_site_admin(scope.credential, scope.store), "expires_at": scope.credential.expires_at,
    }  # fmt: skip


@router.get("/room")
def show_room(scope: Viewer) -> Json:
    """Bytes that images may still take, by quota and disk."""
    return {"image_bytes": scope.desk.images.room_bytes()}


@router.get("/projects")
def list_projects(scope: Viewer) -> Json:
    """All projects for the site's admin, one's own for the others."""
    everything = is_site_admin(scope.credential, scope.store)
    return render_list([asdict(p) for p in scope.store.access.list_projects() if everything or p.id == scope.project_id])


class NewProject(Body):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")


@router.post("/projects", status_code=201)
def add_project(scope: Admin, new: NewProject) -> Json:
    if not is_site_admin(scope.credential, scope.store):
        raise RequestError("not-allowed", "Projects are added by an admin of project default.", role="admin")
    return asdict(scope.store.access.add_project(new.name))


class NewKey(Body):
    name: str = Field(min_length=1, max_length=100)
    role: Role
    expires_at: datetime | None = None


@router.get("/keys")
def list_keys(scope: Admin, after: After = None, limit: Limit = None) -> Json:
    """Oldest first."""
    found, following = cut_page(scope.store.access.list_credentials(scope.project_id, after=after, limit=one_more(limit)), limit, lambda c: c.id)
    return render_list([_credential_json(c) for c in found], following)


@router.post("/keys", status_code=201)
def add_key(scope: Admin, new: NewKey) -> Json:
    """SK and token are in this answer and never again."""
    if new.expires_at is not None and new.expires_at.tzinfo is None:
        raise RequestError("bad-request", "expires_at: needs a time zone, as in 2027-01-31T00:00:00Z.", field="expires_at")
    made, sk, token = scope.store.access.add_credential(scope.project_id, new.name, new.role, expires_at=new.expires_at)
    return _credential_json(made) | {"sk": sk, "token": token}


@router.delete("/keys/{key_id}", status_code=204)
def remove_key(scope: Admin, key_id: str) -> None:
    scope.store.access.remove_credential(scope.project_id, key_id)


class NewUser(Body):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,99}$")
    role: Role
    password: str = Field(max_length=200)


def _user_json(user: User) -> Json:
    return asdict(user) | {"role": user.role.value}


@router.get("/users")
def list_users(scope: Admin) -> Json:
    return render_list([_user_json(u) for u in scope.store.people.list_users(scope.project_id)])


@router.post("/users", status_code=201)
def add_user(scope: Admin, new: NewUser) -> Json:
    return _user_json(scope.store.people.add_user(scope.project_id, new.name, new.role, hash_password(new.password), actor=scope.actor))


@router.delete("/users/{name}", status_code=204)
def remove_user(scope: Admin, name: str) -> None:
    """They are logged out everywhere."""
    scope.store.people.remove_user(scope.project_id, name, actor=scope.actor)
