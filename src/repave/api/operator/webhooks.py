"""/repave/v1/webhooks: add (the secret is shown once), list, show, test, remove. A URL comes in and only its host goes out: with some it is the secret."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter
from pydantic import AfterValidator, Field

from repave.api.operator.answers import After, Body, Json, Limit, ProblemRoute, cut_page, must_exist, one_more, render_list
from repave.api.operator.scope import Admin, Scope
from repave.domain.model import Webhook
from repave.domain.urls import find_url_with_query_fault
from repave.secrets import new_webhook_secret

router = APIRouter(route_class=ProblemRoute, prefix="/webhooks")
EventType = Literal["batch.ended", "run.ended", "run.late"]


def _url(url: str) -> str:
    if fault := find_url_with_query_fault(url):
        raise ValueError(fault)
    return url


class NewWebhook(Body):
    """`shape`: `standard`, or `slack` for a chat's incoming webhook ({"text": ...})."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    url: Annotated[str, Field(max_length=2000), AfterValidator(_url)]
    events: list[EventType] = Field(default=["batch.ended"], min_length=1, max_length=3)
    shape: Literal["standard", "slack"] = "standard"


def _webhook_json(hook: Webhook) -> Json:
    return {name: value for name, value in asdict(hook).items() if name not in ("project_id", "after_seq")}


def _get_webhook(scope: Scope, reference: str) -> Webhook:
    return must_exist(scope.store.webhooks.find_webhook(scope.project_id, reference), "webhook", reference)


@router.get("")
def list_webhooks(scope: Admin, after: After = None, limit: Limit = None) -> Json:
    """In the order of their names. `trouble`: why the newest delivery failed, and `next_at` when it is tried again."""
    found, following = cut_page(scope.store.webhooks.list_webhooks(scope.project_id, after=after, limit=one_more(limit)), limit, lambda h: h.name)
    return render_list([_webhook_json(h) for h in found], following)


@router.get("/{reference}")
def show_webhook(scope: Admin, reference: str) -> Json:
    return _webhook_json(_get_webhook(scope, reference))


@router.post("", status_code=201)
def add_webhook(scope: Admin, new: NewWebhook) -> Json:
    """It is told of what happens from now on. `secret` is in this answer and never again."""
    secret, parts = new_webhook_secret(), urlsplit(new.url)
    hook = scope.store.webhooks.add_webhook(
        scope.project_id, name=new.name, url=new.url, host=parts.netloc, secret=secret, shape=new.shape, events=sorted({*new.events}), actor=scope.actor
    )
    return _webhook_json(hook) | {"secret": secret}


@router.post("/{reference}/test")
def send_test(scope: Admin, reference: str) -> Json:
    """A `webhook.test` was sent now and taken; 502 webhook-failed says why not."""
    hook = _get_webhook(scope, reference)
    scope.desk.send_test(hook)
    return _webhook_json(hook)


@router.delete("/{reference}", status_code=204)
def remove_webhook(scope: Admin, reference: str) -> None:
    scope.store.webhooks.remove_webhook(_get_webhook(scope, reference), actor=scope.actor)
