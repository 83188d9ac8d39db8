# SPDX-License-Identifier: Apache-2.0
"""A browser, a server whose jobs move when the test says so, and its page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.server.page.browser import open_browser
from tests.server.page.fake_server import FakeServer

expect.set_options(timeout=15_000)  # until a test fails, on a machine with much to do


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(locale="en-GB", timezone_id="UTC")
    context.set_default_timeout(15_000)
    yield context
    context.close()


@pytest.fixture
def faults() -> list[str]:
    """Errors of scripts and refusals by the content security policy."""
    return []


@pytest.fixture
def blank(context: BrowserContext, faults: list[str]) -> Iterator[Page]:
    """A page that is nowhere yet."""
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console", lambda message: faults.append(message.text) if "polic" in message.text else None
    )
    yield page
    assert faults == []


@pytest.fixture
def page(blank: Page, server: FakeServer) -> Page:
    """The page of `server`."""
    blank.goto(server.url)
    expect(blank.get_by_role("radio").first).to_be_visible()
    return blank
