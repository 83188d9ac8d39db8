# SPDX-License-Identifier: Apache-2.0
"""Who is let in: tokens, sessions, Host and Origin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from pw_runtime.errors import BadRequest
from pw_runtime.presets import PRESETS
from pw_runtime.server.settings import Settings, check_settings, parse_tokens
from tests.server.servers import Served, serving

TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that asks for a token."""
    with serving(tmp_path_factory.mktemp("locked") / "root", tokens={TOKEN: "anna"}) as served:
        yield served


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": "Bearer"},
        {"cookie": f"pw_session={TOKEN}"},
        {"cookie": "pw_session"},
        {"cookie": 'pw_session="\x80; ='},
        {"cookie": "pw_session=; path"},
    ],
)
@pytest.mark.parametrize(
    "path", ["/v1/videos", "/v1/videos/x/content", "/v1/events", "/metrics", "/openapi.json"]
)
def test_without_the_token_nothing_is_told(
    locked: Served, headers: dict[str, str], path: str
) -> None:
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = httpx.get(locked.url + path, headers=encoded)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_token"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_the_state_of_the_server_is_told_to_all(locked: Served) -> None:
    assert httpx.get(f"{locked.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{locked.url}/ready").json() == {"status": "ready"}


def test_a_session_is_as_good_as_the_token_and_hides_it(locked: Served) -> None:
    with httpx.Client(base_url=locked.url) as browser:
        assert browser.post("/v1/session", json={"token": "wrong"}).status_code == 401
        assert browser.get("/v1/videos").status_code == 401
        answer = browser.post("/v1/session", json={"token": TOKEN})
        assert answer.status_code == 200
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert TOKEN not in cookie
        assert browser.get("/v1/videos").status_code == 200
        # Another server of this host has set one that Python's http.cookies does not read.
        both = f'prefs={{"theme":"dark"}}; theme; {cookie.partition(";")[0]}'
        assert httpx.get(f"{locked.url}/v1/videos", headers={"cookie": both}).status_code == 200
        assert browser.post("/v1/videos", json={"prompt": "a fox"}).json()["client"] == "anna"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_name_that_leads_here_from_elsewhere_is_refused(shared: Served, host: str) -> None:
    status, error = shared.error("GET", "/v1/videos", headers={"host": host})
    assert (status, error["code"]) == (403, "wrong_host")


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1", "[::1]:8000"])
def test_names_of_this_machine_are_let_in(shared: Served, host: str) -> None:
    assert shared.http.get("/v1/videos", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://["]
)
def test_pages_from_elsewhere_change_nothing(shared: Served, origin: str) -> None:
    headers = {"origin": origin}
    for method, path in (
        ("POST", "/v1/videos"),
        ("DELETE", "/v1/videos/video_" + "0" * 32),
        ("POST", "/v1/session"),
    ):
        status, error = shared.error(method, path, headers=headers)
        assert (status, error["code"]) == (403, "wrong_origin")
    preflight = shared.http.options("/v1/videos", headers=headers)
    assert "access-control-allow-origin" not in preflight.headers


def test_the_servers_own_page_may_change_things(shared: Served) -> None:
    headers = {"origin": shared.url}
    body = {"prompt": "a fox"}
    assert shared.http.post("/v1/videos", json=body, headers=headers).status_code == 200


def test_an_address_that_others_reach_needs_a_token() -> None:
    settings = Settings(model=Path("m"), root=Path("r"), presets=PRESETS, host="0.0.0.0")
    with pytest.raises(BadRequest, match="no token is set"):
        check_settings(settings)
    check_settings(replace(settings, tokens={TOKEN: "anna"}))
    for host in ("127.0.0.1", "::1", "localhost"):
        check_settings(replace(settings, host=host))


def test_token_files_name_clients() -> None:
    assert parse_tokens(f"# ours\n\nanna {TOKEN}\n{TOKEN}2\n", "f") == {
        TOKEN: "anna",
        f"{TOKEN}2": "default",
    }


@pytest.mark.parametrize("text", ["", "short", f"a b {TOKEN}", f"{TOKEN}\n{TOKEN}", f"a/b {TOKEN}"])
def test_unusable_token_files_are_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="token"):
        parse_tokens(text, "f")
