# SPDX-License-Identifier: Apache-2.0
"""Which kernels the published networks launch: found by running the stages on meta tensors.

No list is kept by hand: what the runtime would launch is what gets compiled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pw_engines.eager import EagerEngine
from pw_export.wan22_configs import DRAFT, HIGHRES, VAE
from pw_kernels.launcher import Variant, recording
from pw_kernels.launching import launching
from pw_kernels.op import Implementation, using
from pw_runtime.checkpoint.loader import channels_last
from pw_runtime.execution.transformer import SegmentedDiT
from pw_runtime.execution.transformer_segments import segments_of
from pw_runtime.models import VaeDecoder, WanDiT
from pw_runtime.models.precision import store_dit_weight
from pw_runtime.presets import PRESETS
from pw_runtime.sampling.noise import latent_shape
from pw_runtime.stages.condition import resize_draft
from pw_runtime.stages.decode import decode_frames
from pw_runtime.stages.draft import denoise_draft
from pw_runtime.stages.highres import denoise_highres
from pw_runtime.types import (
    Compat,
    DitConfig,
    Latent,
    StageConfig,
    TextContext,
    TilingConfig,
    VideoConfig,
)

META = torch.device("meta")
STAGES = (PRESETS["draft"].draft, PRESETS["2k"].highres, PRESETS["4k"].highres)
# Two blocks launch what thirty do, three steps what fifty do, three latent frames what 31 do: the
# decode of the first differs from the others, and the last comes after two.
LAYERS, STEPS, DECODED = 2, 3, 3
TEXT_TOKENS = 80
ALL_TOKENS = 2**18  # at once: kernels do not depend on how many there are
CONVOLUTIONS = ("aten::convolution", "aten::conv2d", "aten::conv3d")


def variants_for(gpu: tuple[int, int]) -> dict[str, Variant]:
    """Variants by their keys that drafts, 2K and 4K clips take on such a GPU.

    Args:
        gpu: compute capability.
    """
    attentions: tuple[Implementation, ...] = ("triton", "gluon") if gpu == (9, 0) else ("triton",)
    nets = {config: _transformer(config) for config in (DRAFT, HIGHRES)}
    vae = _decoder()
    with recording(gpu) as variants, torch.inference_mode():
        for attention in attentions:
            with using("triton", attention=attention), launching(), _AsOnAGpu():
                for plan in STAGES:
                    assert plan is not None
                    _run_stage(replace(plan, steps=STEPS), nets, vae)
    return variants


def _transformer(config: DitConfig) -> SegmentedDiT:
    """A network of the published widths in bf16, as the loader leaves it."""
    with torch.device(META):
        net = WanDiT(replace(config, num_layers=LAYERS))
    stored = {name: store_dit_weight(name, w, "bf16") for name, w in net.state_dict().items()}
    net.load_state_dict(stored, assign=True)
    segments = segments_of(net.config, "bf16", ALL_TOKENS)
    engines = {name: EagerEngine(one.spec, one.module) for name, one in segments.items()}
    return SegmentedDiT(net.requires_grad_(False), segments, engines)


def _decoder() -> VaeDecoder:
    """The published decoder in fp32, channels last, as the loader leaves it."""
    with torch.device(META):
        vae = VaeDecoder(VAE)
    stored = {name: channels_last(w) for name, w in vae.state_dict().items()}
    vae.load_state_dict(stored, assign=True)
    return vae.requires_grad_(False)


def _run_stage(plan: StageConfig, nets: dict[DitConfig, SegmentedDiT], vae: VaeDecoder) -> None:
    """A stage of a clip, and the decode of its latent as every pixel format in every tiling."""
    video, compat = VideoConfig(frames=121), Compat()
    context = torch.empty(TEXT_TOKENS, DRAFT.text_dim, device=META, dtype=torch.bfloat16)
    text = TextContext(cond=context, uncond=context)
    noise = torch.empty(latent_shape(plan, video), device=META)
    if plan.width == PRESETS["draft"].draft.width:
        latent = denoise_draft(nets[DRAFT], text, noise, plan, compat, lambda part: None)
    else:
        low = torch.empty(latent_shape(PRESETS["draft"].draft, video), device=META)
        conditioning = resize_draft(Latent(x=low), plan)
        latent = denoise_highres(
            nets[HIGHRES], text, conditioning, noise, plan, compat, lambda part: None
        )
    latent = Latent(x=latent.x[:, :DECODED])
    for strips in (1, 3, 4):
        for cut in (TilingConfig(strips=strips), TilingConfig(strips=strips, tiling="official")):
            for pixel_format in ("rgb24", "yuv420p"):
                for _ in decode_frames(vae, latent, cut, compat, pixel_format):
                    pass


class _AsOnAGpu(TorchDispatchMode):
    """Lets meta tensors leave the GPU, and convolutions leave their results as cuDNN does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == torch.device("cpu"):
            kwargs = kwargs | {"device": META}
        result = func(*args, **kwargs)
        # cuDNN's results lie as its weights do; those of the meta device are always contiguous.
        return channels_last(result) if func._schema.name in CONVOLUTIONS else result
