# SPDX-License-Identifier: Apache-2.0
"""Working state of one prompt on its way through the pipeline, and the files it leaves."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor

from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.errors import BadRequest
from pw_runtime.execution.engine_lookup import EngineSet
from pw_runtime.job.contact_sheet import Filmstrip, SheetRow, Thumb, sample_frames, watch_frames
from pw_runtime.job.latents import (
    SUFFIX,
    Options,
    Provenance,
    is_resumable,
    read_latent,
    vae_digest,
    write_latents,
)
from pw_runtime.job.receipt import Receipt, kernel_launches, versions, write_receipt
from pw_runtime.planning.oom_fallback import OomFallback
from pw_runtime.sampling.noise import Seeds, draw_noise, latent_shape, seeds_for, tensor_digest
from pw_runtime.stages.codecs import suffix
from pw_runtime.stages.fragmented_mp4 import partial_path
from pw_runtime.system.trace import Stopwatch
from pw_runtime.types import (
    FrameChunk,
    Latent,
    Network,
    Outcome,
    Prompt,
    Request,
    StageName,
    TextContext,
    TilingConfig,
)

THUMBNAILS = 6  # frames of each strip of the contact sheet


@dataclass(slots=True)
class Clip:
    """One prompt's data so far; a stage that has not run yet has left its field empty."""

    prompt: Prompt
    request: Request
    seeds: Seeds
    model: Path  # the bundle
    origin: Provenance  # as far as it is known
    noise: dict[StageName, Tensor]  # [C, T, H, W] fp32
    watch: Stopwatch
    notices: list[str] = field(default_factory=list)
    text: TextContext | None = None
    draft: Latent | None = None
    highres: Latent | None = None
    latents: Path | None = None  # file with the last stage's latent
    reopened: bool = False  # an earlier run made that file
    strips: tuple[Filmstrip, ...] = ()
    video: Path | None = None
    error: str | None = None

    @property
    def last_stage(self) -> StageName:
        """The stage whose latent becomes the clip."""
        return list(self.request.stages)[-1]

    def noise_for(self, stage: StageName) -> Tensor:
        """The stage's initial noise: from the noise file, else drawn from its seed."""
        if stage not in self.noise:
            shape = latent_shape(self.request.stages[stage], self.request.preset.video)
            seed = getattr(self.seeds, stage)
            self.noise[stage] = draw_noise(shape, seed, self.request.device)
        return self.noise[stage].to(self.request.device)

    def latent_of(self, stage: StageName) -> Latent:
        """A stage's latent: from the latents file, or from memory where the disk refused it."""
        if self.latents is not None:
            return read_latent(self.latents, self.origin, stage, self.request.device)
        latent = self.draft if stage == "draft" else self.highres
        assert latent is not None
        return latent

    def release_tensors(self) -> None:
        """Let the memory go once the files are written."""
        self.noise.clear()
        self.text = self.draft = self.highres = None

    def outcome(self) -> Outcome:
        """What became of the prompt."""
        return Outcome(prompt=self.prompt, video=self.video, error=self.error)

    def sheet_row(self) -> SheetRow:
        """The clip's row of the contact sheet."""
        return SheetRow(caption=f"{self.prompt.id}: {self.prompt.text}", strips=self.strips)

    def path(self, suffix: str) -> Path:
        """`OUT/<id><suffix>`."""
        return self.request.out / f"{self.prompt.id}{suffix}"

    @property
    def target(self) -> Path:
        """Where the video will be."""
        return self.path(suffix(self.request.codec))

    @property
    def growing(self) -> Path | None:
        """Where the video can be watched until then, if that is asked for."""
        return partial_path(self.target) if self.request.fragmented else None


def start_clip(
    request: Request,
    prompt: Prompt,
    noise: Mapping[StageName, Tensor],
    bundle: Bundle,
    engines: Mapping[Network, EngineSet],
    decode: TilingConfig,
) -> Clip:
    """A clip with nothing computed yet; `noise` by stage overrides what the seeds would draw."""
    seeds = seeds_for(request.seed, prompt.position)
    files = {name: record.sha256 for name, record in bundle.files.items()}
    origin = Provenance(
        prompt=prompt,
        negative=request.negative,
        preset=request.preset,
        decode=decode,
        options=Options(
            codec=request.codec,
            precision=request.precision,
            vae_precision=request.vae_precision,
            device=str(request.device),
            kernels=request.kernels,
            attention=request.attention_kernel,
            policy=request.policy,
            chunk=request.chunk,
            draft_only=request.draft_only,
            save_latents=request.save_latents,
        ),
        seeds={"base": request.seed, **asdict(seeds)},
        noise={},
        noise_file=str(request.noise) if request.noise else None,
        bundle={"digest": bundle.digest, **files},
        vae=vae_digest(bundle),
        engines={stage: one.choice.told() for stage, one in engines.items()},
        notices=(),
        seconds={},
        versions=versions(),
    )
    return Clip(
        prompt=prompt,
        request=request,
        seeds=seeds,
        model=bundle.root,
        origin=origin,
        noise=dict(noise),
        watch=Stopwatch(request.device),
    )


