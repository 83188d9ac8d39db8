# SPDX-License-Identifier: Apache-2.0
"""`--linear`: clips with quantized linear layers, and what says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.closeness import relative_l2
from tests.e2e.pw import DEFAULTS, PRESET, Pw


@pytest.mark.slow
def test_a_quantized_clip_is_near_the_exact_one_and_says_what_it_is(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    latents = {}
    for linear in ("exact", "int8"):
        out = tmp_path / linear
        command = ("generate", "--model", bundle_dir, "--preset", preset, "--prompt", "a red ball")
        options = ("--linear", linear, "--save-latents", "--policy", "eager")
        ended = pw(*command, "--out", out, *options)
        assert ended.code == 0
        assert ("approximate: int8" in ended.out + ended.err) == (linear == "int8")
        receipt = json.loads((out / "0.json").read_text(encoding="utf-8"))
        assert receipt["options"]["linear"] == linear
        said = receipt["engines"]["highres"].get("linear")
        assert said == (
            "approximate: int8 linear layers in 1 of 3 blocks, not in the first and last"
            if linear == "int8"
            else None
        )
        latents[linear] = load_file(out / "0.latents.safetensors")["highres_latent"]
    assert 0 < relative_l2(latents["int8"], latents["exact"]) < 0.2

    # A clip of another format is another clip.
    again = pw(*command, "--out", tmp_path / "exact", "--linear", "int8")
    assert again.code == 2
    assert 'options.linear is "exact", wanted "int8"' in again.err
    same = pw(*command, "--out", tmp_path / "exact", "--policy", "eager")
    assert same.code == 0
    assert "skipped" in same.out + same.err

    # A receipt of before there was a choice is that of an exact clip.
    path = tmp_path / "exact" / "0.json"
    receipt = json.loads(path.read_text(encoding="utf-8"))
    del receipt["options"]["linear"]
    path.write_text(json.dumps(receipt), encoding="utf-8")
    older = pw(*command, "--out", tmp_path / "exact", "--policy", "eager")
    assert older.code == 0


def test_official_quirks_and_approximations_exclude_each_other(
    pw: Pw, bundle_dir: Path, tmp_path: Path
) -> None:
    preset = tmp_path / "quirks.toml"
    preset.write_text(PRESET.format(**DEFAULTS | {"truncating": "true"}), encoding="utf-8")
    command = ("generate", "--model", bundle_dir, "--prompt", "a ball", "--linear", "int8")
    ended = pw(*command, "--preset", preset, "--out", tmp_path / "out")
    assert ended.code == 2
    assert "--linear int8 approximates" in ended.err
    assert "compat.truncating_uint8" in ended.err


def test_engines_with_attention_inside_are_not_quantized_yet(pw: Pw) -> None:
    ended = pw("plan", "--preset", "2k", "--gpu-memory", "80GiB", "--host-memory", "64GiB",
               "--linear", "int8", "--blocks", "attention")  # fmt: skip
    assert ended.code == 2
    assert "--blocks attention has no engines with quantized linear layers yet" in ended.err


def test_the_plan_counts_quantized_weights(pw: Pw) -> None:
    def peak(linear: str) -> float:
        command = ("plan", "--preset", "2k", "--gpu-memory", "80GiB", "--host-memory", "64GiB")
        ended = pw(*command, "--linear", linear)
        assert ended.code == 0
        assert ("approximate" in ended.out) == (linear != "exact")
        row = next(line for line in ended.out.splitlines() if line.startswith("highres "))
        return float(row.split()[1])

    # 28 of 30 blocks: 4.4 billion weights of 2 bytes, or 1, or half of one.
    exact, int8, nvfp4 = (peak(linear) for linear in ("exact", "int8", "nvfp4"))
    assert exact - int8 > 3.5
    assert int8 - nvfp4 > 1.2


def test_weights_are_streamed_quantized_or_refused(pw: Pw) -> None:
    """They are not in the bundle's files, so host memory must hold them."""
    command = ("plan", "--preset", "2k", "--gpu-memory", "11GiB", "--linear", "int8")
    streamed = pw(*command, "--host-memory", "128GiB")
    assert streamed.code == 0
    assert "weights streamed from host memory" in streamed.out
    assert "bundle's files" not in streamed.out
