# SPDX-License-Identifier: Apache-2.0
"""The label of a clip says what its options and engines make of it."""

from __future__ import annotations

from typing import Any

import pytest

from pw_runtime.planning.exactness import approximations, exactness
from pw_runtime.types import RunOptions

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
