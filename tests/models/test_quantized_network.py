# SPDX-License-Identifier: Apache-2.0
"""Networks with quantized linear layers: which layers, how they are loaded, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pw_kernels.quantized_linear import GRIDS, NumberFormat, dequantized
from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.checkpoint.loader import load_dit
from pw_runtime.errors import BadRequest, BadWeights
from pw_runtime.models import WanDiT
from pw_runtime.models.finite import require_finite_weights
from pw_runtime.models.precision import store_dit_weight
from pw_runtime.models.quantized_linear import (
    QUANTIZED,
    QuantizedLinear,
    approximation,
    is_quantized,
    quantized_weights,
    require_quantizable,
)
from tests.networks import TINY_DRAFT

CPU = torch.device("cpu")
FORMATS = list(GRIDS)


def layers_of(net: WanDiT, kind: type[nn.Module]) -> set[str]:
    return {name for name, module in net.named_modules() if isinstance(module, kind)}


@pytest.mark.parametrize("linear", FORMATS)
def test_all_but_the_first_and_last_block_are_quantized(
    bundle_dir: Path, linear: NumberFormat
) -> None:
    """The text, embeddings, modulation and head stay as they are, too."""
    bundle = open_bundle(bundle_dir)
    exact = load_dit(bundle, "highres", "fp32", CPU)
    net = load_dit(bundle, "highres", "fp32", CPU, linear=linear)
    count = net.config.num_layers
    expected = {f"blocks.{block}.{name}" for block in range(1, count - 1) for name in QUANTIZED}
    assert layers_of(net, QuantizedLinear) == expected
    assert layers_of(net, nn.Linear) == layers_of(exact, nn.Linear) - expected
    stored = exact.state_dict()
    for name, weight in net.state_dict().items():
        layer = name.rpartition(".")[0]
        if layer not in expected or name.endswith(".bias"):
            assert torch.equal(weight, stored[name]), name
    require_finite_weights(net)
    assert net.linear == linear
    assert exact.linear == "exact"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("linear", FORMATS)
def test_weights_are_made_of_what_the_bundle_has(
    bundle_dir: Path, linear: NumberFormat, precision: str
) -> None:
    """Not of weights that were rounded to bf16 before."""
    bundle = open_bundle(bundle_dir)
    exact = load_dit(bundle, "draft", "fp32", CPU).blocks[1].get_submodule("ffn.2")
    net = load_dit(bundle, "draft", precision, CPU, linear=linear)  # type: ignore[arg-type]
    layer = net.blocks[1].get_submodule("ffn.2")
    assert isinstance(layer, QuantizedLinear)
    assert layer.scale.dtype == torch.float32
    got = dequantized(layer.weight, layer.block_scale, linear, torch.float32) * layer.scale[:, None]
    largest = exact.weight.abs().amax(-1, keepdim=True)
    least = 0.17 if linear == "nvfp4" else 0.04
    assert (got - exact.weight).abs().le(least * largest).all()
    assert torch.equal(got.abs().amax(-1), got.abs().amax(-1).clamp(max=1.01 * largest[:, 0]))


def test_parts_of_quantized_weights_keep_their_dtype() -> None:
    for linear in FORMATS:
        for name, x in quantized_weights("blocks.1.ffn.0.weight", torch.randn(32, 64), linear):
            assert store_dit_weight(name, x, "bf16") is x


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_weights_that_cannot_be_quantized_name_the_channel(bad: float) -> None:
    weight = torch.ones(4, 16)
    weight[2, 3] = bad
    parts = quantized_weights("blocks.1.ffn.0.weight", weight * 2, "fp8")
    with pytest.raises(BadWeights, match=r"blocks.1.ffn.0.weight cannot be quantized") as caught:
        list(parts)
    assert "output channel 2" in str(caught.value)


def test_only_weights_of_large_layers_are_quantized() -> None:
    for name in ("blocks.1.self_attn.q.weight", "blocks.2.ffn.2.weight"):
        assert is_quantized(name, 4, "int8")
        assert not is_quantized(name, 4, "exact")
    for name in (
        "blocks.0.self_attn.q.weight",
        "blocks.3.ffn.0.weight",
        "blocks.1.self_attn.q.bias",
        "blocks.1.cross_attn.k.weight",
        "blocks.1.self_attn.norm_q.weight",
        "blocks.1.modulation",
        "text_embedding.0.weight",
    ):
        assert not is_quantized(name, 4, "int8"), name


def test_networks_that_have_nothing_to_quantize_are_refused() -> None:
    require_quantizable(TINY_DRAFT, "nvfp4")
    require_quantizable(replace(TINY_DRAFT, num_layers=2), "exact")
    with pytest.raises(BadRequest, match="would quantize nothing"):
        require_quantizable(replace(TINY_DRAFT, num_layers=2), "int8")
    odd = replace(TINY_DRAFT, ffn_dim=328)
    require_quantizable(odd, "int8")
    with pytest.raises(BadRequest, match=r"width 128, feed-forward 328"):
        require_quantizable(odd, "nvfp4")


def test_what_is_approximate_is_said() -> None:
    said = approximation(30, "int8")
    assert said == "approximate: int8 linear layers in 28 of 30 blocks, not in the first and last"
