# SPDX-License-Identifier: Apache-2.0
"""The page and its server: lost and found again, refusals, the token, presets."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.server.page.browser import FOX, card, moves, submit
from tests.server.page.fake_server import FakeServer

QUEUE_FULL = "the queue is full: 1000 jobs of all clients wait; try again later"


def test_a_reload_keeps_the_queue_and_what_was_typed(page: Page, server: FakeServer) -> None:
    server.advance(server.make(FOX), "highres", 2, 4, 70)
    page.get_by_label("Prompt", exact=True).fill("not sent yet")
    page.get_by_label("4k", exact=False).first.check()
    page.reload()
    expect(card(page, FOX)).to_contain_text("High resolution, step 3 of 4")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("not sent yet")
    expect(page.get_by_label("4k", exact=False).first).to_be_checked()


def test_a_restart_of_the_server_is_survived(page: Page, server: FakeServer) -> None:
    video = server.make(FOX, draft_ready=True)
    server.advance(video, "highres", 1, 4, 40)
    expect(card(page, FOX)).to_contain_text("40 %")
    server.stop()
    lost = page.get_by_text("Connection lost, trying again")
    expect(lost).to_be_visible()
    expect(card(page, FOX)).to_be_visible()
    server.advance(video, "highres", 2, 4, 60)
    server.start()
    expect(lost).to_be_hidden(timeout=15_000)
    expect(card(page, FOX)).to_contain_text("60 %")
    server.finish(video)
    expect(page.get_by_role("button", name="Play the clip")).to_be_visible()


def test_a_draft_that_did_not_load_is_asked_for_again(page: Page, server: FakeServer) -> None:
    page.clock.install()
    page.reload()
    page.route("**/content?variant=draft", lambda route: route.abort())
    video = server.make(FOX, draft_ready=True)
    expect(card(page, FOX)).to_contain_text("The draft cannot be shown here.")
    page.unroute("**/content?variant=draft")
    page.clock.fast_forward(2500)
    server.advance(video, "highres", 1, 4, 40)
    moves(card(page, FOX).locator("video"))


@pytest.mark.slow
def test_without_events_the_page_polls(page: Page, server: FakeServer) -> None:
    server.events = False
    page.reload()
    expect(page.get_by_text("No live updates here")).to_be_visible()
    server.make(FOX)
    expect(card(page, FOX)).to_be_visible()


@pytest.mark.slow
def test_where_events_are_held_back_the_page_polls(page: Page, server: FakeServer) -> None:
    server.held_back = True
    page.reload()
    expect(page.get_by_text("No live updates here")).to_be_visible(timeout=30_000)
    server.make(FOX)
    expect(card(page, FOX)).to_be_visible()


def test_a_tab_that_nobody_sees_holds_no_connection(page: Page, server: FakeServer) -> None:
    hide = """(hidden) => {
      Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    video = server.make(FOX)
    expect(card(page, FOX)).to_be_visible()
    server.until_listeners(1)
    page.evaluate(hide, True)
    server.until_listeners(0)
    server.advance(video, "draft", 30, 50, 25)
    page.evaluate(hide, False)
    expect(card(page, FOX)).to_contain_text("25 %")
    server.until_listeners(1)


def test_a_submission_without_an_answer_is_not_made_twice(page: Page, server: FakeServer) -> None:
    lost = [True]

    def lose_the_answer(route: Any) -> None:
        if route.request.method == "POST" and lost.pop():
            lost.append(False)
            route.fetch()
            route.abort()
        else:
            route.fallback()

    page.route("**/v1/videos", lose_the_answer)
    submit(page)
    expect(page.get_by_role("alert").filter(has_text="does not answer")).to_be_visible()
    lost[:] = [False]
    with page.expect_response(lambda answer: answer.request.method == "POST"):
        page.get_by_role("button", name="Make clip").click()
    expect(page.get_by_role("alert").filter(has_text="does not answer")).to_be_hidden()
    keys = [key for _, key in server.posts]
    assert len(keys) == 2
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    ("param", "label"),
    [(None, ""), ("seed", "Seed"), ("negative_prompt", "Negative prompt")],
)
def test_a_refusal_stands_in_the_form(
    page: Page, server: FakeServer, param: str | None, label: str
) -> None:
    server.refusal = 429, {"message": QUEUE_FULL, "code": "queue_full", "param": param}
    submit(page)
    expect(page.get_by_role("alert").filter(has_text=QUEUE_FULL)).to_be_visible()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(FOX)
    if param:
        expect(page.get_by_label(label)).to_be_focused()
        expect(page.get_by_label(label)).to_have_attribute("aria-invalid", "true")
    page.get_by_role("button", name="Make clip").click()
    expect(page.get_by_role("alert").filter(has_text=QUEUE_FULL)).to_be_hidden()
    expect(card(page, FOX)).to_be_visible()


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("Prompt", "  ", "Write a prompt first"),
        ("Seed", "1.5", "A seed is a whole number"),
        (
            "Seed",
            "9007199254740993",
            "A seed is a whole number",
        ),  # a JavaScript number cannot hold it
        ("Number of clips", "17", "a whole number from 1 to 16"),
    ],
)
def test_what_cannot_be_sent_is_told_at_once(
    page: Page, server: FakeServer, field: str, value: str, told: str
) -> None:
    page.get_by_label("Prompt", exact=True).fill(FOX)
    page.get_by_label(field, exact=True).fill(value)
    page.get_by_role("button", name=re.compile("^Make ")).click()
    expect(page.get_by_role("alert").filter(has_text=told)).to_be_visible()
    expect(page.get_by_label(field, exact=True)).to_be_focused()
    assert server.posts == []


