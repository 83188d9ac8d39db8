# SPDX-License-Identifier: Apache-2.0
"""Errors of the API, in the shape of OpenAI's: {"error": {"message", "type", "code", "param"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
MOST_PROBLEMS: Final = 8  # in a message


class ErrorDetail(BaseModel):
    """An error, for people and for programs."""

    message: str
    type: str
    code: str
    param: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers

    def response(self) -> JSONResponse:
        """Return the answer."""
        detail = ErrorDetail(
            message=_encodable(str(self)),
            type=_TYPES.get(self.status, "invalid_request_error"),
            code=self.code,
            param=None if self.param is None else _encodable(self.param),
        )
        content = {"error": detail.model_dump()}
        return JSONResponse(content, status_code=self.status, headers=self.headers)


def not_found(job_id: str, param: str = "video_id") -> ApiError:
    """Return the error that there is no such video."""
    return ApiError(404, "not_found", f"there is no video {job_id[:80]!a}", param=param)


def invalid(error: ValidationError | RequestValidationError) -> ApiError:
    """Return the error for values of the wrong kind, naming the fields."""
    problems = error.errors()
    named = [".".join(str(part) for part in item["loc"]) for item in problems]
    told = [f"{n}: {item['msg']}" for n, item in zip(named, problems, strict=True)][:MOST_PROBLEMS]
    place = problems[0]["loc"]
    if isinstance(error, RequestValidationError):
        place = place[1:]  # the first part is "query" or "body"
    param = place[0] if place and isinstance(place[0], str) else None
    return ApiError(400, "invalid_value", "; ".join(told), param=param)


def _encodable(text: str) -> str:
    """Return a text that UTF-8 can encode: JSON may have lone surrogates."""
    return text.encode(errors="backslashreplace").decode()


def install(app: FastAPI) -> None:
    """Let every error of an application have this shape."""

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def wrong_value(request: Request, error: RequestValidationError) -> JSONResponse:
        return invalid(error).response()

    @app.exception_handler(HTTPException)
    async def from_the_framework(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed"}
        code = codes.get(error.status_code, "invalid_request")
        message = {404: "there is nothing at this address"}.get(error.status_code, error.detail)
        answer = ApiError(error.status_code, code, message, headers=error.headers)
        return answer.response()

    @app.exception_handler(OperationalError)
    async def store_refuses(request: Request, error: OperationalError) -> JSONResponse:
        message = f"the queue on the disk cannot be written or read: {error.orig}"
        return ApiError(503, "storage_unavailable", message).response()
