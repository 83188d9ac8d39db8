# SPDX-License-Identifier: Apache-2.0
"""Transformers with quantized linear layers in segments; weights on the device, or streamed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pw_engines import DTYPES
from pw_engines.eager import EagerEngine
from pw_kernels.quantized_linear import GRIDS, NumberFormat
from pw_runtime.execution.transformer import SegmentedDiT
from pw_runtime.execution.transformer_segments import segment_of_block, segments_of
from pw_runtime.execution.weight_streaming import StreamedWeights
from pw_runtime.models import WanDiT
from pw_runtime.models.quantized_linear import is_quantized, quantized_weights
from pw_runtime.types import Precision
from tests.closeness import relative_l2
from tests.engines.test_segments import CPU, HIGHRES, network, velocities, whole_velocities

FORMATS = list(GRIDS)


def quantized(exact: WanDiT, linear: NumberFormat) -> WanDiT:
    """Return the network with quantized linear layers."""
    net, stored = WanDiT(HIGHRES), exact.state_dict()
    for name, weight in exact.state_dict().items():
        if is_quantized(name, HIGHRES.num_layers, linear):
            stored |= dict(quantized_weights(name, weight, linear))
    net.prepare_quantized(linear)
    net.load_state_dict(stored, assign=True)
    return net.requires_grad_(False)


def run(net: WanDiT, precision: Precision, *, streamed: bool = False) -> list[Tensor]:
    segments = segments_of(HIGHRES, precision, 9, net.linear)
    engines = {name: EagerEngine(x.spec, x.module) for name, x in segments.items()}
    weights = StreamedWeights(net, segments, precision, CPU) if streamed else None
    try:
        runs = [velocities(SegmentedDiT(net, segments, engines, weights), [7, 3]) for _ in range(2)]
    finally:
        if weights is not None:
            weights.close()
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    return runs[0]


@pytest.mark.parametrize("linear", FORMATS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_segments_compute_what_the_network_does(linear: NumberFormat, precision: Precision) -> None:
    """Chunks change the rounding of sums, which decides some roundings to numbers of few bits."""
    net = quantized(network(HIGHRES, precision), linear)
    for got, expected in zip(run(net, precision), whole_velocities(net, [7, 3]), strict=True):
        assert relative_l2(got, expected) < 2e-2


@pytest.mark.parametrize("linear", FORMATS)
def test_streamed_weights_change_no_bit(linear: NumberFormat) -> None:
    net = quantized(network(HIGHRES, "bf16"), linear)
    resident, streamed = run(net, "bf16"), run(net, "bf16", streamed=True)
    assert all(torch.equal(*pair) for pair in zip(resident, streamed, strict=True))


@pytest.mark.parametrize("linear", FORMATS)
def test_quantized_weights_are_inputs_of_their_own_dtypes(linear: NumberFormat) -> None:
    segments = segments_of(HIGHRES, "bf16", 9, linear)
    exact = segments_of(HIGHRES, "bf16", 9)
    added = {f"{part}_{linear.replace('-', '_')}" for part in ("block_in", "block_out")}
    assert segments.keys() - exact.keys() == added
    assert all(segments[name].spec == exact[name].spec for name in exact)
    for name in added:
        inputs = {tensor.name: tensor for tensor in segments[name].spec.inputs}
        layers = [key.removesuffix(".scale") for key in inputs if key.endswith(".scale")]
        weights = [inputs[f"{layer}.weight"] for layer in layers]
        assert len(weights) == (3 if "block_in" in name else 5)
        assert {DTYPES[x.dtype] for x in weights} == {GRIDS[linear].dtype}
        # As compilers have it: numbers, two of which share a byte in fp4.
        assert {x.numbers({})[-1] for x in weights} <= {HIGHRES.dim, HIGHRES.ffn_dim}


def test_the_first_and_last_block_run_on_the_segments_of_an_exact_network() -> None:
    net = quantized(network(HIGHRES, "fp32"), "int8-weight")
    names = [segment_of_block(net, "block_out", block) for block in range(3)]
    assert names == ["block_out", "block_out_int8_weight", "block_out"]
    assert segment_of_block(net, "text_keys_values", 1) == "text_keys_values"
