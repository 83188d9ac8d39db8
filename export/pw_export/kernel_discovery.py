# SPDX-License-Identifier: Apache-2.0
"""Find the kernels that the published networks launch, by running the stages on meta tensors.

There is no hand-written list: whatever the runtime would launch gets compiled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pw_engines.eager import EagerEngine
from pw_export.wan22_configs import DRAFT, HIGHRES, VAE
from pw_kernels.dispatch_anywhere import dispatch_anywhere
from pw_kernels.launcher import recording
from pw_kernels.op import Implementation, using
from pw_kernels.variant import Variant
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
STAGES = [
    stage
    for stage in (PRESETS["draft"].draft, PRESETS["2k"].highres, PRESETS["4k"].highres)
    if stage is not None
]
# Two blocks launch the same kernels as thirty, three steps the same as fifty, two residual blocks
# in each stage of the decoder the same as three, and three latent frames the same as 31: the first
# frame decodes differently, and the second has no full past yet.
LAYERS, STEPS, DECODER_BLOCKS, DECODED = 2, 3, 2, 3
TEXT_TOKENS = 80
ALL_TOKENS = 2**18  # tokens per call; kernels do not depend on it
CONVOLUTIONS = ("aten::convolution", "aten::conv2d", "aten::conv3d")


def variants_for(gpu: tuple[int, int]) -> dict[str, Variant]:
    """Collect the kernel variants for drafts, 2K and 4K clips on a GPU, by key.

    Args:
        gpu: compute capability.
    """
    attentions: tuple[Implementation, ...] = ("triton", "gluon") if gpu == (9, 0) else ("triton",)
    nets = {config: _transformer(config) for config in (DRAFT, HIGHRES)}
    sparse = {HIGHRES: _transformer(HIGHRES, keep=0.5)}  # kernels do not depend on the fraction
    vae = _decoder()
    with recording(gpu) as variants, torch.inference_mode():
        for attention in attentions:
            with using("triton", attention=attention), dispatch_anywhere(), _GpuResults():
                latents = [_run_stage(replace(stage, steps=STEPS), nets) for stage in STAGES]
        with using("triton"), dispatch_anywhere(), _GpuResults():
            _run_stage(replace(STAGES[-1], steps=1), sparse)
            for latent in latents:
                _run_decoder(latent, vae)
    return variants


def _transformer(config: DitConfig, keep: float | None = None) -> SegmentedDiT:
    """Build a network of the published widths in bf16, as the loader does."""
    with torch.device(META):
        net = WanDiT(replace(config, num_layers=LAYERS))
    stored = {name: store_dit_weight(name, w, "bf16") for name, w in net.state_dict().items()}
    net.load_state_dict(stored, assign=True)
    segments = segments_of(net.config, "bf16", ALL_TOKENS)
    engines = {
        name: EagerEngine(segment.spec, segment.module) for name, segment in segments.items()
    }
    return SegmentedDiT(net.requires_grad_(False), segments, engines, keep=keep)


def _decoder() -> VaeDecoder:
    """Build the published decoder in fp32, channels last, as the loader does."""
    with torch.device(META):
        vae = VaeDecoder(replace(VAE, decoder_blocks=DECODER_BLOCKS))
    stored = {name: channels_last(w) for name, w in vae.state_dict().items()}
    vae.load_state_dict(stored, assign=True)
    return vae.requires_grad_(False)


def _run_stage(plan: StageConfig, nets: dict[DitConfig, SegmentedDiT]) -> Latent:
    """Run a stage; return the first latent frames."""
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
    return latent


def _run_decoder(latent: Latent, vae: VaeDecoder) -> None:
    """Decode a latent in every tiling and pixel format."""
    compat = Compat()
    for strips in (1, 3, 4):
        for cut in (TilingConfig(strips=strips), TilingConfig(strips=strips, tiling="official")):
            for pixel_format in ("rgb24", "yuv420p"):
                for _ in decode_frames(vae, latent, cut, compat, pixel_format):
                    pass


class _GpuResults(TorchDispatchMode):
    """Lets meta tensors be moved to the host, and gives convolutions cuDNN's memory layout."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == torch.device("cpu"):
            kwargs = kwargs | {"device": META}
        result = func(*args, **kwargs)
        # cuDNN's results have the layout of its weights; those of the meta device are contiguous.
        return channels_last(result) if func._schema.name in CONVOLUTIONS else result
