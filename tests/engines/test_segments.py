# SPDX-License-Identifier: Apache-2.0
"""The transformer in segments, on engines, against the whole network."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import pw_kernels
from pw_engines.eager import EagerEngine
from pw_engines.engine import random_inputs
from pw_runtime import models
from pw_runtime.execution import transformer_segments
from pw_runtime.execution.transformer import SegmentedDiT, _aligned_sizes
from pw_runtime.execution.transformer_segments import (
    ATTENTION_BYTES,
    FIRST_BLOCK,
    POSITIONS,
    heads_at_once,
    segments_of,
)
from pw_runtime.models import WanDiT
from pw_runtime.models.blocks import TextKeysValues
from pw_runtime.models.embeddings import sinusoid
from pw_runtime.models.precision import store_dit_weight
from pw_runtime.types import Blocks, DitConfig, Precision
from tests.closeness import max_abs, relative_l2

CPU = torch.device("cpu")
DRAFT = DitConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=3, text_dim=32, text_len=16)
HIGHRES = replace(DRAFT, has_dt=True, adapter_dim=16, control_blocks=(1,))
# What is no segment's, besides tables of modulation: the adapter's backbone, once per clip.
EAGER = ("spatial_adapter.backbone",)


class WholeChunks(EagerEngine):
    """An engine like TensorRT's: every call has as many tokens as the limit."""

    padded = True


def network(config: DitConfig, precision: Precision) -> WanDiT:
    torch.manual_seed(0)
    net = WanDiT(config)
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    stored = {name: store_dit_weight(name, w, precision) for name, w in net.state_dict().items()}
    net.load_state_dict(stored, assign=True)
    return net.requires_grad_(False)


def segmented(
    net: WanDiT,
    precision: Precision,
    limit: int,
    engine_class: type[EagerEngine] = EagerEngine,
    blocks: Blocks = "segments",
    **options: Any,
) -> SegmentedDiT:
    segments = segments_of(net.config, precision, limit, blocks=blocks, tokens=TOKENS)
    engines = {
        name: engine_class(segment.spec, segment.module) for name, segment in segments.items()
    }
    return SegmentedDiT(net, segments, engines, **options)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


LATENT = (48, 2, 6, 8)  # 2x3x4 tokens
TOKENS = 24


def whole_velocities(net: WanDiT, lengths: Sequence[int]) -> list[Tensor]:
    """Run the network itself, one pass per text."""
    latent, steps, more = normal(*LATENT), [torch.tensor([700.0])], []
    if net.config.has_dt:
        steps.append(torch.tensor([100.0]))
        sinusoids = (sinusoid(x, net.config.freq_dim) for x in steps)
        more.append(net.control(net.draft_features(normal(48, 2, 3, 4)), *sinusoids))
    with torch.inference_mode():
        return [
            net(latent, text, net.modulation(*steps), net.positions(latent), *more)
            for text in texts_of(net, lengths)
        ]


def velocities(net: SegmentedDiT, lengths: Sequence[int]) -> list[Tensor]:
    """The same on segments."""
    latent, steps, more = normal(*LATENT), [torch.tensor([700.0])], []
    if net.net.config.has_dt:
        steps.append(torch.tensor([100.0]))
        more.append(net.control_inputs(net.control_features(normal(48, 2, 3, 4)), *steps))
    with torch.inference_mode():
        texts = texts_of(net, lengths)
        return net.velocities(latent, texts, net.modulation(*steps), net.layout(latent), *more)


def texts_of(
    net: WanDiT | SegmentedDiT, lengths: Sequence[int]
) -> list[tuple[TextKeysValues, ...]]:
    width = (net.net if isinstance(net, SegmentedDiT) else net).config.text_dim
    return [net.text_keys_values(normal(length, width)) for length in lengths]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [DRAFT, HIGHRES], ids=["draft", "highres"])
@pytest.mark.parametrize("limit", [24, 9, 5], ids=["whole", "three parts", "five uneven parts"])
def test_equals_the_whole_network(config: DitConfig, precision: Precision, limit: int) -> None:
    net = network(config, precision)
    whole = whole_velocities(net, [7, 3])
    parts = velocities(segmented(net, precision, limit), [7, 3])
    for part, expected in zip(parts, whole, strict=True):
        if limit == 24:
            assert torch.equal(part, expected)
        elif precision == "fp32":  # products of fewer rows may be summed in another order
            assert max_abs(part, expected) <= 1e-5 * expected.abs().max().item()
        else:
            assert relative_l2(part, expected) <= 1e-2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [DRAFT, HIGHRES], ids=["draft", "highres"])
