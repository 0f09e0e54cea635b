# SPDX-License-Identifier: GPL-3.0-or-later
"""Every error leaves as RFC 9457 problem+json with a stable code: one handler per kind of exception."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from node_manager.problems import ProblemError
from node_manager.store import StoreUnavailableError

MEDIA_TYPE = "application/problem+json"
_log = structlog.get_logger()

_CODES = {
    400: "bad_request",
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    406: "not_acceptable",
    413: "body_too_large",
    415: "unsupported_media_type",
}


class FieldError(BaseModel):
    """One field that was refused, and why."""

    field: str
    message: str


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    errors: list[FieldError] | None = None


def problem_response(
    status: int, code: str, detail: str, headers: dict[str, str] | None = None, **extra: Any
) -> Response:
    """Build the answer for one problem; *extra* members are added as they are."""
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": detail,
        **extra,
    }
    return Response(json.dumps(body), status, headers, MEDIA_TYPE)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe, for OpenAPI, the problems that an endpoint may answer with; those any endpoint may are added."""
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {"schema": _PROBLEM_REFERENCE}}}
        for status in sorted({*statuses, 401, 403, 503})
    }


_PROBLEM_REFERENCE = {"$ref": "#/components/schemas/Problem"}


def add_handlers(app: FastAPI) -> None:
    """Install the handlers."""
    app.add_exception_handler(ProblemError, _on_problem)
    app.add_exception_handler(StoreUnavailableError, _on_unavailable)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientDisconnect, _on_gone)
    app.add_exception_handler(Exception, _on_bug)


async def _on_problem(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)
    headers = {"Retry-After": "2"} if error.status == 503 else None
    return problem_response(error.status, error.code, error.detail, headers, **error.extra)


async def _on_unavailable(_request: Request, error: Exception) -> Response:
    assert isinstance(error, StoreUnavailableError)
    _log.warning("store unavailable", reason=str(error))
    headers = {"Retry-After": str(error.retry_after_seconds)}
    detail = "the store can't answer now; nothing was changed, repeat the request after the time in Retry-After"
    return problem_response(503, "store_unavailable", detail, headers)


async def _on_invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if any(item["type"] == "json_invalid" for item in found):
        return problem_response(400, "invalid_json", f"the body is not valid JSON: {found[0]['ctx']['error']}")
    errors = [{"field": _field(item["loc"]), "message": _message(item)} for item in found]
    detail = "; ".join(f"{item['field']}: {item['message']}" for item in errors)
    return problem_response(422, "invalid_input", detail[:2000], errors=errors)


async def _on_http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "http_error")
    headers = dict(error.headers) if error.headers else None
    return problem_response(error.status_code, code, str(error.detail), headers)


async def _on_gone(_request: Request, _error: Exception) -> Response:
    # Nobody reads it. As a bug it would be logged with all that stands on the stack, which takes a second each.
    return problem_response(400, "client_gone", "the connection ended before the whole body was there")


async def _on_bug(request: Request, error: Exception) -> Response:
    _log.error("unexpected error", path=request.url.path, exc_info=error)
    return problem_response(500, "internal_error", "an error of the manager itself; its log has the details")


def _message(item: dict[str, Any]) -> str:
    if item["type"] != "extra_forbidden":
        text: str = item["msg"].removeprefix("Value error, ")
        return text
    if str(item["loc"][-1]).lower().startswith("ansible_"):
        return "Ansible variables are not taken; use address and connection.user, port, become, credential, jump_host"
    return "unknown key"


def _field(location: tuple[int | str, ...]) -> str:
    parts = location[1:] if location and location[0] in {"body", "query", "path", "header"} else location
    return ".".join(str(part) for part in parts) or "body"
