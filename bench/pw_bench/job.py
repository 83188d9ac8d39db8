# SPDX-License-Identifier: Apache-2.0
"""What an end-to-end run is asked for, the same for every program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pw_runtime.types import Codec, Precision, Preset

SCOPE = "prompt in, closed mp4 on disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One clip. All programs get the same weights, texts, noise, sizes and encoder settings.

    Attributes:
        checkpoint: folder in the official layout, with pixelwizard/highres.pt.
        bundle: the same, converted.
        prompt: text.
        negative: text.
        preset: sizes and sampler settings; without a high-res stage the draft is the clip.
        noise: safetensors file with draft_noise and highres_noise, [C, T, H, W] fp32.
        in_memory: random weights of the published sizes take the place of both.
        device: torch's name of it.
        precision: of the transformers.
        codec: of the video.
    """

    checkpoint: Path
    bundle: Path
    prompt: str
    negative: str
    preset: Preset
    noise: Path
    device: str
    precision: Precision
    codec: Codec
    in_memory: bool = False


class Program(Protocol):
    """Something that makes clips: a new one is a cold start, a second clip of it is a warm one.

    It says what it does by `pw_runtime.trace.span`, with the names load, text, draft, condition,
    highres, decode, encode and "step N" inside a denoising stage, and shows the latent after every
    step by `look("latent", x)`, x being [C, T, H, W].
    """

    def clip(self, job: Job, video: Path) -> None:
        """From files to a closed video file. What it keeps loaded for the next clip is its way."""
        ...
