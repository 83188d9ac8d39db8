# SPDX-License-Identifier: Apache-2.0
"""--json prints exactly one document on stdout, with the keys of docs/json.md, however it ends."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pw_runtime import pipeline
from pw_runtime.cli.generate import NO_CLIPS
from pw_runtime.errors import BadResult
from tests.e2e.pw import Ended, Pw

DOCUMENTED = (Path(__file__).parents[2] / "docs" / "json.md").read_text(encoding="utf-8")


@pytest.fixture
def generate(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> Callable[..., tuple[Ended, dict[str, Any]]]:
    def run(*arguments: object) -> tuple[Ended, dict[str, Any]]:
        ended = pw(
            "generate", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "out",
            "--draft-only", "--device", "cpu", "--negative", "blur", "--json", *arguments,
        )  # fmt: skip
        return ended, document_of(ended)

    return run


def document_of(ended: Ended) -> dict[str, Any]:
    """Return the document that is all of stdout, and check its keys against the docs."""
    assert ended.out.isascii()
    document = json.loads(ended.out)
    assert next(iter(document.items())) == ("format", 1)
    named = set(re.findall(r"`(\w+)`", DOCUMENTED)) | {"format"}
    assert document.keys() <= named
    return dict(document)


def test_the_summary_of_a_run_names_clips_seeds_times_and_labels(
    generate: Callable[..., tuple[Ended, dict[str, Any]]], tmp_path: Path
) -> None:
    ended, document = generate("--prompt", "a cat", "--prompt", "ein Bär", "--seed", 5)
    assert ended.code == 0
    assert (document["finished"], document["failed"], document["error"]) == (2, 0, None)
    assert document["seed"] == 5
    first, second = document["clips"]
    assert first["video"] == str(tmp_path / "out" / "0.mp4")
    assert Path(second["receipt"]).exists()
    assert second["prompt"] == "ein Bär"
    assert first["seeds"]["base"] == 5
    assert first["exactness"]["label"] in ("exact", "rounding")
    assert first["seconds"]["draft"] > 0
    assert document["seconds"] > first["seconds"]["draft"]
    assert "finished: " in ended.err


def test_checking_and_repeating_a_clip_have_documents_of_their_own(
    generate: Callable[..., tuple[Ended, dict[str, Any]]],
    pw: Pw,
    bundle_dir: Path,
    tmp_path: Path,
) -> None:
    generate("--prompt", "ein Bär")
    checked = document_of(pw("verify", tmp_path / "out", "--json"))
    assert (len(checked["checked"]), checked["faulty"]) == (1, 0)
    receipt = tmp_path / "out" / "0.json"
    again = document_of(pw("repro", receipt, "--model", bundle_dir, "--json"))
    assert (again["reproduced"], again["explained_by"]) == (True, [])


def test_a_run_in_which_a_clip_fails_names_its_error(
    generate: Callable[..., tuple[Ended, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = pipeline.decode_clip

    def failing(vae: Any, run: Any, clip: Any, step: Any) -> None:
        if clip.prompt.id == "0":
            raise BadResult("nothing to see")
        decode(vae, run, clip, step)

    monkeypatch.setattr(pipeline, "decode_clip", failing)
    ended, document = generate("--prompt", "a cat", "--prompt", "a dog")
    assert ended.code == 3
    assert (document["finished"], document["failed"], document["error"]) == (1, 1, None)
    assert document["clips"][0]["error"] == "nothing to see"
    assert document["clips"][0]["video"] is None
    assert document["clips"][1]["error"] is None


def test_an_interrupted_run_still_names_what_is_finished(
    generate: Callable[..., tuple[Ended, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = pipeline.decode_clip

    def interrupted(vae: Any, run: Any, clip: Any, step: Any) -> None:
        if clip.prompt.id == "1":
            raise KeyboardInterrupt
        decode(vae, run, clip, step)

    monkeypatch.setattr(pipeline, "decode_clip", interrupted)
    ended, document = generate("--prompt", "a cat", "--prompt", "a dog")
    assert ended.code == 130
    assert (document["finished"], document["error"]) == (1, "interrupted")
    assert [clip["video"] is None for clip in document["clips"]] == [False, True]


def test_an_interrupted_run_still_names_what_has_failed_before(
    generate: Callable[..., tuple[Ended, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(vae: Any, run: Any, clip: Any, step: Any) -> None:
        raise BadResult("nothing to see") if clip.prompt.id == "0" else KeyboardInterrupt

    monkeypatch.setattr(pipeline, "decode_clip", failing)
    ended, document = generate("--prompt", "a cat", "--prompt", "a dog")
    assert ended.code == 130
    assert (document["finished"], document["failed"]) == (0, 1)
    assert [clip["error"] for clip in document["clips"]] == ["nothing to see", None]


def test_what_is_refused_once_the_model_is_open_has_no_clips_either(
    generate: Callable[..., tuple[Ended, dict[str, Any]]],
) -> None:
    assert generate("--prompt", "a cat")[0].code == 0
    ended, document = generate("--prompt", "a dog")
    assert ended.code == 2
    assert "an earlier run" in document["error"]
    assert document["clips"] == []


def test_a_refused_request_is_a_document_with_its_error_and_no_clips(
    generate: Callable[..., tuple[Ended, dict[str, Any]]],
) -> None:
    ended, document = generate("--prompt", "")
    assert ended.code == 2
    assert document.keys() == {"format", *NO_CLIPS}
    assert "--prompt is empty" in document["error"]
    assert document["clips"] == []
    assert "--prompt is empty" in ended.err


def test_refused_devices_are_a_document_too(
    generate: Callable[..., tuple[Ended, dict[str, Any]]],
) -> None:
    ended, document = generate("--prompt", "a fox", "--devices", "0,1")
    assert ended.code == 2
    assert document.keys() == {"format", *NO_CLIPS}
    assert "--devices says already which devices" in document["error"]


def test_the_doctor_names_every_package_and_what_is_ready(pw: Pw) -> None:
    ended = pw("doctor", "--json")
    assert ended.code == 0
    document = document_of(ended)
    assert document["ready"] in ("cpu", "cuda")
    packages = {package["name"]: package for package in document["packages"]}
    assert packages["torch"]["state"] == "ok"
    assert packages["torch"]["fix"] is None
    missing = [package for package in packages.values() if package["state"] != "ok"]
    assert all(package["fix"].startswith("pip install ") for package in missing)
    assert document["cache"]["folder"]
    refused = pw("doctor", "--json", "--kernels")
    assert refused.code == 2
    assert refused.out == ""


@pytest.mark.parametrize("more", [(), ("--verbose",), ("--devices", "2x24GiB", "--gpu", "H200")])
def test_a_plan_is_the_numbers_of_its_report(pw: Pw, more: tuple[str, ...]) -> None:
    memory = () if "--devices" in more else ("--gpu-memory", "24GiB")
    words = ("plan", "--preset", "2k", "--host-memory", "256GiB", *memory, *more)
    report, ended = pw(*words), pw(*words, "--json")
    assert (report.code, ended.code) == (0, 0), ended.err
    document = document_of(ended)
    stages = document["stages"]
    assert document["clip"] == {"width": 2560, "height": 1440, "frames": 121, "fps": 24}
    assert [stage["stage"] for stage in stages] == ["text", "draft", "highres", "decode"]
    assert all(len(stage["device"]) == document["ranks"] for stage in stages)
    assert all(decision in report.out for decision in document["decisions"])
    assert all(("items" in stage) == ("--verbose" in more) for stage in stages)
    if "--gpu" in more:
        assert document["seconds"] == pytest.approx(sum(s["seconds"] or 0 for s in stages))
        assert "H200" in document["times_from"]


@pytest.mark.parametrize("verb", ["list", "verify"])
def test_the_store_of_engines_is_listed(
    pw: Pw, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PW_CACHE", str(tmp_path))
    folder = tmp_path / "engines" / "draft_block-1234"
    folder.mkdir(parents=True)
    document = document_of(ended := pw("engines", verb, "--json"))
    assert document["folder"] == str(tmp_path / "engines")
    assert document["verified"] == (verb == "verify")
    (engine,) = document["engines"]
    assert engine["folder"] == folder.name
    assert engine["damage"]
    assert ended.code == 3
