# SPDX-License-Identifier: Apache-2.0
"""The closed forms of what a stage takes, against a count of every tensor that it makes."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from pw_export import wan22_configs
from pw_runtime.models.text_encoder import TextEncoder, encode_tokens
from pw_runtime.planning.transformer_memory import stage_memory, text_memory, weight_bytes
from pw_runtime.presets import CLIP, DRAFT, FOUR_K, TWO_K
from pw_runtime.types import (
    Blocks,
    DitConfig,
    LinearFormat,
    Precision,
    StageConfig,
    TextEncoderConfig,
    TransformerPlan,
    VideoConfig,
)
from tests.planning.accounts import TEXT_TOKENS, counted, stage_peak
from tests.planning.test_engine_decode import Nothing

# Two blocks of full width: memory of the others is of the same kind, and counted by name.
DRAFT_5B = replace(wan22_configs.DRAFT, num_layers=2)
HIGHRES_5B = replace(wan22_configs.HIGHRES, num_layers=2)
SMALL = replace(
    HIGHRES_5B, dim=256, ffn_dim=768, num_heads=4, num_layers=3, text_dim=64, adapter_dim=32
)
SMALL_CLIP = (replace(TWO_K, width=640, height=384), VideoConfig(frames=17))
WITHIN = 0.05


def predicted(
    config: DitConfig,
    stage: StageConfig,
    video: VideoConfig,
    precision: Precision,
    plan: TransformerPlan,
    linear: LinearFormat = "exact",
) -> int:
    items = stage_memory(
        config, stage, video, precision, plan, text_tokens=TEXT_TOKENS, linear=linear
    )
    return sum(item.bytes for item in items)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "share"), [(TWO_K, False), (FOUR_K, True)], ids=["2k", "4k, shared"]
)
def test_high_res_of_full_width(stage: StageConfig, share: bool) -> None:
    plan = TransformerPlan(share_attention=share)
    peak = stage_peak(HIGHRES_5B, stage, CLIP, "bf16", plan)
    assert predicted(HIGHRES_5B, stage, CLIP, "bf16", plan) == pytest.approx(peak, rel=WITHIN)


@pytest.mark.parametrize("part", [8192, 1024])
def test_draft_of_full_width(part: int) -> None:
    plan = TransformerPlan(chunk=part)
    peak = stage_peak(DRAFT_5B, DRAFT, CLIP, "bf16", plan)
    assert predicted(DRAFT_5B, DRAFT, CLIP, "bf16", plan) == pytest.approx(peak, rel=WITHIN)


@pytest.mark.parametrize("fake", [False, True], ids=["really run", "fake"])
@pytest.mark.parametrize(
    "plan", [TransformerPlan(), TransformerPlan(share_attention=False, chunk=256)]
)
def test_a_small_network(plan: TransformerPlan, fake: bool) -> None:
    precision: Precision = "bf16" if fake else "fp32"  # bf16 takes minutes on a CPU
    peak = stage_peak(SMALL, *SMALL_CLIP, precision, plan, fake=fake)
    assert predicted(SMALL, *SMALL_CLIP, precision, plan) == pytest.approx(peak, rel=WITHIN)


@pytest.mark.parametrize("keep", [0.25, 0.75])
def test_sparse_attention(keep: float) -> None:
    plan = TransformerPlan(chunk=128)
    peak = stage_peak(SMALL, *SMALL_CLIP, "fp32", plan, fake=False, keep=keep)
    items = stage_memory(SMALL, *SMALL_CLIP, "fp32", plan, text_tokens=TEXT_TOKENS, keep=keep)
    assert sum(item.bytes for item in items) == pytest.approx(peak, rel=WITHIN)


class AnySize(Nothing):
    """An engine that computes nothing, for any number of tokens up to its limit."""

    padded = False


class AlignedSize(AnySize):
    """An engine like that of TensorRT for RTX."""

    granularity = 128


@pytest.mark.parametrize("chunk", [8192, 100])
def test_a_first_frame_that_is_known(chunk: int) -> None:
    plan = TransformerPlan(chunk=chunk)
    peak = stage_peak(SMALL, *SMALL_CLIP, "fp32", plan, fake=False, clean=True)
    items = stage_memory(SMALL, *SMALL_CLIP, "fp32", plan, text_tokens=TEXT_TOKENS, clean=True)
    assert sum(item.bytes for item in items) == pytest.approx(peak, rel=WITHIN)


def test_a_first_frame_that_is_known_on_engines_that_take_copies() -> None:
    plan, (stage, video) = TransformerPlan(), (TWO_K, VideoConfig(frames=17))
    peak = stage_peak(HIGHRES_5B, stage, video, "bf16", plan, engine=AlignedSize, clean=True)
    items = stage_memory(
        *(HIGHRES_5B, stage, video, "bf16", plan),
        text_tokens=TEXT_TOKENS,
        on_engines=True,
        clean=True,
    )
    assert sum(item.bytes for item in items) == pytest.approx(peak, rel=WITHIN)


@pytest.mark.parametrize("blocks", get_args(Blocks))
def test_on_engines_with_scratch_memory_of_their_own(blocks: Blocks) -> None:
    """They are counted without it; here they allocate nothing else either."""
    plan = TransformerPlan(share_attention=blocks != "whole")
    config, (stage, video) = HIGHRES_5B, (TWO_K, VideoConfig(frames=17))
    peak = stage_peak(config, stage, video, "bf16", plan, blocks=blocks, engine=AnySize)
    items = stage_memory(
        *(config, stage, video, "bf16", plan),
        text_tokens=TEXT_TOKENS,
        on_engines=True,
        blocks=blocks,
    )
    assert sum(item.bytes for item in items) == pytest.approx(peak, rel=WITHIN)


@pytest.mark.parametrize("linear", ["int8", "int8-weight", "fp8"])
@pytest.mark.parametrize("part", [8192, 1024])
def test_a_quantized_draft_of_full_width(linear: LinearFormat, part: int) -> None:
    config, plan = replace(DRAFT_5B, num_layers=3), TransformerPlan(chunk=part)
    peak = stage_peak(config, DRAFT, CLIP, "bf16", plan, linear=linear)
    got = predicted(config, DRAFT, CLIP, "bf16", plan, linear)
    assert got == pytest.approx(peak, rel=WITHIN)


@pytest.mark.parametrize("linear", ["int8", "int8-weight"])
def test_a_small_quantized_network(linear: LinearFormat) -> None:
    config, plan = replace(SMALL, num_layers=4), TransformerPlan()
    peak = stage_peak(config, *SMALL_CLIP, "fp32", plan, linear=linear, fake=False)
    got = predicted(config, *SMALL_CLIP, "fp32", plan, linear)
    assert got == pytest.approx(peak, rel=WITHIN)


@pytest.mark.parametrize(
    ("linear", "bits"), [("int8", 8), ("int8-weight", 8), ("fp8", 8), ("nvfp4", 4.5)]
)
def test_weights_of_quantized_layers_are_counted_by_their_bits(
    linear: LinearFormat, bits: float
) -> None:
    config = wan22_configs.DRAFT
    exact, quantized = (weight_bytes(config, "bf16", kind) for kind in ("exact", linear))
    layers = 6 * config.dim**2 + 2 * config.dim * config.ffn_dim
    channels = 7 * config.dim + config.ffn_dim  # each has a scale in fp32
    blocks = config.num_layers - 2
    assert exact.blocks - quantized.blocks == blocks * (layers * (16 - bits) / 8 - 4 * channels)
    assert exact.rest == quantized.rest
    # One slot for a quantized block, and one for the first and the last.
    assert quantized.slots < 1.6 * exact.slots


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_a_step_of_one_pass(guidance: float) -> None:
    stage, video = replace(SMALL_CLIP[0], guidance=guidance), SMALL_CLIP[1]
    plan = TransformerPlan(share_attention=False)
    peak = stage_peak(SMALL, stage, video, "fp32", plan, fake=False)
    assert predicted(SMALL, stage, video, "fp32", plan) == pytest.approx(peak, rel=WITHIN)


def test_streamed_weights() -> None:
    config, plan = replace(SMALL, num_layers=8), TransformerPlan(weights="streamed")
    peak = stage_peak(config, *SMALL_CLIP, "fp32", plan, fake=False)
    assert predicted(config, *SMALL_CLIP, "fp32", plan) == pytest.approx(peak, rel=WITHIN)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "config",
    [
        wan22_configs.TEXT_ENCODER,
        TextEncoderConfig(
            vocab_size=1000, dim=64, attention_dim=64, ffn_dim=128, num_heads=4, num_layers=2
        ),
    ],
    ids=["UMT5-XXL", "small"],
)
def test_text_encoder(config: TextEncoderConfig, precision: Precision) -> None:
    with torch.device("meta"):
        encoder = TextEncoder(config)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    shapes = {n: t.shape for n, t in encoder.state_dict().items()}
    with counted(fake=True) as ledger:
        weights = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
        encoder.load_state_dict(weights, assign=True)
        encode_tokens(encoder, torch.zeros(512, dtype=torch.int64))
    wanted = sum(item.bytes for item in text_memory(config, precision))
    assert wanted == pytest.approx(ledger.peak["cpu"], rel=WITHIN)
