# SPDX-License-Identifier: Apache-2.0
"""The official program as a contender: one process, default flags, eager PyTorch.

It does what the official command line does on one GPU (`--model_load_mode auto`, which there is
resident with offload to the host):

* each stage has a text encoder, a VAE and a transformer of its own, loaded once and kept; on a GPU
  the VAEs stay there (no stage uses them), while encoder and transformer are moved there for their
  turn;
* prompt and negative are padded to 512 tokens and encoded in both stages; the two passes of a step
  run one after the other;
* the VAE is loaded again for the decode of every clip; it decodes `decode.strips` strips one after
  the other, which are blended in fp32 on the host, then truncated to bytes, then encoded.

It is kinder to the official program than its code in two places: weights do not move back to the
host, where the copy that they came from stays; GELU and scores of the text encoder are single
operations. Attention is PyTorch's, since flash-attn needs CUDA. The bytes go in one chunk of the
whole clip to the encoder of the runtime, whose settings are those of all programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pw_bench.e2e.job import ClipFacts, Job
from pw_bench.official import dit, files, text, vae
from pw_bench.official.stages import check_noise, denoise, resize_latent
from pw_runtime.stages.write import write_video
from pw_runtime.system.trace import span
from pw_runtime.types import FrameChunk, StageConfig, StageName

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Networks that a stage holds from the first clip to the last one."""

    config: Mapping[str, Any]
    transformer: State
    text_encoder: State
    tokenizer: Any
    vae: State


class OfficialProgram:
    """Makes clips of one checkpoint. A second clip finds the models of the stages loaded."""

    def __init__(self) -> None:
        self._models: dict[StageName, Models] = {}
        self._loaded_for: tuple[Path, str, str] | None = None

    def clip(self, job: Job, video: Path) -> ClipFacts:
        """Make the clip, from files to a closed video file.

        Raises ValueError for a job with another checkpoint, device or precision than the first
        one, for noise that does not fit, and where timesteps are to be rounded, which the official
        program does not do on one GPU.
        """
        loaded_for = (job.checkpoint, job.device, job.precision)
        if self._loaded_for not in (None, loaded_for):
            raise ValueError(f"loaded for {self._loaded_for}, asked for {loaded_for}")
        if job.preset.compat.bf16_timesteps:
            raise ValueError("the official program rounds timesteps on several GPUs only")
        self._loaded_for = loaded_for
        stages = job.preset.stages()
        with torch.no_grad():
            with span("load"):
                for stage in stages:
                    if stage not in self._models:
                        self._models[stage] = load_models(job, stage)
            noise = load_file(job.noise)
            latent: Tensor | None = None
            for stage, config in stages.items():
                latent = self._denoise(job, stage, config, noise[f"{stage}_noise"], latent)
            assert latent is not None
            frames = decode(job, latent)
        with span("encode"):
            write_frames(job, frames, video)
        return ClipFacts()

    def _denoise(
        self, job: Job, stage: StageName, config: StageConfig, noise: Tensor, draft: Tensor | None
    ) -> Tensor:
        """Encode the text and denoise: the latent [C, T, h, w] of one stage, on the host."""
        models, device = self._models[stage], torch.device(job.device)
        check_noise(noise, config, job.preset.video.frames)
        with span("text"):
            encoder = to_device(models.text_encoder, device)
            contexts = (
                encode_text(models, encoder, job.prompt),
                encode_text(models, encoder, job.negative),
            )
            del encoder
        condition: Tensor | None = None
        if draft is not None:
            with span("condition"):
                condition = resize_latent(draft, config).to(device)
        with span(stage):
            latent = denoise(
                to_device(models.transformer, device),
                models.config,
                config,
                noise.to(device),
                contexts,
                condition,
                attention=dit.fused_attention,
                bf16=job.precision == "bf16",
                bf16_einsum=job.preset.compat.bf16_einsum,
            )
            return latent.cpu()


def load_models(job: Job, stage: StageName) -> Models:
    """Load all networks of a stage: the VAE on the device, the others on the host."""
    bf16 = job.precision == "bf16"
    state, config = files.load_base(job.checkpoint)
    if stage == "highres":
        highres = files.load_pixelwizard(job.checkpoint / "pixelwizard" / "highres.pt")
        files.check_keys(highres, state, highres=True)
        state = highres
    low = torch.bfloat16 if bf16 else torch.float32
    decoder = files.load_pth(job.checkpoint / files.VAE, torch.float32)
    return Models(
        config=config,
        transformer=files.transformer_weights(state, bf16=bf16),
        text_encoder=files.load_pth(job.checkpoint / files.TEXT_ENCODER, low),
        tokenizer=text.load_tokenizer(job.checkpoint),
        vae=to_device(decoder, torch.device(job.device)),
    )


def to_device(state: State, device: torch.device) -> State:
    """Copy the weights to a device; return the same tensors where they are there already."""
    return {key: value.to(device) for key, value in state.items()}


def encode_text(models: Models, encoder: State, line: str) -> Tensor:
    """Return the text rows [n, text_dim] of a prompt, on the encoder's device."""
    ids, mask = text.tokenise(models.tokenizer, line, models.config["text_len"])
    device = encoder["norm.weight"].device
    return text.encode(encoder, ids.to(device), mask.to(device))


def decode(job: Job, latent: Tensor) -> Tensor:
    """Decode the last latent to bytes [F, H, W, 3], by a VAE loaded for this clip alone."""
    tiling = job.preset.decode
    with span("load"):
        weights = files.load_pth(job.checkpoint / files.VAE, torch.float32)
        weights = to_device(weights, torch.device(job.device))
    with span("decode"):
        clip = vae.decode_tiled(weights, latent, tiling.strips, tiling.overlap)
        return vae.to_uint8(clip.permute(1, 2, 3, 0)).contiguous()


def write_frames(job: Job, frames: Tensor, video: Path) -> None:
    """Write bytes [F, H, W, 3] as a video file, encoded as those of all programs are."""
    count, height, width = frames.shape[:3]
    write_video(
        [FrameChunk(start=0, pixel_format="rgb24", frames=frames)],
        video,
        width=width,
        height=height,
        frames=count,
        fps=job.preset.video.fps,
        codec=job.codec,
    )
