# SPDX-License-Identifier: Apache-2.0
"""The arguments of a `Pipeline` as a model and a request, and its outputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from pw_runtime.checkpoint.bundle import MANIFEST, Bundle, open_bundle
from pw_runtime.checkpoint.lora_choice import parse_lora
from pw_runtime.errors import BadRequest
from pw_runtime.interface.frames import OutputType
from pw_runtime.presets import check_preset
from pw_runtime.prompts import make_prompts
from pw_runtime.stages.codecs import PICTURE, VIDEOS, suffix
from pw_runtime.system.hub_cache import find_model
from pw_runtime.system.printable import printable
from pw_runtime.system.progress import LOG, Advance, Progress, Reporter, Tasks
from pw_runtime.system.stop import StopRequest
from pw_runtime.types import LoraFile, Outcome, Preset, Prompt, Request, RunOptions

if TYPE_CHECKING:
    from pw_runtime.interface.frames import Frames
    from pw_runtime.interface.start_picture import StartPicture

Callback = Callable[[Progress], object]


class CallOptions(TypedDict, total=False):
    """Arguments of `Pipeline.__call__` beside the prompt, for type checkers."""

    negative_prompt: str | None
    seed: int
    num_inference_steps: int | None
    guidance_scale: float | None
    num_frames: int | None
    image: StartPicture | None
    draft_only: bool
    draft_video: str | Path | None
    draft_strength: float | None
    output: str | Path | None
    output_type: OutputType | None
    overwrite: bool
    callback: Callback | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PipelineOutput:
    """One clip.

    Attributes:
        prompt: as it was given.
        seed: base seed, drawn where it was negative; with it the clip can be made again.
        fps: frames per second.
        video: the file, where one was asked for.
        receipt: the file beside it, with everything that made the clip.
        frames: [F, H, W, 3] uint8 in RGB, or images, where no file was asked for.
        error: why there is no clip; only in the outputs of several prompts.
    """

    prompt: str
    seed: int
    fps: int
    video: Path | None = None
    receipt: Path | None = None
    frames: Frames | None = field(default=None, repr=False)
    error: str | None = None


class Warnings(Reporter):
    """Says warnings alone: in the program's log where that is configured, else on stderr."""

    def __init__(self) -> None:
        """Print nothing else."""
        super().__init__(quiet=True)

    def warn(self, text: str) -> None:
        """Say it once."""
        handlers = (*LOG.handlers, *logging.getLogger().handlers)
        if all(isinstance(handler, logging.NullHandler) for handler in handlers):
            super().warn(text)
        else:
            LOG.warning(printable(text))


class CallReporter(Reporter):
    """Passes on what a run says, and calls the callback, which may end the run.

    Attributes:
        failure: what the callback raised.
    """

    def __init__(
        self, outer: Reporter, callback: Callback | None, stop: StopRequest, *, forgets: bool
    ) -> None:
        """Tell `outer`; with `forgets`, not what a run that was stopped has kept."""
        super().__init__(quiet=True)
        self._outer, self._callback, self._stop = outer, callback, stop
        self._forgets = forgets
        self.failure: Exception | None = None

    def say(self, text: str) -> None:
        """Pass on a line."""
        self._outer.say(text)

    def warn(self, text: str) -> None:
        """Pass on a line that the user must see."""
        if not (self._forgets and self._stop.requested):
            self._outer.warn(text)

    def failed(self, clip: str, error: str) -> None:
        """Pass on that a clip has failed."""
        self._outer.failed(clip, error)

    def finished(self, path: Path) -> None:
        """Say that a clip is complete: the caller gets its path."""
        self._outer.say(f"finished: {path}")

    @contextmanager
    def steps(self, label: str | Callable[[], str], total: int) -> Iterator[Advance]:
        """Pass on the progress of a stage."""
        with self._outer.steps(label, total) as advance:
            yield advance

    @contextmanager
    def tasks(self) -> Iterator[Tasks]:
        """Pass on things that are done at the same time."""
        with self._outer.tasks() as tasks:
            yield tasks

    def progress(self, progress: Progress) -> None:
        """Pass on how far the run is."""
        self._outer.progress(progress)
        if self._callback is None or self._stop.requested:
            return
        try:
            if self._callback(progress) is False:
                self._stop.request()
        except Exception as error:  # raised once the run has unwound: it is no clip's failure
            self.failure = error
            self._stop.request()


