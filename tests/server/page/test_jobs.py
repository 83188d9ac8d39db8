# SPDX-License-Identifier: Apache-2.0
"""A job on the page, from the form to its end; safety of what it says."""

from __future__ import annotations

import re

from playwright.sync_api import Page, expect

from tests.server.page.browser import FOX, card, moves, submit
from tests.server.page.fake_server import FakeServer, preset


def test_an_empty_queue_says_what_to_do(page: Page) -> None:
    expect(page.get_by_text("No clips yet")).to_be_visible()
    expect(page.get_by_text("nano")).to_be_visible()


def test_what_the_form_says_is_what_is_submitted(page: Page, server: FakeServer) -> None:
    page.get_by_label("Negative prompt").fill("blur")
    page.get_by_label("4k", exact=False).first.check()
    page.get_by_label("Seed").fill("41")
    page.get_by_label("Only drafts").check()
    page.get_by_label("Number of drafts").fill("2")
    submit(page)
    expect(page.get_by_text("Waiting, next in the queue", exact=True)).to_be_visible()
    ((body, key),) = server.posts
    assert body == {
        "prompt": FOX,
        "negative_prompt": "blur",
        "preset": "4k",
        "seed": 41,
        "draft_only": True,
        "n": 2,
    }
    assert re.fullmatch("[0-9a-f]{32}", key or "")


def test_a_form_left_alone_asks_for_the_servers_defaults(page: Page, server: FakeServer) -> None:
    submit(page)
    expect(card(page, FOX)).to_be_visible()
    assert [body for body, _ in server.posts] == [{"prompt": FOX, "preset": "2k", "seed": -1}]


def test_progress_moves_and_only_stages_are_spoken(page: Page, server: FakeServer) -> None:
    video = server.make(FOX)
    spoken = page.locator("#announcer")
    expect(card(page, FOX)).to_be_visible()
    server.advance(video, "draft", 12, 50, 10)
    expect(card(page, FOX)).to_contain_text("Draft, step 13 of 50")
    expect(card(page, FOX)).to_contain_text("10 % · about 3 min left")
    expect(card(page, FOX).get_by_role("progressbar")).to_have_js_property("value", 10)
    expect(spoken).to_have_text(f"{FOX}: Draft")
    server.advance(video, "draft", 30, 50, 25)
    expect(card(page, FOX).get_by_role("progressbar")).to_have_js_property("value", 25)
    expect(page).to_have_title("25 % · PixelWizard")
    expect(spoken).to_have_text(f"{FOX}: Draft")
    server.advance(video, "highres", 1, 4, 60)
    expect(spoken).to_have_text(f"{FOX}: High resolution")


def test_the_draft_is_seen_as_soon_as_it_is_there(page: Page, server: FakeServer) -> None:
    video = server.make(FOX)
    server.advance(video, "draft", 49, 50, 29)
    expect(card(page, FOX)).to_contain_text("The draft appears here")
    server.change(video, draft_ready=True)
    preview = card(page, FOX).locator("video")
    expect(preview).to_be_visible()
    moves(preview)
    expect(page.locator("#announcer")).to_have_text(f"{FOX}: draft ready")


def test_the_result_plays_in_a_loop_beside_its_draft(page: Page, server: FakeServer) -> None:
    video = server.make(FOX, draft_ready=True)
    server.finish(video)
    page.get_by_role("button", name=f"Play the clip: {FOX}").click()
    viewer = page.locator("#viewer")
    expect(viewer).to_have_accessible_name("Clip")
    film = viewer.locator("video")
    moves(film)
    assert film.evaluate("film => [film.loop, film.muted, film.videoWidth]") == [True, True, 224]
    viewer.get_by_role("button", name="Show the draft").click()
    expect(viewer).to_have_accessible_name("Draft")
    expect(film).to_have_js_property("videoWidth", 112)
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(film).not_to_have_attribute("src", re.compile("."))


