# SPDX-License-Identifier: Apache-2.0
"""Frames of clips in memory, in place of video files: those of the lossless codec, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

import torch

from pw_runtime.errors import BadRequest
from pw_runtime.job import networks
from pw_runtime.job.clip import Clip
from pw_runtime.job.run import Run
from pw_runtime.models import VaeDecoder
from pw_runtime.pipeline import decoding
from pw_runtime.stages.codecs import pixel_format_for
from pw_runtime.system.step import Step

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    Frames = np.ndarray | torch.Tensor | list[Image.Image]

OutputType = Literal["np", "pt", "pil"]


def check_output_type(name: str) -> None:
    """Raise BadRequest for a form that frames cannot have."""
    if name not in get_args(OutputType):
        raise BadRequest(
            "unknown output_type",
            got=name,
            wanted='"np" or "pt" ([F, H, W, 3] in uint8), or "pil" (a list of images)',
        )


class HeldFrames:
    """Takes the frames of a run's clips into memory: F * H * W * 3 bytes for each.

    Attributes:
        frames: [F, H, W, 3] uint8 on the CPU, by the id of the prompt.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        self.frames: dict[str, torch.Tensor] = {}

    def stage(self, run: Run) -> None:
        """Decode the clips of a run, as the stage `decode`."""
        total = run.request.preset.video.frames
        with networks.decoder(run) as decoder:
            for clip in run.unfinished():
                with run.step(clip, "decode", total, timed=False) as step:
                    self.frames[clip.prompt.id] = decoder.run(step, _decoded, run, clip, step)
                    run.clear(clip)


def _decoded(vae: VaeDecoder, run: Run, clip: Clip, step: Step) -> torch.Tensor:
    """Decode one clip, into memory that is there from the beginning."""
    config, preset = clip.request.stages[clip.last_stage], clip.request.preset
    shape = (preset.video.frames, config.height, config.width, 3)
    with torch.inference_mode(mode=False):  # the caller may do anything with them
        frames = torch.empty(shape, dtype=torch.uint8)
    with decoding(vae, run, clip, step, pixel_format_for("ffv1", preset.compat)) as chunks:
        for chunk in chunks:
            frames[chunk.start : chunk.start + len(chunk.frames)] = chunk.frames
            del chunk  # while the next one is made, this one must be free
    return frames


def as_output(frames: torch.Tensor, kind: OutputType) -> Frames:
    """Return frames in the form that was asked for; as arrays they are not copied."""
    forms: dict[OutputType, Callable[[torch.Tensor], Frames]] = {
        "np": lambda x: x.numpy(),
        "pt": lambda x: x,
        "pil": _images,
    }
    return forms[kind](frames)


def _images(frames: torch.Tensor) -> list[Image.Image]:
    from PIL import Image

    return [Image.fromarray(frame.numpy()) for frame in frames]
