# SPDX-License-Identifier: Apache-2.0
"""The API as clients see it, with a worker that needs no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.servers import Served, serving


def test_a_video_is_queued_made_and_fetched(shared: Served) -> None:
    video = shared.create("a fox", preset="2k", seed=7)
    assert (video["object"], video["status"], video["progress"]) == ("video", "queued", 0)
    assert (video["size"], video["seconds"], video["frames"], video["fps"]) == (
        *("2560x1440", "5", 121, 24),
    )
    done = shared.until_ended(video["id"])
    assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None)
    assert done["files"] == {"video": True, "draft": True, "receipt": True}
    content = shared.http.get(f"/v1/videos/{video['id']}/content")
    assert content.text.startswith("clip of 7")
    assert content.headers["content-type"] == "video/mp4"
    draft = shared.http.get(f"/v1/videos/{video['id']}/content?variant=draft")
    assert draft.text == "draft of 7"
    assert shared.http.get(f"/v1/videos/{video['id']}/receipt").json() == {"seed": 7}


def test_the_end_of_every_job_is_told_on_the_standard_error(tmp_path: Path) -> None:
    with serving(tmp_path / "root") as served:
        made = served.until_ended(served.create()["id"])["id"]
        failed = served.until_ended(served.create("fail")["id"])
        served.end()
        served.drained.wait(60)
    told = "".join(served.lines)
    assert f"{made} is completed\n" in told
    assert f"{failed['id']} failed ({failed['error']['code']}): " in told


def test_a_part_of_a_video_is_served(shared: Served) -> None:
    video = shared.until_ended(shared.create()["id"])
    path = f"/v1/videos/{video['id']}/content"
    part = shared.http.get(path, headers={"range": "bytes=0-3"})
    assert (part.status_code, part.text) == (206, "clip")


@pytest.mark.parametrize("rest", ["content", "receipt"])
def test_a_range_that_cannot_be_had_is_an_error_of_the_one_shape(shared: Served, rest: str) -> None:
    path = f"/v1/videos/{shared.until_ended(shared.create()['id'])['id']}/{rest}"
    whole = shared.http.get(path)
    beyond = shared.http.get(path, headers={"range": "bytes=9999-"})
    assert beyond.headers["content-range"] == f"bytes */{len(whole.content)}"
    status, error = shared.error("GET", path, headers={"range": "bytes=9999-"})
    assert (status, error["code"], error["param"]) == (416, "range_not_satisfiable", "range")
    status, error = shared.error("GET", path, headers={"range": "bytes=x"})
    assert (status, error["code"], error["param"]) == (400, "invalid_range", "range")
    ignored = shared.http.get(path, headers={"range": "items=0-1"})
    assert (ignored.status_code, ignored.content) == (200, whole.content)


@pytest.mark.parametrize("rest", ["", "/content", "/content?variant=draft", "/receipt"])
def test_head_says_of_a_video_what_get_does(shared: Served, rest: str) -> None:
    path = f"/v1/videos/{shared.until_ended(shared.create()['id'])['id']}{rest}"
    got, head = shared.http.get(path), shared.http.head(path)
    assert (head.status_code, head.text) == (200, "")
    for name in ("content-type", "content-length"):
        assert head.headers[name] == got.headers[name]


@pytest.mark.parametrize("path", ["/health", "/v1/videos", "/v1/presets", "/metrics"])
def test_head_is_answered_where_get_is(shared: Served, path: str) -> None:
    assert shared.http.head(path).status_code == 200


def test_a_form_is_taken_like_json(shared: Served) -> None:
    fields = {"prompt": (None, "a fox"), "seed": (None, "5"), "draft_only": (None, "true")}
    answer = shared.http.post("/v1/videos", files=fields)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["seed"], answer.json()["draft_only"]) == (5, True)


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({}, "prompt", "no prompt"),
        ({"prompt": "  "}, "prompt", "no prompt"),
        ({"prompt": "x" * 10_001}, "prompt", "10001 characters"),
        ({"prompt": "a\ud800"}, "prompt", "surrogates"),
        ({"prompt": "a", "size": "2560x1441"}, "size", "2560x1440 (2k)"),
        ({"prompt": "a", "size": "wide"}, "size", "WIDTHxHEIGHT"),
        ({"prompt": "a", "size": "0x5"}, "size", "WIDTHxHEIGHT"),
        ({"prompt": "a", "size": "256x128", "preset": "2k"}, "size", "2560x1440"),
        ({"prompt": "a", "preset": "8k"}, "preset", "2k (2560x1440)"),
        ({"prompt": "a", "preset": "4k"}, "preset", "the nearest that fits: 2k"),
        ({"prompt": "a", "preset": "2k", "seconds": "8"}, "seconds", "the nearest are 5 s"),
        ({"prompt": "a", "preset": "2k", "seconds": 4.9}, "seconds", "the nearest are 4.833 s"),
        ({"prompt": "a", "seconds": "nan"}, "seconds", "above 0"),
        ({"prompt": "a", "seconds": -1}, "seconds", "above 0"),
        ({"prompt": "a", "fps": 0}, "fps", "1 to 1000"),
        ({"prompt": "a", "n": 17}, "n", "1 to 16"),
        ({"prompt": "a", "seed": 2**62}, "seed", "wanted -1 to"),
        ({"prompt": "a", "seed": "many"}, "seed", "integer"),
        ({"prompt": "a", "priority": 101}, "priority", "-100 to 100"),
        ({"prompt": "a", "model": "sora-2"}, "model", "no model"),
        ({"prompt": "a", "steps": 4}, "steps", "the fields are"),
        ({"prompt": "a", "seconds": [1]}, "seconds", "valid string"),
        ({"\ud800": 1}, "\\ud800", "the fields are"),
        ({"prompt": "a", "input_reference": {"\ud800": 1}}, "input_reference", "unicode"),
        ({"prompt": "a", "input_reference": "x"}, "input_reference", "a file of a form"),
        ({"prompt": "a", "draft_id": "../../etc"}, "draft_id", "not the id"),
        ({"draft_id": "video_" + "0" * 32}, "draft_id", "no video"),
    ],
)
def test_a_bad_field_is_named_with_what_can_be_had(
    shared: Served, fields: dict[str, Any], param: str, told: str
) -> None:
    body = json.dumps(fields).encode()
    headers = {"content-type": "application/json"}
    status, error = shared.error("POST", "/v1/videos", content=body, headers=headers)
    assert status == (404 if param == "model" else 400)
    assert error["param"] == param
    assert told in error["message"]


def test_seconds_and_frames_per_second_decide_the_frames(shared: Served) -> None:
    video = shared.create(preset="2k", seconds="2", fps=12)
    assert (video["frames"], video["fps"], video["seconds"]) == (25, 12, "2")


def test_a_size_selects_the_preset(shared: Served) -> None:
    assert shared.create(size="512x256")["preset"] == "nano-hd"
    assert shared.create(size="512*256")["preset"] == "nano-hd"
    assert shared.create(size="448x256")["preset"] == "draft"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("PUT", "/v1/videos", 405),
        ("GET", "/v1/videos/video_" + "0" * 32, 404),
        ("GET", "/v1/videos/..%2f..%2fetc%2fpasswd", 404),
        ("DELETE", "/v1/videos/video_" + "0" * 32, 404),
        ("GET", "/v1/videos?limit=0", 400),
        ("GET", "/v1/videos?limit=many", 400),
        ("GET", "/v1/videos?order=up", 400),
        ("GET", "/v1/videos?after=x", 404),
    ],
)
def test_errors_have_one_shape(shared: Served, method: str, path: str, status: int) -> None:
    assert shared.error(method, path)[0] == status


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("GET", "/v1/videos?after=", None, "after"),
        ("GET", "/v1/videos?limit=many", None, "limit"),
        ("GET", "/v1/videos/x", None, "video_id"),
        ("POST", "/v1/session", b'{"token": 1}', "token"),
        ("POST", "/v1/session", b"{", None),
    ],
)
def test_an_error_names_the_parameter_in_the_wrong(
    shared: Served, method: str, path: str, body: bytes | None, param: str | None
) -> None:
    headers = {"content-type": "application/json"}
    assert shared.error(method, path, content=body, headers=headers)[1]["param"] == param


@pytest.mark.parametrize(
    ("content", "kind", "code"),
    [
        (b"{", "application/json", "invalid_json"),
        (b"[]", "application/json", "invalid_body"),
        (b"\xff", "application/json", "invalid_json"),
        (b"[" * 100_000, "application/json", "invalid_json"),
        (b"a", "text/plain", "unsupported_media_type"),
        (b"a", "multipart/form-data", "invalid_request"),
    ],
)
def test_a_body_that_is_none_is_refused(
    shared: Served, content: bytes, kind: str, code: str
) -> None:
    headers = {"content-type": kind}
    status, error = shared.error("POST", "/v1/videos", content=content, headers=headers)
    assert (status, error["code"]) == (400, code)


def test_a_large_body_is_refused_whether_or_not_it_says_so(shared: Served) -> None:
    large = b'{"prompt": "' + b"x" * 2**18 + b'"}'
    headers = {"content-type": "application/json"}
    assert shared.error("POST", "/v1/videos", content=large, headers=headers)[0] == 413
    pieces = (large[i : i + 2**16] for i in range(0, len(large), 2**16))
    assert shared.error("POST", "/v1/videos", content=pieces, headers=headers)[0] == 413


def test_several_clips_of_a_request_have_seeds_in_a_row(shared: Served) -> None:
    first = shared.create(n=3, seed=10, draft_only=True)
    others = [shared.video(video_id) for video_id in first["siblings"]]
    assert [first["seed"], *(other["seed"] for other in others)] == [10, 11, 12]
    assert others[0]["siblings"] == [first["id"], others[1]["id"]]


def test_a_random_seed_is_told(shared: Served) -> None:
    seeds = {shared.create(seed=-1)["seed"], shared.create()["seed"]}
    assert len(seeds) == 2
    assert min(seeds) >= 0


def test_a_request_that_is_repeated_with_its_key_is_one_job(shared: Served) -> None:
    headers = {"idempotency-key": "only-once"}
    body = {"prompt": "a fox"}
    answers = [shared.http.post("/v1/videos", json=body, headers=headers) for _ in range(2)]
    assert len({answer.json()["id"] for answer in answers}) == 1
    status, error = shared.error("POST", "/v1/videos", json={"prompt": "a wolf"}, headers=headers)
    assert (status, error["code"]) == (409, "idempotency_key_reused")


def test_a_repeated_request_is_answered_though_its_draft_was_deleted_meanwhile(
    shared: Served,
) -> None:
    draft = shared.until_ended(shared.create(draft_only=True)["id"])
    headers, body = {"idempotency-key": "finish"}, {"draft_id": draft["id"]}
    first = shared.http.post("/v1/videos", json=body, headers=headers)
    assert first.status_code == 200, first.text
    shared.http.delete(f"/v1/videos/{draft['id']}")
    again = shared.http.post("/v1/videos", json=body, headers=headers)
    assert (again.status_code, again.json().get("id")) == (200, first.json()["id"])


def test_a_draft_is_finished_at_another_preset(shared: Served) -> None:
    draft = shared.create("a fox", preset="nano", seed=4, draft_only=True)
    assert shared.until_ended(draft["id"])["size"] == "192x96"
    assert shared.http.get(f"/v1/videos/{draft['id']}/content").text == "draft of 4"
    finish = {"draft_id": draft["id"], "preset": "nano-hd"}
    video = shared.http.post("/v1/videos", json=finish).json()
    assert (video["prompt"], video["seed"], video["draft_id"]) == ("a fox", 4, draft["id"])
    assert video["draft_ready"]
    assert shared.until_ended(video["id"])["size"] == "512x256"
    assert shared.http.delete(f"/v1/videos/{draft['id']}").json()["deleted"]
    kept = shared.http.get(f"/v1/videos/{video['id']}/content?variant=draft")
    assert kept.text == "draft of 4"
    assert shared.error("POST", "/v1/videos", json=finish)[0] == 400


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"preset": "2k"}, "other drafts than nano"),
        ({"preset": "draft"}, "ends with the draft"),
        ({"seed": 5}, "seed is the draft's"),
        ({"prompt": "a wolf"}, "prompt is the draft's"),
        ({"seconds": "9"}, "seconds are the draft's"),
        ({"draft_only": True}, "leave draft_only and n out"),
    ],
)
def test_a_draft_is_not_finished_as_another_clip(
    shared: Served, fields: dict[str, Any], told: str
) -> None:
    draft = shared.until_ended(shared.create(seed=4, draft_only=True)["id"])
    status, error = shared.error("POST", "/v1/videos", json={"draft_id": draft["id"], **fields})
    assert status == 400
    assert told in error["message"]


def test_a_failed_job_says_why(shared: Served) -> None:
    video = shared.until_ended(shared.create("fail")["id"])
    assert video["status"] == "failed"
    assert video["error"] == {"code": "bad_result", "message": "out of memory"}
    status, error = shared.error("GET", f"/v1/videos/{video['id']}/content")
    assert (status, error["code"]) == (409, "failed")


def test_content_that_is_not_there_yet_is_a_conflict(tmp_path: Path) -> None:
    with serving(tmp_path / "root") as served:
        video = served.until_running(served.create("hold")["id"])
        status, error = served.error("GET", f"/v1/videos/{video['id']}/content")
        assert (status, error["code"]) == (409, "not_ready")
        assert served.error("GET", f"/v1/videos/{video['id']}/receipt")[0] == 409
        draft = served.http.get(f"/v1/videos/{video['id']}/content?variant=draft")
        assert draft.status_code == 200
        assert (video["progress"], video["step"], video["seconds_left"]) == (50, 1, 2.0)


def test_presets_and_models_are_listed(shared: Served) -> None:
    presets = {item["id"]: item for item in shared.http.get("/v1/presets").json()["data"]}
    assert next(iter(presets)) == "nano"
    assert (presets["2k"]["size"], presets["2k"]["frames"], presets["2k"]["fits"]) == (
        *("2560x1440", 121, True),
    )
    assert (presets["4k"]["fits"], presets["4k"]["draft_fits"]) == (False, True)
    assert presets["4k"]["reason"] == "4k is too large"
    assert not presets["draft"]["has_highres"]
    assert [item["id"] for item in shared.http.get("/v1/models").json()["data"]] == ["model"]


def test_metrics_count_jobs_by_their_end(shared: Served) -> None:
    shared.until_ended(shared.create()["id"])
    text = shared.http.get("/metrics").text
    assert 'pw_jobs_ended_total{end="completed"}' in text
    assert 'pw_stage_seconds_count{stage="highres"}' in text
    assert 'pw_worker_ready{device="auto"} 1.0' in text


def test_answers_carry_the_headers_that_keep_pages_apart(shared: Served) -> None:
    headers = shared.http.get("/health").headers
    assert headers["content-security-policy"].startswith("default-src 'self'")
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers
