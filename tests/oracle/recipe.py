# SPDX-License-Identifier: Apache-2.0
"""The official two-stage recipe in fp32 on the CPU, with all intermediate results."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pw_bench.official import dit, files, stages, text, vae
from pw_runtime.types import StageConfig


def fp32(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.float() for key, value in state.items()}


@torch.no_grad()
def run_official(
    ckpt_dir: Path,
    highres_pt: Path,
    prompt: str,
    negative: str,
    *,
    draft: StageConfig,
    highres: StageConfig,
    frames: int,
    draft_noise: Tensor,
    highres_noise: Tensor,
    draft_pt: Path | None = None,
    strips: int,
    overlap: int,
) -> dict[str, Tensor]:
    """Run text encoder, draft, resize, high-res and tiled decode.

    Returns text_context [n, text_dim], negative_context, draft_latent and highres_latent
    [C, T, h, w], video [3, F, H, W] fp32 in [-1, 1] and frames [F, H, W, 3] uint8.
    """
    stages.check_noise(draft_noise, draft, frames)
    stages.check_noise(highres_noise, highres, frames)
    base, config = files.load_base(ckpt_dir)
    t5 = files.load_pth(ckpt_dir / files.TEXT_ENCODER, torch.float32)
    tokenizer = text.load_tokenizer(ckpt_dir)
    positive_context, negative_context = (
        text.encode(t5, *text.tokenise(tokenizer, line, config["text_len"]))
        for line in (prompt, negative)
    )
    contexts = (positive_context, negative_context)

    draft_state = base
    if draft_pt is not None:
        draft_state = files.load_pixelwizard(draft_pt)
        files.check_keys(draft_state, base, highres=False)
    written_out = dit.softmax_attention
    draft_latent = stages.denoise(
        fp32(draft_state), config, draft, draft_noise, contexts, attention=written_out
    )

    highres_state = files.load_pixelwizard(highres_pt)
    files.check_keys(highres_state, base, highres=True)
    condition = stages.resize_latent(draft_latent, highres)
    highres_latent = stages.denoise(
        fp32(highres_state),
        config,
        highres,
        highres_noise,
        contexts,
        condition,
        attention=written_out,
    )

    decoder = files.load_pth(ckpt_dir / files.VAE, torch.float32)
    video = vae.decode_tiled(decoder, highres_latent, strips, overlap)
    return {
        "text_context": positive_context,
        "negative_context": negative_context,
        "draft_latent": draft_latent,
        "highres_latent": highres_latent,
        "video": video,
        "frames": vae.to_uint8(video).permute(1, 2, 3, 0).contiguous(),
    }