def collect_thumbnails(
    clip: Clip, stage: StageName, chunks: Iterable[FrameChunk], strips: list[Filmstrip]
) -> Iterator[FrameChunk]:
    """Pass a stage's frames on and add a few of them, small, to `strips`."""
    plan = clip.request.stages[stage]
    thumbs: list[Thumb] = []
    wanted = sample_frames(clip.request.preset.video.frames, THUMBNAILS)
    yield from watch_frames(chunks, wanted, thumbs)
    strips.append(Filmstrip(name=stage, width=plan.width, height=plan.height, thumbs=tuple(thumbs)))


def save_latents(clip: Clip) -> Path:
    """Write all tensors of the clip so far to `<id>.latents.safetensors`. Raises WriteFailed.

    The file can be passed to --noise and, once it has the last stage's latent, to `pw decode`.
    """
    tensors: dict[str, Tensor] = {f"{stage}_noise": x for stage, x in clip.noise.items()}
    if clip.text is not None:
        tensors |= {"text_context": clip.text.cond, "negative_context": clip.text.uncond}
    stages: dict[StageName, Latent | None] = {"draft": clip.draft, "highres": clip.highres}
    tensors |= {f"{stage}_latent": one.x for stage, one in stages.items() if one is not None}
    clip.origin = replace(
        clip.origin,
        noise={stage: tensor_digest(x) for stage, x in clip.noise.items()},
        notices=tuple(clip.notices),
        seconds=dict(clip.watch.seconds),
    )
    path = clip.path(SUFFIX)
    write_latents(path, clip.origin, tensors)
    if stages[clip.last_stage] is not None:
        clip.latents = path
    return path


def refuse_overwriting_latents(clips: Iterable[Clip]) -> None:
    """Raise BadRequest where a run would overwrite what an earlier one has left to be finished."""
    for clip in clips:
        path = clip.path(SUFFIX)
        videos = [clip.path(one) for one in (".mp4", ".mkv")]
        if not any(video.exists() for video in videos) and is_resumable(path):
            raise BadRequest(
                f"{path} holds a clip that an earlier run has not finished",
                do=f"`pw decode {shlex.quote(str(path))} --model {shlex.quote(str(clip.model))}` "
                "finishes it; else remove the file, or choose another --out",
            )


def resume_command(clip: Clip) -> str:
    """The command that finishes the clip from its latents file."""
    assert clip.latents is not None
    request, options = clip.request, clip.origin.options
    words = ["pw", "decode", str(clip.latents), "--model", str(clip.model)]
    words += ["--device", str(request.device)]
    words += ["--out", str(request.out)] if request.out != clip.latents.parent else []
    words += ["--codec", request.codec] if request.codec != options.codec else []
    words += ["--kernels", request.kernels] if request.kernels != options.kernels else []
    words += ["--fragmented"] if request.fragmented else []
    words += ["--overwrite"] if clip.target.exists() else []
    return shlex.join(words)


def write_clip_receipt(clip: Clip, loading: float, video_bytes: int, fitting: OomFallback) -> None:
    """Write `<id>.json` for a finished clip; `loading` is in seconds. Raises WriteFailed.

    Of a clip finished from its latents, what only the run that made them could tell is absent.
    """
    origin, request = clip.origin, clip.request
    seconds = {name: round(value, 4) for name, value in clip.watch.seconds.items()}
    peaks, launches = fitting.peaks(), kernel_launches()
    finished = None
    if clip.reopened:
        assert clip.latents is not None
        finished = {
            "latents": clip.latents.name,
            "codec": request.codec,
            "device": str(request.device),
            "kernels": request.kernels,
            "vae_precision": request.vae_precision,
            "load_seconds": round(loading, 4),
            "peak_memory_bytes": peaks,
            "plan": fitting.account(),
            "kernel_launches": launches,
            "versions": versions(),
        }
    else:
        seconds = {"load_all_networks": round(loading, 4), **seconds}
    receipt = Receipt(
        prompt=asdict(origin.prompt),
        negative=origin.negative,
        seeds=origin.seeds,
        noise=origin.noise,
        noise_file=origin.noise_file,
        preset=asdict(origin.preset),
        options=asdict(origin.options),
        bundle=origin.bundle,
        video={"file": clip.target.name, "bytes": video_bytes},
        seconds=seconds,
        engines=origin.engines,
        notices=clip.notices,
        versions=origin.versions,
        peak_memory_bytes=None if finished else peaks,
        plan=None if finished else fitting.account(),
        kernel_launches=None if finished else launches,
        finished_from_latents=finished,
    )
    write_receipt(receipt, clip.path(".json"))