def test_a_server_with_a_token_asks_for_it(page: Page, server: FakeServer) -> None:
    server.make(FOX)
    server.token = "0123456789abcdef"
    page.reload()
    question = page.get_by_role("dialog", name="This server asks for its token")
    question.get_by_label("Token").fill("wrong")
    question.get_by_role("button", name="Open").click()
    expect(question).to_contain_text("This is not the token.")
    page.keyboard.press("Escape")
    question.get_by_label("Token").fill(server.token)
    page.keyboard.press("Enter")
    expect(question).to_be_hidden()
    expect(card(page, FOX)).to_be_visible()
    page.reload()
    expect(card(page, FOX)).to_be_visible()


def test_presets_that_do_not_fit_say_why(page: Page, server: FakeServer) -> None:
    choice = page.get_by_role("radio", name="4k-5step")
    expect(choice).to_be_disabled()
    expect(page.get_by_text("Does not fit: 31.2 GiB of GPU memory")).to_be_visible()
    page.get_by_label("Only drafts").check()  # the draft fits
    expect(choice).to_be_enabled()


def test_a_worker_that_starts_is_told_and_then_which_presets_fit(
    blank: Page, server: FakeServer
) -> None:
    nothing = {"fits": None, "draft_fits": None, "reason": None}
    known = server.presets
    server.presets = [preset | nothing for preset in known]
    server.trouble = "the model is being loaded"
    blank.clock.install()
    blank.goto(server.url)
    choice = blank.get_by_role("radio", name="4k-5step")
    expect(blank.get_by_text("Clips wait: the model is being loaded")).to_be_visible()
    expect(choice).to_be_enabled()
    server.trouble = None  # of the first of several devices
    blank.clock.fast_forward(2500)
    expect(blank.get_by_text("Clips wait")).to_be_hidden()
    expect(choice).to_be_enabled()
    choice.focus()
    blank.clock.fast_forward(2500)
    expect(choice).to_be_focused()
    server.presets = known
    blank.clock.fast_forward(2500)
    expect(choice).to_be_disabled()
