# SPDX-License-Identifier: Apache-2.0
"""Answers with a file, in parts where a client asks for ranges, with errors of the API's shape."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from pw_runtime.server.api_error import ApiError


class RangedFile(FileResponse):
    """A file or ranges of its bytes; ranges in other units are ignored, as HTTP demands."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        asked = [
            (name, value)
            for name, value in scope["headers"]
            if name != b"range" or value.partition(b"=")[0].strip().lower() == b"bytes"
        ]
        refused = False

        async def in_shape(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] >= 400:
                refused = True
                error = _refusal(message["status"], Headers(raw=message["headers"]))
                await error.response()(scope, receive, send)
            elif not refused:  # else the body of what was refused
                await send(message)

        await super().__call__({**scope, "headers": asked}, receive, in_shape)


def _refusal(status: int, headers: Headers) -> ApiError:
    """Return the error for ranges that cannot be had."""
    length = headers.get("content-range")
    if length is None:
        message = "Range is malformed, wanted bytes=FIRST-LAST"
        return ApiError(status, "invalid_range", message, param="range")
    message = f"Range is beyond the end of the file, which has {length.rpartition('/')[2]} bytes"
    told = {"content-range": f"bytes */{length.rpartition('/')[2]}"}  # some versions lack the unit
    return ApiError(status, "range_not_satisfiable", message, param="range", headers=told)
