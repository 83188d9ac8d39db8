# SPDX-License-Identifier: Apache-2.0
"""The page for everybody: keyboard, names, contrast, widths, themes, motion."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.server.page.browser import FOX, card, moves
from tests.server.page.fake_server import FakeServer, Video


def test_a_clip_is_asked_for_by_keyboard_alone(page: Page, server: FakeServer) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the clips")).to_be_focused()
    names = []
    for _ in range(20):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
        if names[-1] == "prompt":
            page.keyboard.type(FOX)
        if names[-1] == "preset":
            page.keyboard.press("ArrowDown")
        if names[-1] == "submit":
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            page.keyboard.press("Enter")
            break
    wanted = [
        "motion",
        "theme",
        "prompt",
        "negative",
        "preset",
        "seed",
        "count",
        "draft-only",
        "submit",
    ]
    assert names == wanted
    expect(card(page, FOX)).to_be_visible()
    assert server.posts[0][0]["preset"] == "4k"


def test_control_and_enter_submit_from_the_prompt(page: Page, server: FakeServer) -> None:
    page.get_by_label("Prompt", exact=True).fill(FOX)
    page.keyboard.press("Control+Enter")
    expect(card(page, FOX)).to_be_visible()


def every_state(server: FakeServer, prompt: str = FOX) -> None:
    """Have a job in every state, and a gallery."""
    server.make(prompt)
    server.advance(server.make(prompt, draft_ready=True), "highres", 1, 4, 40)
    server.finish(server.make(prompt))
    server.fail(server.make(prompt, draft_ready=True), "internal", "x" * 300)
    first: Video = server._submit({"prompt": prompt, "n": 4, "draft_only": True})
    for video_id in [first["id"], *first["siblings"]]:
        server.finish(server.videos[video_id])


@pytest.mark.parametrize("width", [320, 390, 700, 1280])
def test_no_width_needs_horizontal_scrolling(page: Page, server: FakeServer, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    every_state(server, "word " * 40 + "w" * 300)
    expect(page.get_by_role("article")).to_have_count(8)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_control_has_a_name_and_every_job_a_heading(page: Page, server: FakeServer) -> None:
    every_state(server)
    expect(page.get_by_role("article")).to_have_count(8)
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    controls = {"button", "link", "textbox", "radio", "checkbox", "spinbutton", "combobox"}
    named = controls | {"ProgressIndicator", "progressbar", "article", "region"}
    seen = [node for node in nodes if not node["ignored"] and node["role"]["value"] in named]
    assert {node["role"]["value"] for node in seen} >= controls
    assert [node for node in seen if not node.get("name", {}).get("value")] == []
    assert page.get_by_role("heading", level=1).count() == 1
    assert page.get_by_role("status").count() == 3
    assert page.evaluate("document.documentElement.lang") == "en"


CONTRAST = """(names) => {
  const probe = document.body.appendChild(document.createElement("i"));
  const light = (name) => {
    probe.style.color = `var(--${name})`;
    const canvas = new OffscreenCanvas(1, 1).getContext("2d");
    canvas.fillStyle = getComputedStyle(probe).color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const [a, b] = names.map(light).sort((one, other) => other - one);
  return (a + 0.05) / (b + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Browser, server: FakeServer, scheme: Any) -> None:
    """WCAG 2.2 AA: 4.5 to 1 for text, 3 to 1 for the edges of fields."""
    page = browser.new_page(color_scheme=scheme)
    page.goto(server.url)
    texts = [
        (ink, ground) for ink in ("ink", "soft", "fault", "accent") for ground in ("paper", "card")
    ]
    texts += [("on-accent", "accent"), ("soft", "tint"), ("soft", "sunk"), ("paper", "ink")]
    low = {pair: ratio for pair in texts if (ratio := page.evaluate(CONTRAST, list(pair))) < 4.5}
    assert low == {}
    assert page.evaluate(CONTRAST, ["edge", "card"]) >= 3
    page.close()


def ground(page: Page) -> str:
    colour: str = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    return colour


def test_the_theme_follows_the_system_until_it_is_chosen(page: Page) -> None:
    page.emulate_media(color_scheme="light")
    light = ground(page)
    page.emulate_media(color_scheme="dark")
    dark = ground(page)
    assert dark != light
    switch = page.get_by_role("button", name="Dark")
    expect(switch).to_have_attribute("aria-pressed", "true")
    switch.click()
    assert ground(page) == light
    page.reload()
    assert ground(page) == light
    expect(switch).to_have_attribute("aria-pressed", "false")


def test_previews_stand_still_for_those_who_want_that(page: Page, server: FakeServer) -> None:
    page.emulate_media(reduced_motion="reduce")
    page.reload()
    server.finish(server.make(FOX, draft_only=True))
    switch = page.get_by_role("button", name="Pause previews")
    expect(switch).to_have_attribute("aria-pressed", "true")
    preview = card(page, FOX).locator("video")
    expect(preview).to_be_visible()
    expect(preview).to_have_js_property("paused", True)
    switch.click()
    moves(preview)
    page.reload()
    expect(switch).to_have_attribute("aria-pressed", "false")


def test_a_moving_card_keeps_the_focus(page: Page, server: FakeServer) -> None:
    video = server.make(FOX)
    server.advance(video, "highres", 1, 4, 40)
    again = card(page, FOX).get_by_role("button", name="Use again")
    again.focus()
    server.finish(video)
    expect(page.get_by_role("region", name="Finished").get_by_role("article")).to_have_count(1)
    expect(again).to_be_focused()
