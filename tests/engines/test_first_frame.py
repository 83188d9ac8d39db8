# SPDX-License-Identifier: Apache-2.0
"""Two timesteps in a clip on unchanged engines, against the network with a row per latent frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pw_engines.eager import EagerEngine
from pw_runtime.execution.transformer import SegmentedDiT
from pw_runtime.execution.transformer_segments import segments_of
from pw_runtime.models import WanDiT, expected_shapes
from pw_runtime.models.embeddings import sinusoid
from pw_runtime.types import DitConfig, Precision
from tests.closeness import max_abs, relative_l2
from tests.engines.test_segments import (
    DRAFT,
    HIGHRES,
    LATENT,
    TOKENS,
    WholeChunks,
    network,
    normal,
    segmented,
    texts_of,
)
from tests.models.test_dit_golden import FP32_TOLERANCE
from tests.networks import TINY_DRAFT
from tests.oracle import golden

BORDER = 12  # tokens of the first latent frame, of 24
T, DT = torch.tensor([0.0, 700.0]), torch.tensor([100.0, 100.0])
ALIGNED = 8


class AlignedCalls(EagerEngine):
    """An engine whose token buffers must begin at multiples of some rows."""

    granularity = ALIGNED

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        tensors = zip((*self.spec.inputs, *self.spec.outputs), (*inputs, *outputs), strict=True)
        for tensor, x in tensors:
            if tensor.shape[0] == "tokens":
                assert x.storage_offset() % (ALIGNED * x[0].numel()) == 0
        super().run(inputs, outputs)


def expected_velocity(net: WanDiT, length: int) -> Tensor:
    """Run the network itself, with a row of the modulation for each latent frame."""
    latent, (text,) = normal(*LATENT), texts_of(net, [length])
    frames = (T, DT) if net.config.has_dt else (T,)
    control = ()
    if net.config.has_dt:
        now = (sinusoid(x[1:], net.config.freq_dim) for x in frames)
        control = (net.control(net.draft_features(normal(48, 2, 3, 4)), *now),)
    with torch.inference_mode():
        return net(latent, text, net.modulation(*frames), net.positions(latent), *control)


def velocity(net: SegmentedDiT, length: int) -> Tensor:
    latent, more = normal(*LATENT), []
    frames = (T, DT) if net.net.config.has_dt else (T,)
    with torch.inference_mode():
        if net.net.config.has_dt:
            features = net.control_features(normal(48, 2, 3, 4))
            more.append(net.control_inputs(features, T[1:], DT[1:]))
        rows, layout = net.modulation(*frames), net.layout(latent, clean=1)
        return net.velocities(latent, texts_of(net, [length]), rows, layout, *more)[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [DRAFT, HIGHRES], ids=["draft", "highres"])
@pytest.mark.parametrize("kind", [EagerEngine, WholeChunks, AlignedCalls])
@pytest.mark.parametrize("limit", [5, 9, 12, 24])
def test_equals_a_row_for_each_latent_frame(
    config: DitConfig, precision: Precision, kind: type[EagerEngine], limit: int
) -> None:
    net = network(config, precision)
    got = velocity(segmented(net, precision, limit, kind), 7)
    expected = expected_velocity(net, 7)
    if precision == "fp32":  # products of fewer rows may be summed in another order
        assert max_abs(got, expected) <= 1e-5 * expected.abs().max().item()
    else:
        assert relative_l2(got, expected) <= 1e-2


def test_an_engine_of_attention_sees_all_tokens_of_both_timesteps() -> None:
    net = network(DRAFT, "fp32")
    apart = velocity(segmented(net, "fp32", 9), 7)
    on_engine = velocity(segmented(net, "fp32", 9, blocks="attention"), 7)
    assert torch.equal(on_engine, apart)


def test_equals_the_official_network_with_a_timestep_per_token() -> None:
    inputs, outputs = golden.load("dit_tiny_inputs"), golden.load("dit_tiny_outputs")
    weights = golden.load("dit_tiny_weights")
    with torch.device("meta"):
        net = WanDiT(TINY_DRAFT)
    net.load_state_dict({n: weights[n] for n in expected_shapes("draft", TINY_DRAFT)}, assign=True)
    segments = segments_of(TINY_DRAFT, "fp32", 64)
    engines = {name: EagerEngine(part.spec, part.module) for name, part in segments.items()}
    on_engines = SegmentedDiT(net.requires_grad_(False), segments, engines)
    x, t = inputs["x"], torch.cat((torch.zeros(1), inputs["t_uniform"].float()))
    with torch.inference_mode():
        text = [on_engines.text_keys_values(inputs["ctx_a"])]
        rows, layout = on_engines.modulation(t), on_engines.layout(x, clean=1)
        (v,) = on_engines.velocities(x, text, rows, layout)
    assert max_abs(v, outputs["ti2v_firstframe0_fp32_a"]) <= FP32_TOLERANCE


@pytest.mark.parametrize("kind", [EagerEngine, WholeChunks, AlignedCalls])
@pytest.mark.parametrize("limit", [5, 9, 24])
def test_every_token_is_in_one_call_with_the_row_of_its_frame(
    kind: type[EagerEngine], limit: int
) -> None:
    layout = segmented(network(DRAFT, "fp32"), "fp32", limit, kind).layout(normal(*LATENT), clean=1)
    taken = [
        (token, part.row)
        for part in layout.slices
        for token in range(part.rows.start, part.rows.stop)
    ]
    assert taken == [(token, int(token >= BORDER)) for token in range(TOKENS)]
    assert layout.padded == TOKENS
    assert all(int(part.origin[0]) == part.rows.start for part in layout.slices)


def test_the_engines_are_those_of_every_other_clip() -> None:
    """A clip from a picture needs none of its own: none has a limit or a shape for two rows."""
    spec = segments_of(replace(DRAFT, num_layers=1), "fp32", 8)["block_in"].spec
    rows = next(tensor for tensor in spec.inputs if tensor.name == "rows")
    assert rows.shape == (1, 6, DRAFT.dim)


def test_whole_blocks_take_one_timestep() -> None:
    net = segmented(network(DRAFT, "fp32"), "fp32", TOKENS, blocks="whole")
    with pytest.raises(ValueError, match="all tokens with one timestep"):
        net.layout(normal(*LATENT), clean=1)


def test_rows_of_the_modulation_must_be_those_of_the_layout() -> None:
    net, latent = segmented(network(DRAFT, "fp32"), "fp32", 9), normal(*LATENT)
    text = texts_of(net, [3])
    with pytest.raises(ValueError, match="for 2 modulation rows, got 1"):
        net.velocities(latent, text, net.modulation(T[1:]), net.layout(latent, clean=1))
    with pytest.raises(ValueError, match="for 1 modulation rows, got 2"):
        net.velocities(latent, text, net.modulation(T), net.layout(latent))
