# SPDX-License-Identifier: Apache-2.0
"""The page before `pw serve` itself: a clip is made in it, and outlives a kill of the server."""

from __future__ import annotations

import socket
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.pw import write_preset
from tests.server.page.browser import FOX, card, moves, submit
from tests.server.servers import Served, running

pytestmark = pytest.mark.slow

H264 = """document.createElement("video").canPlayType('video/mp4; codecs="avc1.42E01E"')"""


class Command:
    """`pw serve` on one port and one folder, to be started again and again."""

    def __init__(self, model: Path, folder: Path, **preset: object) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"
        self.words = [
            sys.executable, "-m", "pw_runtime", "serve", "--model", str(model), "--device", "cpu",
            "--preset", str(write_preset(folder / "small.toml", **preset)),
            "--root", str(folder / "root"), "--port", str(port),
        ]  # fmt: skip

    def __call__(self) -> AbstractContextManager[Served]:
        """Run it; it is killed at the end, without a warning."""
        return running(self.words)


def test_a_clip_is_made_and_outlives_a_kill_of_the_server(
    blank: Page, bundle_dir: Path, tmp_path: Path
) -> None:
    if not blank.evaluate(H264):
        pytest.skip("this Chromium plays no H.264: apt-get install chromium has one that does")
    serve = Command(bundle_dir, tmp_path, highres_steps=400)
    with serve():
        blank.goto(serve.url)
        expect(blank.get_by_role("radio")).to_be_checked()
        submit(blank)
        preview = card(blank, FOX).locator("video")
        expect(preview).to_be_visible(timeout=60_000)
        moves(preview)
        expect(card(blank, FOX)).to_contain_text("High resolution, step", timeout=60_000)
    expect(blank.get_by_text("Connection lost, trying again")).to_be_visible()
    with serve():
        play = blank.get_by_role("button", name="Play the clip")
        expect(play).to_be_visible(timeout=120_000)
        expect(blank.get_by_text("Connection lost, trying again")).to_be_hidden()
        play.click()
        film = blank.locator("#viewer video")
        moves(film)
        assert film.evaluate("film => [film.videoWidth, film.videoHeight]") == [192, 96]
        blank.get_by_role("button", name="Show the draft").click()
        expect(film).to_have_js_property("videoWidth", 96)


def test_a_draft_is_finished_and_deleted(blank: Page, bundle_dir: Path, tmp_path: Path) -> None:
    serve = Command(bundle_dir, tmp_path)
    with serve() as served:
        blank.goto(serve.url)
        for name in ("", "app.js"):
            headers = served.http.get(f"/{name}").headers
            assert headers["cache-control"] == "no-cache"
            assert headers["content-security-policy"].startswith("default-src 'self'")
        blank.get_by_label("Only drafts").check()
        submit(blank)
        expect(card(blank, FOX)).to_contain_text("Draft finished", timeout=60_000)
        card(blank, FOX).get_by_role("button", name="Finish at").click()
        finished = blank.get_by_role("button", name="Play the clip")
        expect(finished).to_be_visible(timeout=60_000)
        draft, clip = reversed(served.http.get("/v1/videos").json()["data"])
        assert clip["draft_id"] == draft["id"]
        assert clip["seed"] == draft["seed"]
        for left in (1, 0):
            card(blank, FOX).first.get_by_role("button", name="Delete").click()
            blank.get_by_role("dialog").get_by_role("button", name="Delete").click()
            expect(card(blank, FOX)).to_have_count(left)
        assert list((tmp_path / "root" / "jobs").glob("video_*")) == []
