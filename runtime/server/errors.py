"""Errors as OpenAI's API has them: {"error": {"message", "type", "param", "code"}} with a status."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ...ir.errors import InputError, LlmcError
from ..async_engine import QueueFullError
from ..engine import ContextLengthError
from .schema import FIELDS

_log = logging.getLogger("llmc.server")

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """`param`: the request's field. `extra`: further keys of the error object."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}
        self.extra = extra or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON to answer with."""
        kind = _TYPES.get(self.status, "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error | self.extra}

    def response(self) -> JSONResponse:
        """The answer."""
        return AsciiJsonResponse(self.body, self.status, self.headers)


class AsciiJsonResponse(JSONResponse):
    """JSON in ASCII: texts of clients and models may hold lone surrogates, which no UTF-8 can carry."""

    def render(self, content: Any) -> bytes:
        return dumps(content).encode("ascii")


dumps = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode
"""JSON in ASCII without spaces; NaN and infinities are a bug here, not a number."""


# "tools[0].function.name is …", "messages[2] has …": errors of the runtime begin with the field they concern.
_FIELD = re.compile(r"([a-z][a-z0-9_]*(?:\[\d+\]|\.[a-zA-Z_$][\w$]*)*)(?=:? |:)")


def as_api_error(error: Exception, *, retry_after: int = 1, path: str = "") -> ApiError:
    """What to answer where `error` was raised. `path`: of the request, which knows the prompt's name."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        return ApiError(
            400,
            str(error),
            param=_PROMPTS.get(path, "prompt"),
            code="context_length_exceeded",
            extra={"prompt_tokens": error.prompt_tokens, "limit": error.limit},
        )
    if isinstance(error, QueueFullError):
        headers = {"Retry-After": str(max(1, retry_after))}
        return ApiError(429, str(error), code="queue_full", headers=headers)
    if isinstance(error, InputError):
        code = getattr(error, "code", None) or "invalid_value"
        return ApiError(400, str(error), param=_field(error.message), code=code)
    if isinstance(error, LlmcError):
        return ApiError(500, str(error), code="engine_error")
    _log.error("a request failed", exc_info=error)
    return ApiError(500, "internal error; the server's log has the cause", code="internal_error")


def hide_places(error: LlmcError, names: Mapping[str, str]) -> None:
    """Put names that clients know in the place of paths in an error's text: where things lie on this machine
    is its owner's business.
    """
    for place in sorted(names, key=len, reverse=True):
        error.message = error.message.replace(place, names[place])
        error.remedy = error.remedy.replace(place, names[place])
    error.args = (error.message, error.remedy)


_PROMPTS = {"/v1/chat/completions": "messages", "/v1/responses": "input", "/v1/embeddings": "input"}


def _field(message: str) -> str | None:
    """The request's field that an error of the runtime begins with, if it begins with one."""
    found = _FIELD.match(message)
    if found is None or re.split(r"[.\[]", found.group(1))[0] not in FIELDS:
        return None
    return found.group(1)


def add_error_handlers(app: FastAPI) -> None:
    """Every way in which a request can fail ends in the same form."""

    def on_api_error(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error, path=request.url.path).response()

    def on_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _invalid(error).response()

    def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            return ApiError(404, f"there is no {request.url.path[:200]} here", code="not_found").response()
        status = 400 if error.status_code == 422 else error.status_code
        headers = dict(error.headers or {})
        code = "body_too_large" if status == 413 else "bad_request"
        return ApiError(status, str(error.detail), param="body", code=code, headers=headers).response()

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(LlmcError, on_api_error)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_api_error)


_KINDS = frozenset({"str", "int", "float", "bool", "dict", "none", "literal"})


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, with the field's path as a client would write it."""
    first = error.errors()[0]
    place = first["loc"][1:] if first["loc"][0] in ("body", "query", "path") else first["loc"]
    param = ""
    for part in place:
        # The members of a union stand in pydantic's path too ("list[int]", "ChatMessage"): they are no
        # fields.
        if isinstance(part, int):
            param += f"[{part}]"
        elif re.fullmatch(r"[a-z_$][\w$-]{0,63}", str(part)) and part not in _KINDS:
            param += f".{part}" if param else str(part)
    kind = first["type"]
    if kind == "extra_forbidden":
        return ApiError(
            400, f"{param} is not a field that is known here", param=param, code="unknown_parameter"
        )
    if kind == "missing":
        return ApiError(
            400, f"{param or 'body'} is missing", param=param or "body", code="missing_required_parameter"
        )
    if kind == "json_invalid":
        detail = str((first.get("ctx") or {}).get("error", ""))[:100]
        return ApiError(400, f"the body is not JSON: {detail}", param="body", code="invalid_json")
    message = str(first["msg"])[:300]
    return ApiError(400, f"{param or 'body'}: {message}", param=param or "body", code="invalid_type")