@dataclass(frozen=True, slots=True)
class Target:
    """The place of a call's clips: a folder, and the ids that name them there."""

    folder: Path
    prompts: tuple[Prompt, ...]


def target_of(
    output: str | Path | None, texts: Sequence[str], options: RunOptions, *, single: bool
) -> Target:
    """Return where the clips go. Raises BadRequest for prompts or a name that cannot be."""
    ids, folder = [str(index) for index in range(len(texts))], Path(output or "")
    if folder.suffix.lower() in (*VIDEOS, PICTURE):
        if not single:
            raise BadRequest(
                "the clips of a list go into a folder", got=str(output), do="name a folder"
            )
        if folder.suffix != suffix(options.codec):
            raise BadRequest(
                f"codec {options.codec} is written as {suffix(options.codec)}",
                got=folder.name,
                do="change the ending, or pass options=RunOptions(codec=...): ffv1 is .mkv, png "
                "is .png",
            )
        ids, folder = [folder.stem], folder.parent
    stripped = [text.strip() for text in texts]  # as the command line does
    return Target(folder, make_prompts(list(zip(ids, stripped, strict=True))))


def with_numbers(
    preset: Preset,
    *,
    draft_only: bool,
    steps: int | None,
    guidance: float | None,
    frames: int | None,
) -> Preset:
    """Return a preset with other numbers of the last stage and of the video. Raises BadRequest."""
    name, stage = list(preset.stages(draft_only=draft_only).items())[-1]
    if steps is not None:
        stage = replace(stage, steps=steps)
    if guidance is not None:
        stage = replace(stage, guidance=float(guidance))
    changes: dict[str, Any] = {name: stage}
    if frames is not None:
        changes["video"] = replace(preset.video, frames=frames)
    changed = replace(preset, **changes)
    if changed != preset:
        check_preset(changed, "this call")
    return changed


def written(request: Request, outcome: Outcome) -> PipelineOutput:
    """Describe a clip that is a file."""
    video = outcome.video
    return PipelineOutput(
        prompt=outcome.prompt.text,
        seed=request.seed,
        fps=request.preset.video.fps,
        video=video,
        receipt=None if video is None else request.out / f"{outcome.prompt.id}.json",
        error=outcome.error,
    )


def lora_files(loras: Sequence[str | Path | LoraFile] | None) -> list[LoraFile] | None:
    """Return LoRAs from paths, texts as --lora takes them, or files with scales.

    Raises BadRequest for anything else.
    """
    return None if loras is None else [_lora_file(x) for x in loras]


def _lora_file(given: object) -> LoraFile:
    match given:
        case str():
            return parse_lora(given)
        case Path():
            return LoraFile(given)
        case LoraFile():
            return given
    wanted = 'a path, "FILE:SCALE", or LoraFile(path, scale)'
    raise BadRequest("a LoRA has a wrong type", got=f"{given!r:.80}", wanted=wanted)


def opened_model(
    name: str | Path, draft: str | Path | None, highres: str | Path | None, reporter: Reporter
) -> Bundle:
    """Open a bundle, or that of a published checkpoint, as `Pipeline.from_pretrained` names them.

    Raises BadRequest, BadWeights.
    """
    model = find_model(str(name))
    extra = [None if part is None else find_model(str(part)) for part in (draft, highres)]
    if model.is_dir() and not (model / MANIFEST).exists():
        from pw_export.bundle_cache import cached_bundle

        say = reporter.say
        return open_bundle(cached_bundle(wan=model, draft=extra[0], highres=extra[1], say=say))
    if any(extra):
        raise BadRequest(
            "draft and highres belong to a published checkpoint: a bundle has its weights",
            got=str(model),
            do="leave them out, or name the folder of the published checkpoint",
        )
    return open_bundle(model)
