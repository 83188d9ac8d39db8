# SPDX-License-Identifier: Apache-2.0
"""`--step-cache` and `--fast` as a user runs them: what is told, kept, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pw_runtime.planning.fast import FAST
from tests.e2e.pw import Pw, write_preset


@pytest.fixture
def many_steps(tmp_path: Path) -> Path:
    return write_preset(tmp_path / "many.toml", draft_steps=10)


def receipt_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "0.json").read_text(encoding="utf-8"))
    return content


def test_a_cached_clip_says_so_everywhere(
    pw: Pw, bundle_dir: Path, many_steps: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("generate", "--model", bundle_dir, "--preset", many_steps, "--prompt", "a red ball")
    command += ("--conv", "onednn", "--policy", "eager", "--out", out)
    ended = pw(*command, "--step-cache", 0.9, "--save-latents")
    assert ended.code == 0, ended.err
    assert "approximate: some steps of the draft extrapolated (--step-cache 0.9)" in ended.err
    receipt = receipt_of(out)
    assert receipt["exactness"] == {
        "label": "approximate",
        "approximate": ["some steps of the draft extrapolated (--step-cache 0.9)"],
        "rounding": [],
    }
    assert receipt["notices"][-1].endswith("of 10 steps extrapolated, --step-cache 0.9")
    assert receipt["fallbacks"] == []

    # A clip of another threshold is another clip; the same one is finished.
    other = pw(*command, "--step-cache", 0.1)
    assert other.code == 2
    assert "options.step_cache is 0.9, wanted 0.1" in other.err
    assert pw(*command, "--step-cache", 0.9).code == 0

    # One that is finished from its latents stays what it is.
    decoded = pw("decode", out / "0.latents.safetensors", "--model", bundle_dir, "--overwrite")
    assert decoded.code == 0, decoded.err
    again = receipt_of(out)
    assert again["exactness"] == receipt["exactness"]
    assert again["notices"] == receipt["notices"]

    exact = tmp_path / "exact"
    assert pw(*command[:-1], exact).code == 0
    assert receipt_of(exact)["exactness"]["label"] == "exact"
    compared = pw("compare", out / "0.mp4", exact / "0.mp4")
    assert "A: approximate: some steps of the draft extrapolated" in compared.out
    assert "B: exact" in compared.out


def test_compare_says_where_a_receipt_is_silent(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("generate", "--model", bundle_dir, "--preset", preset, "--prompt", "a", "--out", out)
    assert pw(*command, "--draft-only").code == 0
    path, receipt = out / "0.json", receipt_of(out)
    del receipt["exactness"]
    path.write_text(json.dumps(receipt), encoding="utf-8")
    assert "A: no label" in pw("compare", out / "0.mp4", out / "0.mp4").out
    for nonsense in (7, {"label": 3}, {"label": "exact", "approximate": [4]}):
        path.write_text(json.dumps(receipt | {"exactness": nonsense}), encoding="utf-8")
        ended = pw("compare", out / "0.mp4", out / "0.mp4")
        assert ended.code == 2
        assert "exactness" in ended.err


def test_fast_is_expanded_into_single_options(
    pw: Pw, bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = write_preset(tmp_path / "many.toml", draft_steps=10, highres_steps=4)
    command = ("generate", "--model", bundle_dir, "--preset", preset, "--prompt", "a ball")
    command += ("--fast", "--device", "cpu")

    def made(name: str, *more: object) -> dict[str, Any]:
        ended = pw(*command, "--out", tmp_path / name, *more)
        assert ended.code == 0, ended.err
        options: dict[str, Any] = receipt_of(tmp_path / name)["options"]
        return {key: options[key] for key in FAST}

    monkeypatch.setattr("pw_runtime.planning.fast.has_integer_products", lambda: False)
    plain = {"linear": "exact", "step_cache": 0.1, "guidance_reuse": 1}
    assert made("plain") == plain
    draft_alone = made("draft", "--draft-only", "--step-cache", 0.3)
    assert draft_alone == {"linear": "exact", "step_cache": 0.3, "guidance_reuse": 0}
    # On a CPU with integer products int8 is part of it, unless an option says otherwise.
    monkeypatch.setattr("pw_runtime.planning.fast.has_integer_products", lambda: True)
    assert made("vnni") == plain | {"linear": "int8"}
    given = made("explicit", "--linear", "exact", "--guidance-reuse", 0)
    assert given == plain | {"guidance_reuse": 0}


@pytest.mark.parametrize("flag", [("--fast",), ("--step-cache", "0.1"), ("--guidance-reuse", "1")])
def test_official_quirks_exclude_it(pw: Pw, bundle_dir: Path, tmp_path: Path, flag) -> None:
    preset = write_preset(
        tmp_path / "quirks.toml", draft_steps=10, highres_steps=4, truncating="true"
    )
    command = ("generate", "--model", bundle_dir, "--prompt", "a ball", "--preset", preset)
    ended = pw(*command, "--out", tmp_path / "out", *flag)
    assert ended.code == 2
    assert f"{' '.join(flag)} approximates, and the preset repeats the official" in ended.err
    assert "compat.truncating_uint8" in ended.err
    assert not (tmp_path / "out").exists()


def test_what_would_do_nothing_is_refused(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pw_runtime.planning.fast.has_integer_products", lambda: False)
    command = ("generate", "--model", bundle_dir, "--preset", preset, "--prompt", "a ball")
    command += ("--device", "cpu", "--out", tmp_path / "out")
    ended = pw(*command, "--step-cache", 0.1)
    assert ended.code == 2
    assert "--step-cache needs a draft of many small steps" in ended.err
    ended = pw(*command, "--fast")
    assert ended.code == 2
    assert "--fast has nothing to approximate here" in ended.err


def test_the_plan_says_what_is_approximate_and_refuses_alike(pw: Pw) -> None:
    command = ("plan", "--preset", "2k", "--gpu-memory", "80GiB", "--host-memory", "64GiB")
    planned = pw(*command, "--step-cache", 0.1, "--vae-precision", "bf16")
    assert planned.code == 0
    assert "approximate: some steps of the draft extrapolated (--step-cache 0.1)" in planned.out
    assert "approximate: decoder (--vae-precision bf16)" in planned.out
    assert "approximate" not in pw(*command).out
    reused = pw(*command, "--guidance-reuse", 2)
    assert "approximate: no negative pass in 2 of the high-res steps" in reused.out
    assert pw(*command, "--guidance-reuse", 3).code == 2
    refused = pw(*command, "--step-cache", "nan")
    assert refused.code == 2
    assert "got: nan" in refused.err
