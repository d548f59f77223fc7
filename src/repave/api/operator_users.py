"""/repave/v1/users: people who may log in to the pages. A password comes in and never goes out."""

from dataclasses import asdict

from fastapi import APIRouter
from pydantic import Field

from repave.api.operator import Admin, Body, Json, ProblemRoute, render_list
from repave.auth.login import hash_password
from repave.domain.model import Role, User

router = APIRouter(route_class=ProblemRoute, prefix="/users")


class NewUser(Body):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,99}$")
    role: Role
    password: str = Field(max_length=200)


def _user_json(user: User) -> Json:
    return asdict(user) | {"role": user.role.value}


@router.get("")
def list_users(scope: Admin) -> Json:
    return render_list([_user_json(u) for u in scope.store.people.list_users(scope.project_id)])


@router.post("", status_code=201)
def add_user(scope: Admin, new: NewUser) -> Json:
    return _user_json(scope.store.people.add_user(scope.project_id, new.name, new.role, hash_password(new.password), actor=scope.actor))


@router.delete("/{name}", status_code=204)
def remove_user(scope: Admin, name: str) -> None:
    """They are logged out everywhere."""
    scope.store.people.remove_user(scope.project_id, name, actor=scope.actor)
