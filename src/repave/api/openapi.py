"""/repave/v1/openapi.json: OpenAPI 3.1 of CloudDC's routes and our own, complete enough for a generated client.

FastAPI knows paths, parameters and bodies; what our own routes answer is in `shapes.ANSWERS`, and all of them fail alike.
"""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from repave import __version__
from repave.api.shapes import ANSWERS, Problem
from repave.api.wire_errors import OWN_PREFIX, json_answer

PATH = f"{OWN_PREFIX}v1/openapi.json"
Json = dict[str, Any]
_SCHEMES = {
    "token": {"type": "apiKey", "in": "header", "name": "X-Auth-Token"},
    "signature": {"type": "http", "scheme": "SDK-HMAC-SHA256", "description": "Huawei's AK/SK signature, with X-Sdk-Date."},
}
_OPEN = ("health", "show_openapi")  # without a key
_IMAGE_BODY = {
    "required": True,
    "description": "The image file; or JSON that says where it is: `path` below import_dir, or `url` with its `sha256` or `signature_url`.",
    "content": {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "application/json": {"schema": {"$ref": "#/components/schemas/ImportBody"}},
    },
}
_KEY_PARAMETER = {
    "name": "Idempotency-Key", "in": "header", "required": False, "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
    "description": "The same request with the same key, sent again within a day, begins nothing and is answered as the first.",
}  # fmt: skip


def build_openapi_router(app: FastAPI) -> APIRouter:
    """The document of all routes that the app has when it is first asked for."""
    router = APIRouter(tags=["operator"])
    made: list[Json] = []

    @router.get(PATH, response_class=Response)
    def show_openapi() -> Response:
        if not made:
            made.append(render_openapi(app))
        return json_answer(200, made[0])

    return router


def render_openapi(app: FastAPI) -> Json:
    from repave.api.operator.images import ImportBody

    document = get_openapi(title="Repave", version=__version__, openapi_version="3.1.0", routes=app.routes)
    schemas: Json = document["components"]["schemas"]
    models: list[type[BaseModel]] = [*(answer for answer in ANSWERS.values() if answer and not isinstance(answer, str)), Problem, ImportBody]
    _, ours = models_json_schema([(model, "validation") for model in dict.fromkeys(models)], ref_template="#/components/schemas/{model}")
    schemas |= ours["$defs"]
    document["components"]["securitySchemes"] = _SCHEMES
    document["security"] = [{"token": []}, {"signature": []}]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            own = path.startswith(OWN_PREFIX)
            name = operation["operationId"].removesuffix(re.sub(r"\W", "_", f"{path}_{method}"))  # FastAPI puts both behind the function's name
            operation["operationId"] = name if own else f"clouddc_{name}"
            _complete(operation, own=own)
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own answer to a bad body; ours are another
        schemas.pop(unused, None)
    return document


def _complete(operation: Json, *, own: bool) -> None:
    name = operation["operationId"]
    responses: Json = operation["responses"]
    responses.pop("422", None)
    if name in _OPEN:
        operation["security"] = []
    if name in ("reinstall", "clouddc_reinstall_os"):
        operation.setdefault("parameters", []).append(_KEY_PARAMETER)
    if not own:
        return
    answer = ANSWERS.get(name)
    good = next(iter(responses))
    if isinstance(answer, str):
        responses[good] = {
            "description": "Done",
            "content": {answer: {"schema": {"type": "string"} | ({} if answer.startswith("text/") else {"format": "binary"})}},
        }
    elif answer is not None:
        responses[good] = {"description": "Done" if good != "202" else "Accepted", "content": _json_content(answer.__name__)}
    if name == "health":
        responses["503"] = {"description": "A part is not well", "content": _json_content("Health")}
    if name == "reinstall":
        responses["200"] = {"description": "dry_run: the plan; nothing was begun", "content": _json_content("Plan")}
    if name == "show_openapi":
        responses[good]["content"] = {"application/json": {"schema": {"type": "object"}}}
    if name in ("list_events", "show_console"):
        responses[good]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    if name == "add_image":
        operation["requestBody"] = _IMAGE_BODY
    if name not in _OPEN:
        responses["default"] = {
            "description": "It failed; nothing was done but what `untouched` says",
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }


def _json_content(name: str) -> Json:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
