# SPDX-License-Identifier: Apache-2.0
"""The clip that every program of an end-to-end run makes, and what a program is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pw_bench.choices import SyntheticSize
from pw_runtime.types import Codec, Precision, Preset, RunOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One clip. All programs get the same weights, texts, noise, sizes and encoder settings.

    Attributes:
        checkpoint: folder in the official layout, with pixelwizard/highres.pt.
        bundle: the same weights, converted.
        prompt: text.
        negative: text.
        preset: sizes and sampler settings; without a high-res stage the draft is the clip.
        noise: safetensors file with draft_noise and highres_noise, [C, T, H, W] fp32.
        in_memory: size of the random weights that replace both folders; None: none do.
        device: name of the device in torch.
        precision: of the transformers.
        codec: of the video.
        keep_networks: this process makes further clips, for which a program may keep networks.
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
    in_memory: SyntheticSize | None = None
    keep_networks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipFacts:
    """Facts about a clip that only its program knows.

    Attributes:
        fallbacks: what ran otherwise than requested.
        engines: network -> backend and start of the digest of its key.
        operations: operation -> implementation, outside engines.
        peaks: peak bytes by place ("host", "device"), of a program that resets the counters.
        predicted: peak bytes by stage and place, from the plan.
        measured: the same as measured.
        options: of a clip of this runtime, which say what is approximated.
    """

    fallbacks: tuple[str, ...] = ()
    engines: Mapping[str, str] = field(default_factory=dict)
    operations: Mapping[str, str] = field(default_factory=dict)
    peaks: Mapping[str, int] = field(default_factory=dict)
    predicted: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    measured: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    options: RunOptions = field(default_factory=RunOptions)


class Program(Protocol):
    """A maker of clips: the first clip of an instance is a cold start, later ones are warm.

    It marks its work with `pw_runtime.system.trace.span`, by the names load, text, draft,
    condition, highres, decode, encode and "step N" inside a denoising stage, and passes the latent
    after every step to `observe("latent", x)`, x being [C, T, H, W].
    """

    def clip(self, job: Job, video: Path) -> ClipFacts:
        """Make the clip, from files to a closed video file; keep loaded what later clips need."""
        ...
