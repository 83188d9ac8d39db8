# SPDX-License-Identifier: Apache-2.0
"""`pw bench linear-error`: what its figures are made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pw_bench.quality import linear_error
from pw_bench.quality.linear_error import _block_differences, _wide_block, quantize
from pw_export import wan22_configs
from pw_kernels.quantized_linear import GRIDS
from pw_runtime.models.quantized_linear import QUANTIZED, QuantizedLinear
from tests.e2e.pw import write_preset
from tests.networks import TINY_DRAFT


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_error, "DRAFT", replace(wan22_configs.DRAFT, **WIDTHS))


WIDTHS = {name: getattr(TINY_DRAFT, name) for name in ("dim", "ffn_dim", "num_heads")}


def test_every_layer_and_the_block_are_compared_on_what_they_get(small: None) -> None:
    block, call = _wide_block(12)
    with torch.inference_mode():
        differences = {x.side: x.relative_l2 for x in _block_differences("tiny", block, call)}
    names = (*QUANTIZED, "block")
    assert list(differences) == [f"{linear}, tiny, {name}" for linear in GRIDS for name in names]
    errors = {
        linear: [differences[f"{linear}, tiny, {name}"] or 0.0 for name in names]
        for linear in GRIDS
    }
    assert all(0 < error < 0.3 for group in errors.values() for error in group)
    for less, more in zip(errors["int8-weight"], errors["nvfp4"], strict=True):
        assert less < more


def test_a_quantized_block_leaves_the_exact_one_alone(small: None) -> None:
    block, call = _wide_block(8)
    with torch.inference_mode():
        before: Tensor = call(block)
        quantized = quantize(block, "int8")
        assert isinstance(quantized.get_submodule("ffn.2"), QuantizedLinear)
        assert torch.equal(call(block), before)
        assert not torch.equal(call(quantized), before)


@pytest.mark.slow
def test_the_file_has_what_the_clips_ran_on(small: None, bundle_dir: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path / "small.toml")
    result = linear_error.measure_linear_error(
        bundle_dir, str(preset), clips=1, tokens=4, say=lambda line: None
    )
    assert result.identity.engines["vae"] == "eager"
    assert result.identity.operations["attention"] == "reference"
    assert len(result.equivalence) == len(GRIDS)