@pytest.mark.parametrize("blocks", ["attention", "whole"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
def test_every_division_of_a_block_gives_the_same_bits(
    config: DitConfig, precision: Precision, blocks: Blocks, share: bool
) -> None:
    """In one chunk: the arithmetic is the same, in other calls."""
    net = network(config, precision)
    expected = velocities(segmented(net, precision, TOKENS), [7, 3, 5])
    got = velocities(
        segmented(net, precision, TOKENS, blocks=blocks, share_attention=share), [7, 3, 5]
    )
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_chunks_around_an_attention_engine_and_around_whole_blocks() -> None:
    net = network(HIGHRES, "fp32")
    chunks = velocities(segmented(net, "fp32", 9), [7, 3])
    on_engine = velocities(segmented(net, "fp32", 9, blocks="attention"), [7, 3])
    assert all(torch.equal(*pair) for pair in zip(on_engine, chunks, strict=True))
    whole = velocities(segmented(net, "fp32", 9, blocks="whole"), [7, 3])
    for got, expected in zip(whole, chunks, strict=True):
        assert max_abs(got, expected) <= 1e-5 * expected.abs().max().item()


def test_an_attention_engine_takes_a_few_heads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(DRAFT, "fp32")
    together = velocities(segmented(net, "fp32", 9), [7])
    monkeypatch.setattr("pw_runtime.execution.transformer_segments.ATTENTION_BYTES", 1)
    one_by_one = segmented(net, "fp32", 9, blocks="attention")
    assert one_by_one._engines["attention"].spec.inputs[0].shape == (1, 1, "tokens", 24)
    assert torch.equal(velocities(one_by_one, [7])[0], together[0])


def test_a_division_has_the_engines_it_needs_and_no_others() -> None:
    names = {
        blocks: set(segments_of(DRAFT, "bf16", 8, blocks=blocks, tokens=TOKENS))
        for blocks in get_args(Blocks)
    }
    parts = {"block_in", "block_in_first", "block_out"}
    assert names["attention"] == names["segments"] | {"attention"}
    assert names["whole"] == names["segments"] - parts | {"block", "block_first"}


@pytest.mark.parametrize(
    ("heads", "most", "expected"), [(24, 24, 24), (24, 9, 8), (24, 4, 4), (5, 4, 1)]
)
def test_groups_of_heads_are_equal(heads: int, most: int, expected: int) -> None:
    assert heads_at_once(1, heads, ATTENTION_BYTES // most, 1) == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sharing_the_first_attention_changes_no_bit(precision: Precision) -> None:
    net = network(HIGHRES, precision)
    shared, apart = (
        velocities(segmented(net, precision, 9, share_attention=share), [7, 3, 5])
        for share in (True, False)
    )
    assert all(torch.equal(*pair) for pair in zip(shared, apart, strict=True))


def test_heads_a_few_at_a_time_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(HIGHRES, "fp32")
    together = velocities(segmented(net, "fp32", 9), [7, 3])
    monkeypatch.setattr("pw_runtime.execution.transformer_segments.ATTENTION_BYTES", 1)
    one_by_one = velocities(segmented(net, "fp32", 9), [7, 3])
    assert all(torch.equal(*pair) for pair in zip(together, one_by_one, strict=True))


def test_parts_smaller_than_the_engines_take_equal_smaller_engines() -> None:
    net = network(HIGHRES, "fp32")
    smaller = velocities(segmented(net, "fp32", 9), [7])
    parts = velocities(segmented(net, "fp32", 24, chunk=9), [7])
    assert torch.equal(parts[0], smaller[0])


def test_every_block_of_every_pass_is_reported() -> None:
    net = segmented(network(DRAFT, "fp32"), "fp32", 24)
    calls: list[int] = []
    with torch.inference_mode():
        latent, steps = normal(*LATENT), torch.tensor([700.0])
        texts = texts_of(net, [7, 3])
        layout = net.layout(latent)
        modulation = net.modulation(steps)
        net.velocities(latent, texts, modulation, layout, on_block=lambda: calls.append(1))
    assert len(calls) == 2 * DRAFT.num_layers


@pytest.mark.parametrize("limit", [16, 24, 32])
@pytest.mark.parametrize("text_tokens", [1, 7, 16])
def test_padding_changes_nothing(limit: int, text_tokens: int) -> None:
    net = network(HIGHRES, "fp32")
    (whole,) = whole_velocities(net, [text_tokens])
    (got,) = velocities(segmented(net, "fp32", limit, WholeChunks), [text_tokens])
    assert max_abs(got, whole) <= 1e-5 * whole.abs().max().item()


@pytest.mark.parametrize("config", [DRAFT, HIGHRES], ids=["draft", "highres"])
@pytest.mark.parametrize("blocks", ["segments", "whole"])
def test_no_weight_is_forgotten(config: DitConfig, blocks: Blocks) -> None:
    net = network(config, "bf16")
    used = {
        name.replace(FIRST_BLOCK, f"blocks.{index}.", 1)
        for segment in segments_of(config, "bf16", 64, blocks=blocks, tokens=64).values()
        for name in segment.weights
        for index in range(config.num_layers)
    }
    left = set(dict(net.named_parameters())) - used
    assert used <= set(dict(net.named_parameters()))
    assert {
        name for name in left if not (name.endswith("modulation") or name.startswith(EAGER))
    } == set()


def test_networks_share_the_engines_of_their_blocks() -> None:
    low, high = (segments_of(config, "fp32", 64) for config in (DRAFT, HIGHRES))
    for name in ("embed", "block_in", "block_out", "head", "text_embed", "text_keys_values"):
        assert low[name].spec == high[name].spec
    assert low["modulation"].spec != high["modulation"].spec
    assert "control" in high
    assert "control" not in low


def test_depth_and_resolution_make_no_other_engine() -> None:
    deeper = segments_of(replace(DRAFT, num_layers=30), "fp32", 64)
    assert {n: s.spec for n, s in deeper.items()} == {
        n: s.spec for n, s in segments_of(DRAFT, "fp32", 64).items()
    }


@pytest.mark.parametrize("blocks", get_args(Blocks))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inputs_are_left_as_they_are(precision: Precision, blocks: Blocks) -> None:
    for segment in segments_of(HIGHRES, precision, 12, blocks=blocks, tokens=TOKENS).values():
        sizes = dict(segment.spec.limits)
        inputs = random_inputs(segment.spec, sizes, CPU, seed=0)
        before = [x.clone() for x in inputs]
        with torch.inference_mode():
            segment.module(*inputs)
        assert all(torch.equal(*pair) for pair in zip(inputs, before, strict=True)), segment.name


def test_an_engine_of_another_segment_is_refused() -> None:
    net = network(DRAFT, "fp32")
    segments = segments_of(DRAFT, "fp32", 64)
    engines = {
        name: EagerEngine(segment.spec, segment.module) for name, segment in segments.items()
    }
    other = segments_of(DRAFT, "fp32", 32)["embed"]
    with pytest.raises(ValueError, match="the engine for embed was made for another segment"):
        SegmentedDiT(net, segments, engines | {"embed": EagerEngine(other.spec, other.module)})


def test_eps_makes_another_engine() -> None:
    """Seen: engines of one eps were found for a network of another; no shape shows it."""
    usual, other = (segments_of(replace(DRAFT, eps=eps), "fp32", 64) for eps in (1e-6, 1e-3))
    assert all(usual[name].spec != other[name].spec for name in usual)


@pytest.mark.parametrize("limit", [23, 2])
def test_no_part_is_left_with_one_token(limit: int) -> None:
    """Seen: 24 tokens in parts of at most 23 gave the adapter a part of one."""
    net = network(HIGHRES, "fp32")
    (whole,) = whole_velocities(net, [7])
    (parts,) = velocities(segmented(net, "fp32", limit), [7])
    assert max_abs(parts, whole) <= 1e-5 * whole.abs().max().item()


def files_run(run: Callable[[], object]) -> set[str]:
    """Names of files of pw_kernels and of the models whose code `run` executes."""
    roots = [Path(package.__file__).parent for package in (pw_kernels, models)]
    files: set[str] = set()

    def record(frame: FrameType, event: str, argument: object) -> None:
        files.add(frame.f_code.co_filename)

    sys.setprofile(record)
    try:
        run()
    finally:
        sys.setprofile(None)
    return {
        path.relative_to(root).with_suffix("").as_posix()
        for path in map(Path, files)
        for root in roots
        if path.is_relative_to(root)
    }


def test_digest_covers_every_file_that_a_segment_runs() -> None:
    def run() -> None:
        for segment in segments_of(HIGHRES, "bf16", 8).values():
            inputs = random_inputs(segment.spec, dict(segment.spec.limits), CPU, seed=0)
            segment.module(*inputs)

    with torch.inference_mode():
        ran = files_run(run)
    # What decides which implementation runs is not part of the arithmetic.
    assert ran - {"op"} <= {*transformer_segments._KERNELS, *transformer_segments._MODELS}
    assert {"attention/__init__", "blocks", "adapter", "qk_norm_rope"} <= ran


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        (256, [256]),
        (300, [256, 44]),
        (512, [256, 256]),
        (513, [256, 128, 129]),  # no engine takes a single row
        (1, [1]),
    ],
)
def test_chunks_of_engines_that_want_aligned_addresses(tokens: int, sizes: list[int]) -> None:
    assert _aligned_sizes(tokens, 300, 128) == sizes
    assert sum(sizes) == tokens


@pytest.mark.parametrize("tokens", [2, 3276, 44_640, 99_696, 6_710_886])
def test_the_check_of_an_engine_stays_within_its_rotary_tables(tokens: int) -> None:
    """With 3, 4, 5 for all sizes a whole block of 2K would read beyond them."""
    block_in = segments_of(DRAFT, "fp32", 2**24)["block_in"]
    spec = replace(block_in.spec, inputs=block_in.spec.inputs[4:5])
    (origin,) = random_inputs(spec, {"tokens": tokens}, CPU, seed=0)
    start, rows, columns = origin.tolist()
    assert (start + tokens - 1) // (rows * columns) < POSITIONS
    assert 0 < max(rows, columns) < POSITIONS