def test_a_cancelled_job_keeps_its_draft(page: Page, server: FakeServer) -> None:
    video = server.make(FOX, draft_ready=True)
    server.advance(video, "highres", 1, 4, 50)
    card(page, FOX).get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Keep it").click()
    assert server.videos[video["id"]]["status"] == "in_progress"
    card(page, FOX).get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cancel the clip").click()
    expect(card(page, FOX)).to_contain_text("Cancelled")
    expect(card(page, FOX).get_by_role("button", name="Play the draft")).to_be_visible()
    expect(card(page, FOX).get_by_role("button", name="Finish at")).to_be_visible()


def test_a_draft_is_finished_at_a_preset_that_fits(page: Page, server: FakeServer) -> None:
    draft = server.make(FOX, draft_only=True, seed=5)
    server.finish(draft)
    choice = card(page, FOX).get_by_label("Preset to finish at")
    expect(choice.locator("option")).to_have_text(["2k", "4k"])  # 4k-5step does not fit
    choice.select_option("4k")
    card(page, FOX).get_by_role("button", name="Finish at").click()
    expect(card(page, FOX)).to_have_count(2)
    assert [body for body, _ in server.posts] == [{"draft_id": draft["id"], "preset": "4k"}]


def test_a_clip_of_a_preset_without_high_resolution_is_finished_too(
    page: Page, server: FakeServer
) -> None:
    draft = preset("draft", "448x256", 0) | {"has_highres": False, "steps": {"draft": 50}}
    server.presets = [*server.presets, draft]
    server.finish(server.make(FOX, preset="draft"))
    page.reload()
    choice = card(page, FOX).get_by_label("Preset to finish at")
    expect(choice.locator("option")).to_have_text(["2k", "4k"])


def test_drafts_of_one_prompt_are_a_gallery(page: Page, server: FakeServer) -> None:
    page.get_by_label("Only drafts").check()
    page.get_by_label("Number of drafts").fill("4")
    submit(page)
    gallery = page.locator(".gallery")
    expect(gallery.get_by_role("article")).to_have_count(4)
    expect(gallery.locator("header")).to_contain_text("4 drafts · 2k · 448 × 256 · 5 s")
    expect(gallery.locator("article .facts")).to_have_text([f"seed {1000 + i}" for i in range(4)])
    for video in list(server.videos.values()):
        server.finish(video)
    expect(page.get_by_role("region", name="Finished").get_by_role("article")).to_have_count(4)
    expect(gallery.get_by_role("button", name="Finish at")).to_have_count(4)


def test_a_clip_that_will_be_removed_says_when(page: Page, server: FakeServer) -> None:
    server.finish(server.make(FOX, expires_at=4102491600))
    expect(card(page, FOX)).to_contain_text("kept until 1 Jan")


def test_a_failure_is_told_in_the_servers_words(page: Page, server: FakeServer) -> None:
    server.fail(server.make(FOX), "out_of_memory", "out of memory: 13 GiB wanted, 9 were free")
    expect(card(page, FOX)).to_contain_text("Failed")
    expect(card(page, FOX)).to_contain_text("out of memory: 13 GiB wanted, 9 were free")


def test_a_job_is_deleted_after_a_question(page: Page, server: FakeServer) -> None:
    server.finish(server.make(FOX))
    card(page, FOX).get_by_role("button", name="Delete").click()
    page.keyboard.press("Escape")
    expect(card(page, FOX)).to_be_visible()
    card(page, FOX).get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_text("No clips yet")).to_be_visible()
    expect(page.locator("#clips")).to_be_focused()
    assert server.videos == {}


def test_a_job_that_another_page_deletes_goes(page: Page, server: FakeServer) -> None:
    video = server.make(FOX)
    expect(card(page, FOX)).to_be_visible()
    server.videos.pop(video["id"])
    server.deleted.append(video["id"])
    expect(card(page, FOX)).to_have_count(0)


def test_an_old_failure_is_not_said_again(page: Page, server: FakeServer) -> None:
    failed, video = server.make("A grey cat sits."), server.make(FOX)
    expect(card(page, "A grey cat sits.")).to_be_visible()
    server.fail(failed, "bad_result", "out of memory")
    expect(page.locator("#announcer")).to_contain_text("out of memory")
    server.advance(video, "draft", 1, 50, 1)
    expect(page.locator("#announcer")).to_have_text(f"{FOX}: Draft")
    with page.expect_response("**/v1/videos?*"):
        page.evaluate("dispatchEvent(new Event('online'))")
    server.change(video, draft_ready=True)
    expect(page.locator("#announcer")).to_have_text(f"{FOX}: draft ready")


