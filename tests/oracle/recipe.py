# SPDX-License-Identifier: Apache-2.0
"""The official two-stage recipe composed straight from the official files, in fp32 on the CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tests.oracle import dit, solvers, text, vae

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
EXTRA = ("dt_embedding.", "spatial_adapter.")


class Stage(NamedTuple):
    """One denoising stage: pixel size, steps, schedule shift, guidance, "unipc" or "dpm++"."""

    width: int
    height: int
    steps: int
    shift: float
    guidance: float
    solver: str


def load_base(ckpt_dir: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The DiT of an official directory, fp32, and its config.json."""
    index = ckpt_dir / "diffusion_pytorch_model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_text())["weight_map"].values())
    else:
        names = {path.name for path in ckpt_dir.glob("diffusion_pytorch_model*.safetensors")}
    state: dict[str, Tensor] = {}
    for name in sorted(names):
        state.update(load_file(ckpt_dir / name))
    config = json.loads((ckpt_dir / "config.json").read_text())
    return {key: value.float() for key, value in state.items()}, config


def load_pth(path: Path) -> dict[str, Tensor]:
    """A plain state dict, as fp32."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {key: value.float() for key, value in state.items()}


def load_pixelwizard(path: Path) -> dict[str, Tensor]:
    """A PixelWizard .pt with its wrapper infixes and leading "model." stripped, fp32."""
    file = torch.load(path, map_location="cpu", weights_only=True)
    state = file.get("generator", file.get("generator_ema", file))
    clean: dict[str, Tensor] = {}
    for key, value in state.items():
        for wrapper in WRAPPERS:
            key = key.replace(wrapper, "")
        clean[key] = value.float()
    if all(key.startswith("model.") for key in clean):
        clean = {key.removeprefix("model."): value for key, value in clean.items()}
    return clean


def check_keys(found: Mapping[str, Tensor], base: Mapping[str, Tensor], highres: bool) -> None:
    """Refuse a PixelWizard file that lacks base tensors or has unknown ones."""
    extra = {key for key in found if highres and key.startswith(EXTRA)}
    wrong = (set(found) - extra) ^ set(base)
    if wrong or (highres and not extra):
        raise ValueError(f"unexpected or missing tensors: {sorted(wrong)[:4]}, {len(extra)} extra")


def denoise(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    stage: Stage,
    noise: Tensor,
    contexts: tuple[Tensor, Tensor],
    condition: Tensor | None = None,
) -> Tensor:
    """Noise [C, T, h, w] to the clean latent; two passes per step, the prompt's first."""

    def velocity(x: Tensor, t: int, dt: int) -> Tensor:
        step = torch.tensor([float(t)])
        gap = None if condition is None else torch.tensor([float(dt)])
        cond, uncond = (
            dit.forward(state, config, x, step, context, dt=gap, condition=condition)
            for context in contexts
        )
        return uncond + stage.guidance * (cond - uncond)

    plan = solvers.schedule(stage.solver, stage.steps, stage.shift)
    return solvers.solve(stage.solver, velocity, noise.float(), plan)


def resize_latent(latent: Tensor, height: int, width: int) -> Tensor:
    """Per-frame bilinear resize of [C, T, h, w] to the condition [1, C, T, height, width]."""
    frames = F.interpolate(
        latent.transpose(0, 1), size=(height, width), mode="bilinear", align_corners=False
    )
    return frames.transpose(0, 1)[None]


def check_noise(noise: Tensor, stage: Stage, frames: int) -> None:
    """Noise must be the latent of `frames` frames at the stage's pixel size."""
    expected = ((frames - 1) // 4 + 1, stage.height // 16, stage.width // 16)
    if tuple(noise.shape[1:]) != expected:
        raise ValueError(f"noise {tuple(noise.shape)} does not fit {expected}")


@torch.no_grad()
def run_official(
    ckpt_dir: Path,
    highres_pt: Path,
    prompt: str,
    negative: str,
    *,
    draft: Stage | tuple[int, int, int, float, float, str],
    highres: Stage | tuple[int, int, int, float, float, str],
    frames: int,
    draft_noise: Tensor,
    highres_noise: Tensor,
    draft_pt: Path | None = None,
    strips: int,
    overlap: int,
) -> dict[str, Tensor]:
    """Text, draft, resize, high-res, tiled decode.

    Returns text_context [n, text_dim], negative_context, draft_latent and highres_latent
    [C, T, h, w], video [3, F, H, W] fp32 in [-1, 1] and frames [F, H, W, 3] uint8.
    """
    draft, highres = Stage(*draft), Stage(*highres)
    check_noise(draft_noise, draft, frames)
    check_noise(highres_noise, highres, frames)
    base, config = load_base(ckpt_dir)
    t5 = load_pth(ckpt_dir / "models_t5_umt5-xxl-enc-bf16.pth")
    positive_context, negative_context = (
        text.encode(t5, *text.tokenise(ckpt_dir, line, config["text_len"]))
        for line in (prompt, negative)
    )
    contexts = (positive_context, negative_context)

    draft_state = base
    if draft_pt is not None:
        draft_state = load_pixelwizard(draft_pt)
        check_keys(draft_state, base, highres=False)
    draft_latent = denoise(draft_state, config, draft, draft_noise, contexts)

    highres_state = load_pixelwizard(highres_pt)
    check_keys(highres_state, base, highres=True)
    condition = resize_latent(draft_latent, highres.height // 32, highres.width // 32)
    highres_latent = denoise(
        highres_state, config, highres, highres_noise, contexts, condition=condition
    )

    video = vae.decode_tiled(load_pth(ckpt_dir / "Wan2.2_VAE.pth"), highres_latent, strips, overlap)
    return {
        "text_context": positive_context,
        "negative_context": negative_context,
        "draft_latent": draft_latent,
        "highres_latent": highres_latent,
        "video": video,
        "frames": vae.to_uint8(video).permute(1, 2, 3, 0).contiguous(),
    }
