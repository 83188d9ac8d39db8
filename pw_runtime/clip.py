# SPDX-License-Identifier: Apache-2.0
"""Working state of one prompt on its way through the pipeline, and the files it leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from pw_runtime.atomic import write_tensors
from pw_runtime.bundle import Bundle
from pw_runtime.contact_sheet import Filmstrip, SheetRow, Thumb, sample_frames, watch_frames
from pw_runtime.engines import OnEngines
from pw_runtime.noise import Seeds, draw_noise, latent_shape, seeds_for, tensor_digest
from pw_runtime.receipt import Receipt, kernel_launches, peak_memory, versions, write_receipt
from pw_runtime.trace import Stopwatch
from pw_runtime.types import (
    FrameChunk,
    Latent,
    Network,
    Outcome,
    Prompt,
    Request,
    StageName,
    TextContext,
)

THUMBS = 6  # frames of each strip of the contact sheet


@dataclass(slots=True)
class Clip:
    """One prompt's data so far; a stage that has not run yet has left its field empty."""

    prompt: Prompt
    request: Request
    seeds: Seeds
    noise: dict[StageName, Tensor]  # [C, T, H, W] fp32
    watch: Stopwatch
    notices: list[str] = field(default_factory=list)
    text: TextContext | None = None
    draft: Latent | None = None
    highres: Latent | None = None
    strips: list[Filmstrip] = field(default_factory=list)
    video: Path | None = None
    error: str | None = None

    def noise_for(self, stage: StageName) -> Tensor:
        """The stage's initial noise: from the noise file, else drawn from its seed."""
        if stage not in self.noise:
            shape = latent_shape(self.request.stages[stage], self.request.preset.video)
            seed = getattr(self.seeds, stage)
            self.noise[stage] = draw_noise(shape, seed, self.request.device)
        return self.noise[stage].to(self.request.device)

    def forget_tensors(self) -> None:
        """Let the memory go once the files are written."""
        self.noise.clear()
        self.text = self.draft = self.highres = None

    def outcome(self) -> Outcome:
        """What became of the prompt."""
        return Outcome(prompt=self.prompt, video=self.video, error=self.error)

    def sheet_row(self) -> SheetRow:
        """The clip's row of the contact sheet."""
        return SheetRow(caption=f"{self.prompt.id}: {self.prompt.text}", strips=(*self.strips,))

    def path(self, suffix: str) -> Path:
        """`OUT/<id><suffix>`."""
        return self.request.out / f"{self.prompt.id}{suffix}"


def start_clip(request: Request, prompt: Prompt, noise: dict[StageName, Tensor]) -> Clip:
    """A clip with nothing computed yet; `noise` by stage overrides what the seeds would draw."""
    return Clip(
        prompt=prompt,
        request=request,
        seeds=seeds_for(request.seed, prompt.position),
        noise=dict(noise),
        watch=Stopwatch(request.device),
    )


def keep_thumbs(clip: Clip, stage: StageName, chunks: Iterable[FrameChunk]) -> Iterator[FrameChunk]:
    """Pass a stage's frames on and keep a few of them, small, for the contact sheet."""
    plan = clip.request.stages[stage]
    thumbs: list[Thumb] = []
    wanted = sample_frames(clip.request.preset.video.frames, THUMBS)
    yield from watch_frames(chunks, wanted, thumbs)
    strip = Filmstrip(name=stage, width=plan.width, height=plan.height, thumbs=tuple(thumbs))
    clip.strips.append(strip)


def write_latents(clip: Clip) -> Path:
    """Write all tensors of the clip so far to `<id>.latents.safetensors`. Raises WriteFailed.

    The file can be passed to --noise.
    """
    tensors: dict[str, Tensor] = {f"{stage}_noise": x for stage, x in clip.noise.items()}
    if clip.text is not None:
        tensors |= {"text_context": clip.text.cond, "negative_context": clip.text.uncond}
    for stage, latent in (("draft", clip.draft), ("highres", clip.highres)):
        if latent is not None:
            tensors[f"{stage}_latent"] = latent.x
    path = clip.path(".latents.safetensors")
    write_tensors(path, {name: x.cpu().contiguous() for name, x in tensors.items()})
    return path


def write_clip_receipt(
    clip: Clip,
    bundle: Bundle,
    engines: Mapping[Network, OnEngines],
    loading: float,
    video_bytes: int,
) -> None:
    """Write `<id>.json` for a finished clip; `loading` is in seconds. Raises WriteFailed."""
    request = clip.request
    options = {
        "codec": request.codec,
        "precision": request.precision,
        "device": str(request.device),
        "kernels": request.kernels,
        "attention": request.attention_kernel,
        "policy": request.policy,
        "chunk": request.chunk,
        "draft_only": request.draft_only,
        "save_latents": request.save_latents,
    }
    assert clip.video is not None
    receipt = Receipt(
        prompt=dataclasses.asdict(clip.prompt),
        negative=request.negative,
        seeds={"base": request.seed, **dataclasses.asdict(clip.seeds)},
        noise={stage: tensor_digest(x) for stage, x in clip.noise.items()},
        noise_file=str(request.noise) if request.noise else None,
        preset=dataclasses.asdict(request.preset),
        options=options,
        bundle={
            "digest": bundle.digest,
            **{name: record.sha256 for name, record in bundle.files.items()},
        },
        video={"file": clip.video.name, "bytes": video_bytes},
        seconds={
            "load_all_networks": round(loading, 4),
            **{name: round(value, 4) for name, value in clip.watch.seconds.items()},
        },
        peak_memory_bytes=peak_memory(request.device),
        engines={
            name: {"backend": one.choice.backend, "reason": one.choice.reason}
            for name, one in engines.items()
        },
        kernel_launches=kernel_launches(),
        notices=clip.notices,
        versions=versions(),
    )
    write_receipt(receipt, clip.path(".json"))