def test_a_clip_and_its_receipt_can_be_saved(page: Page, server: FakeServer) -> None:
    server.finish(server.make(FOX))
    with page.expect_download() as download:
        card(page, FOX).get_by_role("link", name="Download").click()
    assert download.value.path().read_bytes() == server.files["video"]
    card(page, FOX).get_by_role("button", name="Receipt").click()
    receipt = page.get_by_role("dialog", name="Receipt")
    expect(receipt).to_contain_text('"version": "<b>0.1</b>"')
    expect(receipt).to_contain_text(f'"seed": {2**60 + 1}')
    expect(receipt.get_by_role("link", name="Save")).to_have_attribute(
        "href", re.compile("/receipt$")
    )


def test_an_earlier_job_fills_the_form(page: Page, server: FakeServer) -> None:
    server.finish(server.make(FOX, preset="4k", seed=77, negative_prompt="blur"))
    card(page, FOX).get_by_role("button", name="Use again").click()
    submit_button = page.get_by_role("button", name="Make clip")
    submit_button.click()
    expect(card(page, FOX)).to_have_count(2)
    assert server.posts[0][0] == {
        "prompt": FOX, "negative_prompt": "blur", "preset": "4k", "seed": 77,
    }  # fmt: skip


def test_the_queue_stands_in_its_order_under_what_runs(page: Page, server: FakeServer) -> None:
    videos = [server.make(f"clip {number}") for number in range(20)]
    server.advance(videos[3], "draft", 1, 50, 1)
    for place, video in enumerate(v for v in videos if v is not videos[3]):
        server.change(video, queue_position=place)
    headings = page.get_by_role("region", name="In progress").get_by_role("heading", level=4)
    order = [3, *(number for number in range(20) if number != 3)]
    expect(headings).to_have_text([f"clip {number}" for number in order])


def test_drafts_are_fetched_when_they_come_into_view(page: Page, server: FakeServer) -> None:
    for number in range(40):
        server.finish(server.make(f"clip {number}", draft_only=True))
    asked: set[str] = set()
    page.on(
        "request", lambda request: asked.add(request.url) if "/content" in request.url else None
    )
    page.reload()
    moves(card(page, "clip 39").locator("video"))
    assert len(asked) < 20  # how many are on the screen depends on when its style arrives
    last = card(page, "clip 0")
    last.scroll_into_view_if_needed()
    moves(last.locator("video"))


def test_more_jobs_than_one_answer_holds_are_all_there(page: Page, server: FakeServer) -> None:
    for number in range(130):
        server.finish(server.make(f"clip {number}"))
    page.reload()
    jobs = page.get_by_role("region", name="Finished").get_by_role("article")
    expect(jobs).to_have_count(60)
    page.get_by_role("button", name="Show 60 more of 70").click()
    page.get_by_role("button", name="Show 10 more of 10").click()
    expect(jobs).to_have_count(130)


def test_markup_in_a_prompt_is_text(page: Page, server: FakeServer) -> None:
    markup = "<img src=x onerror=\"document.title='run'\"><b>bold</b>"
    server.fail(server.make(markup), "internal", markup)
    expect(page.get_by_role("heading", name=markup)).to_be_visible()
    expect(page.locator("article .error")).to_have_text(markup)
    assert page.locator("article b, article img[src=x]").count() == 0
    expect(page).to_have_title("PixelWizard")


def test_an_id_that_is_none_makes_no_address(page: Page, server: FakeServer) -> None:
    code = """async () => {
      const { address } = await import("/api.js");
      return ["../../etc", "video_1", "video_" + "A".repeat(32)].map((id) => {
        try { return address(id); } catch (error) { return null; }
      });
    }"""
    assert page.evaluate(code) == [None, None, None]
