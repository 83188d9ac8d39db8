# SPDX-License-Identifier: Apache-2.0
"""A Chromium, the system's or else the one that Playwright installed; what tests do in it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, Playwright, sync_playwright

FOX = "A red fox trots through fresh snow."
NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Open a browser; skip the test where there is none."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(playwright))
        yield browser
        browser.close()


def find_browser(playwright: Playwright) -> str:
    """Return the path of a Chromium; skip the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), playwright.chromium.executable_path)
    if not Path(found).exists():
        pytest.skip(
            "needs Chromium: apt-get install chromium, or python -m playwright install chromium"
        )
    return found


def card(page: Page, prompt: str) -> Locator:
    """Return the card of a job."""
    return page.get_by_role("article", name=prompt, exact=True)


def submit(page: Page, prompt: str = FOX) -> None:
    """Ask for a clip, with the form as it stands."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name=re.compile("^Make ")).click()


def moves(film: Locator) -> None:
    """Wait until a video is shown and its time runs."""
    film.page.wait_for_function(
        "film => film.currentTime > 0 && !film.paused", arg=film.element_handle()
    )
    before = film.evaluate("film => film.currentTime")
    film.page.wait_for_function(
        "([film, before]) => film.currentTime !== before", arg=[film.element_handle(), before]
    )
