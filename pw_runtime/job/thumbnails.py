# SPDX-License-Identifier: Apache-2.0
"""Thumbnails of a clip's frames, for the contact sheet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pw_runtime.execution.protocols import Decoder
from pw_runtime.job.clip import Clip
from pw_runtime.job.contact_sheet import Filmstrip, Thumb, sample_frames, watch_frames
from pw_runtime.stages.decode import decode_frames
from pw_runtime.types import FrameChunk, StageName, TilingConfig

COUNT = 6  # frames in each filmstrip


class Thumbnails:
    """The filmstrips of one clip; empty where no contact sheet is wanted.

    Attributes:
        filmstrips: the draft's, of a clip that has a high-res stage, then the finished clip's.
    """

    def __init__(self, clip: Clip, vae: Decoder) -> None:
        """Decode the draft, which appears on the contact sheet alone."""
        self._clip = clip
        self.filmstrips: list[Filmstrip] = []
        if clip.request.contact_sheet and clip.last_stage == "highres":
            with clip.stopwatch.stage("preview"):
                latent, compat = clip.latent_of("draft"), clip.request.preset.compat
                for _ in self.collect("draft", decode_frames(vae, latent, TilingConfig(), compat)):
                    pass

    def collect(self, stage: StageName, chunks: Iterable[FrameChunk]) -> Iterator[FrameChunk]:
        """Pass a stage's frames on, and keep a few of them, reduced, as a filmstrip."""
        if not self._clip.request.contact_sheet:
            yield from chunks
            return
        config = self._clip.request.stages[stage]
        thumbs: list[Thumb] = []
        indices = sample_frames(self._clip.request.preset.video.frames, COUNT)
        yield from watch_frames(chunks, indices, thumbs)
        self.filmstrips.append(
            Filmstrip(name=stage, width=config.width, height=config.height, thumbs=tuple(thumbs))
        )
