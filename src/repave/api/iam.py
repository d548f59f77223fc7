"""GET /v3/projects, the one route of Huawei's IAM: an official SDK that was given a region and no project id asks it before all else.

Source: clouddc-api.md 5.3; its answer is taken only with exactly one project in it.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import BaseModel

from repave.api.asgi import incoming
from repave.api.limits import Limiter
from repave.api.wire_errors import too_many
from repave.auth import Authenticator, check_may
from repave.domain.model import Role
from repave.errors import RequestError
from repave.store import Store


class ProjectView(BaseModel):
    id: str
    name: str
    domain_id: str
    enabled: bool = True
    is_domain: bool = False


class ProjectList(BaseModel):
    projects: list[ProjectView]


def build_iam_router(store: Store, *, authenticate: Authenticator, limiter: Limiter) -> APIRouter:
    """The app that takes it needs `install_wire`."""
    router = APIRouter(prefix="/v3", tags=["CloudDC"], redirect_slashes=False)

    @router.get("/projects")
    def list_projects(request: Request) -> ProjectList:
        """The key's own project, whatever `name`: to an SDK that is its region, and a key here has one project."""
        credential = authenticate.identify(incoming(request).presented).credential
        check_may(credential, Role.VIEWER, project_id=credential.project_id)
        if (retry_after_s := limiter.take(credential.id, "read")) is not None:
            raise too_many(retry_after_s)
        if (project := store.access.find_project(credential.project_id)) is None:
            raise RequestError("not-logged-in", "the key's project is gone")
        return ProjectList(projects=[ProjectView(id=project.id, name=project.name, domain_id=project.domain_id)])

    return router
