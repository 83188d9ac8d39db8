# SPDX-License-Identifier: Apache-2.0
"""A clip in parts, each from what the one before made: its draft, its high-res latent, its frames.

All parts plan and load as the whole clip does, so that networks stay loaded from part to part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pw_runtime.errors import BadRequest, BadResult
from pw_runtime.interface.arguments import require_texts
from pw_runtime.interface.call import Callback
from pw_runtime.interface.frames import HeldFrames
from pw_runtime.interface.pipe import Pipeline
from pw_runtime.interface.start_picture import picture_file
from pw_runtime.job.run import Run
from pw_runtime.job.sources import started_from
from pw_runtime.pipeline import STAGES
from pw_runtime.sampling.noise import latent_shape
from pw_runtime.types import Latent, Request, StageName

if TYPE_CHECKING:
    from pw_runtime.interface.start_picture import StartPicture


class Parts:
    """Makes parts of clips with the networks of a pipeline.

    Latents are [C, T, H, W] fp32 on the CPU, in the VAE's normalised space.
    """

    def __init__(self, pipe: Pipeline, callback: Callback | None = None) -> None:
        """Take a pipeline; the callback is as for its calls, its fraction that of the part."""
        self._pipe, self._callback = pipe, callback

    def draft(
        self, prompt: str, negative: str | None, seed: int, image: StartPicture | None = None
    ) -> torch.Tensor:
        """Make the draft of a clip, from a picture where one is given: see `Pipeline`."""
        require_texts(prompt)
        request = self._pipe.request(prompt, negative, seed)
        stages = {name: STAGES[name] for name in ("text", "encode", "draft")}
        with picture_file(image) as start:
            prompts = started_from(request.prompts, image=start, draft_video=None)
            return self._latent(replace(request, prompts=prompts), "draft", stages)

    def finish(
        self, draft: torch.Tensor, prompt: str, negative: str | None, seed: int
    ) -> torch.Tensor:
        """Make the high-res latent of a draft.

        Raises BadRequest where the preset has no high-res stage, or drafts of another size.
        """
        require_texts(prompt)
        request = self._pipe.request(prompt, negative, seed)
        if "highres" not in request.stages:
            raise BadRequest(
                "the preset has no high-res stage: its drafts are finished",
                do="decode the draft, or choose another preset",
            )
        _require_shape(draft, request, ("draft",))

        def give(run: Run) -> None:
            for clip in run.unfinished():
                clip.draft = Latent(x=draft)

        stages = {"text": STAGES["text"], "draft": give, "highres": STAGES["highres"]}
        return self._latent(request, "highres", stages)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Decode a latent of either stage: [F, H, W, 3] uint8.

        Raises BadRequest where it is of neither.
        """
        request = self._pipe.request("a latent", "", 0)
        stage = _require_shape(latent, request, tuple(request.stages))
        if stage == "draft":
            request = replace(request, options=replace(request.options, draft_only=True))
        held = HeldFrames()

        def decode(run: Run) -> None:
            for clip in run.unfinished():
                setattr(clip, stage, Latent(x=latent))
            held.stage(run)

        self._run(request, {"decode": decode})
        (frames,) = held.frames.values()
        return frames

    def _latent(
        self, request: Request, stage: StageName, stages: Mapping[str, Callable[[Run], None]]
    ) -> torch.Tensor:
        """Run stages, and return the latent of the last one."""
        found: list[torch.Tensor] = []

        def take(run: Run) -> None:
            with torch.inference_mode(mode=False):
                found.extend(clip.latent_of(stage).x.cpu().clone() for clip in run.unfinished())

        self._run(request, {**stages, "taken": take})
        return found[0]

    def _run(self, request: Request, stages: Mapping[str, Callable[[Run], None]]) -> None:
        """Run some stages of one clip. Raises BadResult where it fails."""

        def expect(run: Run) -> None:
            expected = run.fallback.expected
            for clip in run.unfinished():
                own = {name: expected[name] for name in stages if name in expected}
                run.progress.expect(clip.target, clip.prompt.id, own)

        (outcome,) = self._pipe.run_in_memory(
            request, self._callback, {"expected": expect, **stages}
        )
        if outcome.error is not None:
            raise BadResult(outcome.error)


def _require_shape(
    latent: torch.Tensor, request: Request, stages: tuple[StageName, ...]
) -> StageName:
    """Return the stage whose latents have this shape. Raises BadRequest."""
    shapes = {
        name: latent_shape(config, request.preset.video)
        for name, config in request.preset.stages().items()
        if name in stages
    }
    for name, shape in shapes.items():
        if tuple(latent.shape) == tuple(shape):
            return name
    wanted = " or ".join(f"{list(shape)} ({name})" for name, shape in shapes.items())
    raise BadRequest(
        "the latent is not of this preset",
        got=list(latent.shape),
        wanted=f"{wanted}: channels, frames, rows and columns",
        do="take the latent and the preset of the same clip",
    )
