# SPDX-License-Identifier: Apache-2.0
"""Admission of requests: Host, Origin, token and size of every request, before any route.

Without a token a server is for this machine alone, and a web page elsewhere could still reach it
through a browser here: by a name of its own that leads to 127.0.0.1 (the Host is then not a
loopback name), or by a form (the Origin is then another one).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final
from urllib.parse import urlsplit

from starlette.requests import cookie_parser

from pw_runtime.server.api_error import ApiError
from pw_runtime.server.settings import Settings, is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE: Final = "pw_session"
PROTECTED: Final = ("/v1/", "/metrics", "/openapi.json")
OPEN: Final = ("/v1/session",)
SAFE_METHODS: Final = ("GET", "HEAD", "OPTIONS")
HEADERS: Final = (
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Guard:
    """An ASGI application in front of another one."""

    def __init__(self, app: App, settings: Settings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        body = _Body(receive, self._most(scope))
        guarded = _with_headers(send)
        try:
            scope["client_name"] = self._admit(scope, headers)
            body.require_small(headers)
            await self._app(scope, body.receive, guarded)
        except ApiError as error:  # of this class, and of a body that turns out too large
            await error.response()(dict(scope), receive, guarded)

    def _most(self, scope: Scope) -> int:
        """Return the bytes that a request may have: a new video's may hold a picture in base64."""
        limits, takes = self._settings.limits, (scope["method"], scope["path"])
        picture = limits.picture_bytes * 4 // 3 if takes == ("POST", "/v1/videos") else 0
        return limits.body_bytes + picture

    def _admit(self, scope: Scope, headers: Mapping[str, str]) -> str:
        """Return the client's name. Raises ApiError."""
        host = headers.get("host", "")
        if not self._settings.tokens and not is_loopback(_name(host)):
            message = f"the Host {host[:80]!a} is not a name of this machine's own: use 127.0.0.1"
            raise ApiError(403, "wrong_host", message)
        origin = headers.get("origin")
        changes = scope["method"] not in SAFE_METHODS
        if changes and origin is not None and _netloc(origin) != host:
            message = f"requests of pages from elsewhere are refused: {origin[:80]!a}"
            raise ApiError(403, "wrong_origin", message)
        address = (scope.get("client") or ("local",))[0]
        path = scope["path"]
        if not self._settings.tokens or path in OPEN or not path.startswith(PROTECTED):
            return str(address)
        name = self._client(headers)
        if name is None:
            raise ApiError(
                401,
                "invalid_token",
                "a token is needed: send it as Authorization: Bearer TOKEN",
                headers={"www-authenticate": "Bearer"},
            )
        return name

    def _client(self, headers: Mapping[str, str]) -> str | None:
        """Return the name of the client whose token, or whose session, came with a request."""
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and (name := client_of(token.strip(), self._settings.tokens)):
            return name
        # Not http.cookies, which reads none behind one that it dislikes: other servers of this host
        # set cookies for all of its ports.
        cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE)
        sessions = {session_of(token): name for token, name in self._settings.tokens.items()}
        return None if cookie is None else client_of(cookie, sessions)


def client_of(secret: str, names: Mapping[str, str]) -> str | None:
    """Return the name that belongs to a secret, in a time that says nothing about it."""
    found = None
    for known, name in names.items():
        if hmac.compare_digest(known.encode(), secret.encode("utf-8", "surrogateescape")):
            found = name
    return found


def session_of(token: str) -> str:
    """Return the content of the cookie for a token, from which the token cannot be found."""
    return hmac.new(token.encode(), b"pw serve session", hashlib.sha256).hexdigest()


def _netloc(origin: str) -> str | None:
    """Return the host and port of an Origin header; None for one without."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


def _name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


class _Body:
    """The body of a request, up to a size."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._most, self._count = receive, most, 0

    def require_small(self, headers: Mapping[str, str]) -> None:
        """Raise ApiError for a body that is announced as too large."""
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > self._most:
            raise self._too_large()

    async def receive(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        self._count += len(message.get("body", b""))
        if self._count > self._most:
            raise self._too_large()
        return message

    def _too_large(self) -> ApiError:
        return ApiError(413, "body_too_large", f"the body has more than {self._most} bytes")


def _with_headers(send: Send) -> Send:
    """Return a `send` that adds the headers of every answer."""

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *HEADERS]
        await send(message)

    return sending
