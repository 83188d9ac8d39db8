# SPDX-License-Identifier: Apache-2.0
"""The label of a clip says what its options and engines make of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.pipeline import generate
from pw_runtime.planning import candidates
from pw_runtime.planning.candidates import SMALLER_CHUNK
from pw_runtime.planning.exactness import approximations, exactness
from pw_runtime.presets import find_preset
from pw_runtime.system.progress import Reporter
from pw_runtime.types import Prompt, Request, RunOptions, TransformerPlan
from tests.e2e.pw import write_preset

EAGER = {"draft": "eager", "highres": "eager", "vae": "eager"}


def options(**changes: Any) -> RunOptions:
    return RunOptions(device="cpu", **{"kernels": "reference", "conv": "onednn", **changes})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_reference_is_exact_in_both_precisions(precision) -> None:
    label = exactness(EAGER, options(precision=precision))
    assert label.text == "exact"
    assert label.approximate == label.rounding == ()


@pytest.mark.parametrize(
    ("changes", "engines", "reason"),
    [
        ({"conv": "winograd"}, {}, "--conv winograd"),
        ({"kernels": "triton"}, {}, "--kernels triton"),
        ({"attention": "cudnn"}, {}, "--attention cudnn"),
        ({"chunk": 512}, {}, "--chunk 512"),
        ({}, {"highres": "tensorrt"}, "highres on tensorrt engines"),
    ],
)
def test_the_same_mathematics_in_another_order_is_rounding(changes, engines, reason) -> None:
    label = exactness(EAGER | engines, options(**changes))
    assert label.label == "rounding"
    assert len(label.rounding) == 1
    assert reason in label.text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"linear": "int8"}, "--linear int8"),
        ({"step_cache": 0.05}, "--step-cache 0.05"),
        ({"guidance_reuse": 1}, "--guidance-reuse 1"),
        ({"vae_precision": "bf16"}, "--vae-precision bf16"),
    ],
)
def test_other_mathematics_is_approximate_and_named_with_its_parameter(changes, reason) -> None:
    label = exactness(EAGER, options(**changes, kernels="triton"))
    assert label.label == "approximate"
    assert reason in label.text
    assert label.rounding == ("operations (--kernels triton)",)
    assert label.approximate == approximations(options(**changes))


def test_another_run_that_decodes_adds_what_it_does() -> None:
    made, decoded = options(step_cache=0.1), options(step_cache=0.1, kernels="triton")
    label = exactness(EAGER, made, decoded)
    assert len(label.approximate) == 1
    assert label.rounding == ("operations (--kernels triton)",)


def test_a_clip_at_the_smaller_chunk_of_the_planner_is_rounding(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: "exact", as only the chunk that was asked for counted."""
    usual = candidates.variants

    def smaller(*arguments: Any) -> list[TransformerPlan]:
        return [replace(plan, chunk=SMALLER_CHUNK) for plan in usual(*arguments)]

    request = Request(
        prompts=(Prompt("a red ball", "0", 1),),
        preset=find_preset(str(write_preset(tmp_path / "small.toml"))),
        out=tmp_path / "out",
        options=options(policy="eager"),
    )
    monkeypatch.setattr(candidates, "variants", smaller)
    generate(request, open_bundle(bundle_dir), Reporter(quiet=True))
    label = json.loads((tmp_path / "out" / "0.json").read_text(encoding="utf-8"))["exactness"]
    assert label["label"] == "rounding"
    assert label["rounding"] == [f"parts of the tokens (--chunk {SMALLER_CHUNK})"]
