# SPDX-License-Identifier: Apache-2.0
"""Stages run under a ledger: with fake tensors, of sizes and no numbers, or with real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pw_bench.measure.tensor_ledger import Ledger
from pw_engines import Engine, EngineSpec
from pw_kernels.quantized_linear import quantize_rows
from pw_runtime.checkpoint.loader import is_streamed
from pw_runtime.execution.engine_lookup import eager_engines
from pw_runtime.execution.transformer import SegmentedDiT
from pw_runtime.execution.transformer_segments import segments_of
from pw_runtime.execution.weight_streaming import StreamedWeights
from pw_runtime.models import WanDiT
from pw_runtime.models.precision import store_dit_weight
from pw_runtime.models.quantized_linear import is_quantized
from pw_runtime.sampling.noise import latent_shape
from pw_runtime.stages.condition import resize_draft
from pw_runtime.stages.draft import denoise_draft
from pw_runtime.stages.highres import denoise_highres
from pw_runtime.types import (
    Blocks,
    Compat,
    DitConfig,
    Latent,
    LinearFormat,
    Precision,
    StageConfig,
    TextContext,
    TransformerPlan,
    VideoConfig,
)

TEXT_TOKENS = 120
LOW = StageConfig(width=448, height=256, steps=1, shift=5.0, guidance=5.0)
CPU = torch.device("cpu")


@contextmanager
def counted(*, fake: bool) -> Iterator[Ledger]:
    """A ledger, over fake tensors or real ones."""
    no_numbers = patch("pw_runtime.sampling.denoise.is_finite", lambda x: True)
    with torch.inference_mode(), no_numbers:
        if fake:
            with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
                yield ledger
        else:
            with Ledger() as ledger:
                yield ledger


def stage_peak(
    config: DitConfig,
    stage: StageConfig,
    video: VideoConfig,
    precision: Precision,
    plan: TransformerPlan,
    *,
    linear: LinearFormat = "exact",
    fake: bool = True,
    blocks: Blocks = "segments",
    keep: float | None = None,
    engine: Callable[[EngineSpec], Engine] | None = None,
    clean: bool = False,
) -> int:
    """Most bytes of tensors that live while a stage denoises a clip of three steps.

    `engine` makes one from its spec; None: the segments themselves run. `clean`: the first latent
    frame is known.
    """
    with counted(fake=fake) as ledger:
        net = WanDiT(config).requires_grad_(False)
        stored: dict[str, torch.Tensor] = {}
        for name, w in net.state_dict().items():
            if linear != "exact" and is_quantized(name, config.num_layers, linear):
                numbers, _, scale = quantize_rows(w, linear)
                stored |= {name: numbers, f"{name.removesuffix('.weight')}.scale": scale}
            else:
                stored[name] = w if _stays(name, plan) else store_dit_weight(name, w, precision)
        if linear != "exact":
            net.prepare_quantized(linear)
        net.load_state_dict(stored, assign=True)
        del stored
        ledger.restart()
        tokens = stage.tokens(video)
        segments = segments_of(config, precision, plan.chunk, linear, blocks=blocks, tokens=tokens)
        weights = None
        if plan.weights != "resident":
            weights = StreamedWeights(net, segments, precision, CPU)
        engines = eager_engines(segments)
        if engine is not None:
            engines = {name: engine(segment.spec) for name, segment in segments.items()}
        on_engines = SegmentedDiT(
            net, segments, engines, weights, share_attention=plan.share_attention, keep=keep
        )
        run_stage(on_engines, config, replace(stage, steps=3), video, clean=clean)
        if weights is not None:
            weights.close()
    return ledger.peak["cpu"]


def _stays(name: str, plan: TransformerPlan) -> bool:
    return plan.weights == "mapped" and is_streamed(name)


def run_stage(
    net: SegmentedDiT,
    config: DitConfig,
    stage: StageConfig,
    video: VideoConfig,
    *,
    clean: bool = False,
) -> None:
    context = torch.zeros(TEXT_TOKENS, config.text_dim)
    text = TextContext(cond=context, uncond=context)
    noise = torch.zeros(latent_shape(stage, video))
    fixed = torch.zeros_like(noise[:, :1]) if clean else None
    if not config.adapter_dim:
        denoise_draft(net, text, noise, stage, Compat(), lambda part: None, fixed=fixed)
        return
    low = Latent(x=torch.zeros(latent_shape(LOW, video)))
    conditioning = resize_draft(low, stage)
    inputs = (net, text, conditioning, noise, stage, Compat(), lambda part: None)
    denoise_highres(*inputs, fixed=fixed)
