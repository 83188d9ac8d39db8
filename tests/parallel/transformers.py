# SPDX-License-Identifier: Apache-2.0
"""What ranks do in tests/parallel/test_divided_transformer.py: denoise a clip together."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from pydantic import TypeAdapter
from torch import Tensor

from pw_engines.eager import EagerEngine
from pw_runtime.execution.divided_transformer import DividedDiT, form_groups
from pw_runtime.execution.gathered_weights import GatheredWeights
from pw_runtime.execution.transformer import SegmentedDiT
from pw_runtime.execution.transformer_segments import segments_of
from pw_runtime.execution.weight_streaming import ResidentWeights, Weights
from pw_runtime.models import WanDiT
from pw_runtime.models.precision import store_dit_weight
from pw_runtime.sampling.denoise import denoise
from pw_runtime.system.ranks import Ranks
from pw_runtime.types import (
    Compat,
    Conditioning,
    DitConfig,
    Precision,
    Split,
    StageConfig,
    TextContext,
)
from tests.engines.test_segments import WholeChunks

CONFIG = DitConfig(dim=48, ffn_dim=96, num_heads=3, num_layers=3, text_dim=32, text_len=16)
HIGHRES = replace(CONFIG, has_dt=True, adapter_dim=16, control_blocks=(1,))
LATENT = (48, 3, 6, 10)  # 3 x 3 x 5 tokens, in slices of 8, 8, 8, 7, 7, 7
LIMIT = 8
STAGE = StageConfig(width=160, height=96, steps=3, shift=5.0, guidance=4.0)
_SPLIT = TypeAdapter(Split)


def network(config: DitConfig, precision: Precision) -> WanDiT:
    torch.manual_seed(0)
    net = WanDiT(config)
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    stored = {name: store_dit_weight(name, w, precision) for name, w in net.state_dict().items()}
    net.load_state_dict(stored, assign=True)
    return net.requires_grad_(False)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def whole(config: DitConfig, precision: Precision, *, padded: bool = False) -> SegmentedDiT:
    net, kind = network(config, precision), WholeChunks if padded else EagerEngine
    segments = segments_of(net.config, precision, LIMIT)
    engines = {name: kind(segment.spec, segment.module) for name, segment in segments.items()}
    return SegmentedDiT(net, segments, engines)


def divided(
    ranks: Ranks, config: DitConfig, precision: Precision, split: Split, case: dict[str, Any]
) -> DividedDiT | None:
    groups = form_groups(ranks, split)
    if groups is None:
        return None
    net, kind = network(config, precision), WholeChunks if case.get("padded") else EagerEngine
    segments = segments_of(net.config, precision, LIMIT)
    engines = {name: kind(segment.spec, segment.module) for name, segment in segments.items()}
    weights: Weights = ResidentWeights(net, segments)
    if case.get("gathered"):
        weights = GatheredWeights(net, segments, precision, ranks, groups[0])
    return DividedDiT(net, segments, engines, weights, ranks, split, "draft")


def make_clip(net: Any, config: DitConfig, seed: int = 0, *, picture: bool = False) -> Tensor:
    text = TextContext(cond=normal(7 + seed, 32), uncond=normal(4, 32))
    noise, conditioning = normal(*LATENT) + seed, None
    if config.adapter_dim:
        conditioning = Conditioning(x=normal(48, 3, 3, 5) - seed)
    inputs = (net, text, noise, STAGE, Compat(), lambda done: None, conditioning)
    return denoise(*inputs, fixed=noise[:, :1] / 2 if picture else None).x


def obey(ranks: Ranks, net: DividedDiT | None) -> None:
    """Follow rank 0 to the end of a case."""
    while (command := ranks.next_command())["name"] != "end of a case":
        if command["name"] != "release" and net is not None:
            net.follow(command)


def clip_after_a_failed_text(ranks: Ranks, splits: str) -> object:
    """Make a clip for each split after one whose second text does not fit on rank 0."""
    compute, made = SegmentedDiT.text_keys_values, []
    for values in json.loads(splits):
        net = divided(ranks, CONFIG, "fp32", _SPLIT.validate_python(values), {})
        assert net is not None
        if ranks.rank:
            obey(ranks, net)
            continue
        fits = iter((True, False))

        def some(net: SegmentedDiT, context: Tensor, fits: Any = fits) -> Any:
            if next(fits, True):
                return compute(net, context)
            raise torch.OutOfMemoryError("not enough for a text")

        with patch.object(SegmentedDiT, "text_keys_values", some):
            try:
                make_clip(net, CONFIG, 0)
            except torch.OutOfMemoryError:
                made.append(make_clip(net, CONFIG, 1))
        net.close()
        ranks.command("end of a case")
    return made


def gathered_text_without_memory(ranks: Ranks) -> object:
    """Begin a clip; rank 0 has no memory for the weights of a text in block 1."""
    split = Split(guidance=1, sequence=2)
    net = divided(ranks, CONFIG, "fp32", split, {"gathered": True})
    assert net is not None
    if ranks.rank:
        obey(ranks, net)
        return None
    slot, fits = GatheredWeights._slot, iter((True, False))

    def some(weights: GatheredWeights, key: str) -> Any:
        if next(fits):
            return slot(weights, key)
        raise torch.OutOfMemoryError("not enough for a slot")

    with patch.object(GatheredWeights, "_slot", some):
        return make_clip(net, CONFIG)


def clips(ranks: Ranks, cases: str) -> object:
    """Make two clips in each case for so many ranks; return them, on rank 0, and what was sent."""
    results = []
    for case in json.loads(cases)[str(ranks.size)]:
        split = _SPLIT.validate_python(case["split"])
        config = HIGHRES if case.get("highres") else CONFIG
        net = divided(ranks, config, case.get("precision", "fp32"), split, case)
        ranks.sent.clear()
        if ranks.rank == 0:
            assert net is not None
            picture = bool(case.get("picture"))
            made = [make_clip(net, config, seed, picture=picture) for seed in range(2)]
            net.close()
            ranks.command("end of a case")
        else:
            made = []
            obey(ranks, net)
        results.append((made, dict(ranks.sent)))
    return results
