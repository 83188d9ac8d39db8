# SPDX-License-Identifier: Apache-2.0
"""Working state of one prompt on its way through the pipeline, and the files it leaves."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor

from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.errors import BadRequest
from pw_runtime.execution.engine_lookup import EngineSet
from pw_runtime.job.contact_sheet import Filmstrip, SheetRow
from pw_runtime.job.latents import (
    SUFFIX,
    read_latent,
    read_provenance,
    vae_digest,
    write_latents,
)
from pw_runtime.job.provenance import Provenance
from pw_runtime.job.receipt import machine, versions
from pw_runtime.planning.workload import computed_draft
from pw_runtime.sampling.noise import Seeds, draw_noise, latent_shape, seeds_for, tensor_digest
from pw_runtime.sampling.schedule import steps_left
from pw_runtime.sampling.step_cache import FEWEST_STEPS
from pw_runtime.stages.codecs import suffix
from pw_runtime.stages.fragmented_mp4 import partial_path
from pw_runtime.system.trace import Stopwatch
from pw_runtime.system.video_source import SourceVideo
from pw_runtime.types import (
    Latent,
    Network,
    Notice,
    Outcome,
    Prompt,
    Request,
    RunOptions,
    Source,
    StageName,
    TextContext,
    TilingConfig,
)

TILES = ".tiles"  # ending of the file with the finished tiles of a decode in progress
STEPS = ".steps.safetensors"  # ending of the file with the state between two denoising steps
FRAMES = ".frames.safetensors"  # ending of the file with the state between two decoded chunks


@dataclass(slots=True)
class Clip:
    """One prompt's data so far; fields of stages that have not run are empty."""

    prompt: Prompt
    request: Request
    seeds: Seeds
    model: Path  # the bundle
    provenance: Provenance  # as far as it is known
    noise: dict[StageName, Tensor]  # [C, T, H, W] fp32
    stopwatch: Stopwatch
    notices: list[Notice] = field(default_factory=list)
    text: TextContext | None = None
    fixed: dict[StageName, Latent] = field(default_factory=dict)  # [C, 1, H, W]: first frames
    begun: Latent | None = None  # of a video, from which the draft stage starts
    video_source: SourceVideo | None = None  # that will be encoded
    draft: Latent | None = None
    highres: Latent | None = None
    kept: Path | None = None  # file with everything computed so far
    latents: Path | None = None  # the same, once it has the last stage's latent
    chunks: set[int] = field(default_factory=set)  # tokens in a call, of stages that this run had
    resumed: bool = False  # `pw decode` finishes it from that file
    earlier: Provenance | None = None  # of the run of the same clip that this one goes on with
    filmstrips: tuple[Filmstrip, ...] = ()
    video: Path | None = None
    error: str | None = None

    @property
    def last_stage(self) -> StageName:
        """The stage whose latent becomes the clip."""
        return list(self.request.stages)[-1]

    def noise_for(self, stage: StageName) -> Tensor:
        """Return the stage's initial noise, from the noise file or drawn from its seed.

        It is on the device; what is kept for the latents file is on the host.
        """
        if stage not in self.noise:
            shape = latent_shape(self.request.stages[stage], self.request.preset.video)
            seed = self.seeds.draft if stage == "draft" else self.seeds.highres
            drawn = draw_noise(shape, seed, self.request.device)
            self.noise[stage], self.kept = drawn.cpu(), None
            return drawn
        return self.noise[stage].to(self.request.device)

    def fixed_for(self, stage: StageName) -> Tensor | None:
        """Return the stage's first latent frame on the device, where a picture gives it."""
        known = self.fixed.get(stage)
        return None if known is None else known.x.to(self.request.device)

    def latent_of(self, stage: StageName) -> Latent:
        """Return a stage's latent on the device: from the latents file, else from memory."""
        if self.latents is not None:
            return read_latent(self.latents, self.provenance, stage, self.request.device)
        latent = self.latent_in_memory(stage)
        assert latent is not None
        return Latent(x=latent.x.to(self.request.device))

    @property
    def keeps_latents(self) -> bool:
        """Tell whether this run, or the one that it goes on with, was asked to keep the file."""
        options = self.provenance.options if self.earlier is None else self.earlier.options
        return self.request.options.save_latents or options.save_latents

    @property
    def needs(self) -> str | None:
        """Name the stage that comes next; None for a clip that is finished or has failed."""
        if self.video is not None or self.error is not None:
            return None
        if self.latents is not None:
            return "decode"
        if self.text is None:
            return "text"
        missing = [s for s in self.request.stages if self.latent_in_memory(s) is None]
        if not missing:
            return "decode"
        return "encode" if self._unencoded(missing[0]) else missing[0]

    def _unencoded(self, stage: StageName) -> bool:
        """Tell whether a stage needs a picture or a video that has not been encoded."""
        if stage not in self.request.encoded(self.prompt):
            return False
        return stage not in self.fixed if self.prompt.image is not None else self.begun is None

    @property
    def draft_steps(self) -> int:
        """Steps of the draft that are computed."""
        config, strength = self.request.stages["draft"], self.request.options.draft_strength
        return steps_left(config, strength if self.prompt.draft_video is not None else 1)

    def latent_in_memory(self, stage: StageName) -> Latent | None:
        """Return a stage's latent where it is in memory."""
        return self.draft if stage == "draft" else self.highres

    def release_tensors(self) -> None:
        """Free the memory of the clip's tensors."""
        self.noise.clear()
        self.fixed.clear()
        self.text = self.begun = self.draft = self.highres = None

    def outcome(self) -> Outcome:
        """Return the result for the prompt."""
        return Outcome(prompt=self.prompt, video=self.video, error=self.error)

    def sheet_row(self) -> SheetRow:
        """Return the clip's row of the contact sheet."""
        return SheetRow(caption=f"{self.prompt.id}: {self.prompt.text}", strips=self.filmstrips)

    def path(self, suffix: str) -> Path:
        """Return `OUT/<id><suffix>`."""
        return self.request.out / f"{self.prompt.id}{suffix}"

    @property
    def target(self) -> Path:
        """Path of the finished video."""
        return self.path(suffix(self.request.options.codec))

    @property
    def partial_video(self) -> Path | None:
        """Path of the video that is playable while encoding, if one was requested."""
        return partial_path(self.target) if self.request.fragmented else None


def start_clip(
    request: Request,
    prompt: Prompt,
    noise: Mapping[StageName, Tensor],
    sources: Mapping[Path, Source],
    bundle: Bundle,
    engines: Mapping[Network, EngineSet],
    tiling: TilingConfig,
) -> Clip:
    """Return a clip with nothing computed.

    Args:
        request: what to make.
        prompt: of the clip.
        noise: by stage; replaces what the seeds would draw.
        sources: the pictures and videos of all prompts, by path.
        bundle: the converted checkpoint.
        engines: that were selected.
        tiling: of the decode.
    """
    seeds = seeds_for(request.seed, prompt.position)
    files = {name: record.sha256 for name, record in bundle.files.items()}
    provenance = Provenance(
        prompt=prompt,
        negative=request.negative,
        preset=request.preset,
        decode=tiling,
        options=options_of(prompt, request),
        seeds={"base": request.seed, **asdict(seeds)},
        noise={},
        noise_file=str(request.noise) if request.noise else None,
        bundle={"digest": bundle.digest, **files},
        vae=vae_digest(bundle),
        engines={network: engine_set.to_dict() for network, engine_set in engines.items()},
        notices=(),
        fallbacks=(),
        seconds={},
        versions=versions(),
        machine=machine(request.device),
        sources={kind: sources[path] for kind, path in prompt.sources.items()},
        loras={x: found for x, found in bundle.lora_sources.items() if x in request.stages},
    )
    return Clip(
        prompt=prompt,
        request=request,
        seeds=seeds,
        model=bundle.root,
        provenance=provenance,
        noise=dict(noise),
        stopwatch=Stopwatch(request.device),
        text=None if request.passes else TextContext(cond=None, uncond=None),
    )


def options_of(prompt: Prompt, request: Request) -> RunOptions:
    """Return the options as they concern one clip of a run.

    Without a picture nothing is fixed, without a video there is no strength of its noise, and a
    draft of which a video leaves few steps computes each of them.
    """
    options = request.options.resolved()
    strength = options.draft_strength if prompt.draft_video is not None else 0.0
    steps = computed_draft(request.preset.draft, (prompt,), strength).steps
    return replace(
        options,
        image_highres=options.image_highres and prompt.image is not None,
        draft_strength=strength,
        step_cache=options.step_cache if steps >= FEWEST_STEPS else None,
    )


def resume_clip(file: Path, provenance: Provenance, request: Request, bundle: Bundle) -> Clip:
    """Return the clip whose latents an earlier run left in `file`."""
    stopwatch = Stopwatch(request.device)
    stopwatch.seconds.update(provenance.seconds)
    fallbacks = set(provenance.fallbacks)
    return Clip(
        prompt=provenance.prompt,
        request=request,
        seeds=Seeds(draft=provenance.seeds["draft"], highres=provenance.seeds["highres"]),
        model=bundle.root,
        provenance=provenance,
        noise={},
        stopwatch=stopwatch,
        notices=[
            Notice(kind="fallback" if text in fallbacks else "text", text=text)
            for text in provenance.notices
        ],
        latents=file,
        resumed=True,
    )


def latents_bytes(clip: Clip) -> int:
    """Return the bytes of the noise and the latents of all stages of the clip."""
    video = clip.request.preset.video
    shapes = [latent_shape(config, video) for config in clip.request.stages.values()]
    return sum(2 * 4 * math.prod(shape) for shape in shapes)


def save_latents(clip: Clip, folder: Path) -> Path:
    """Write all tensors of the clip so far to `<id>.latents.safetensors` in a folder.

    Raises WriteFailed.

    The file can be passed to --noise and, once it has the last stage's latent, to `pw decode`.
    """
    clip.kept = None
    tensors: dict[str, Tensor] = {f"{stage}_noise": x for stage, x in clip.noise.items()}
    if clip.text is not None:
        contexts = {"text_context": clip.text.cond, "negative_context": clip.text.uncond}
        tensors |= {name: x for name, x in contexts.items() if x is not None}
    stages: dict[StageName, Latent | None] = {"draft": clip.draft, "highres": clip.highres}
    tensors |= {
        f"{stage}_latent": latent.x for stage, latent in stages.items() if latent is not None
    }
    clip.provenance = replace(
        clip.provenance,
        noise={stage: tensor_digest(x) for stage, x in clip.noise.items()},
        notices=tuple(notice.text for notice in clip.notices),
        fallbacks=tuple(notice.text for notice in clip.notices if notice.kind == "fallback"),
        seconds=dict(clip.stopwatch.seconds),
    )
    path = folder / f"{clip.prompt.id}{SUFFIX}"
    write_latents(path, clip.provenance, tensors)
    clip.kept = path
    if stages[clip.last_stage] is not None:
        clip.latents = path
    return path


def resume_command(clip: Clip) -> str:
    """Return the command that finishes the clip from its latents file."""
    assert clip.latents is not None
    request, options, earlier = clip.request, clip.request.options, _stored_options(clip)
    words = ["pw", "decode", str(clip.latents), "--model", str(clip.model)]
    words += ["--device", options.device]
    words += ["--out", str(request.out)] if request.out != clip.latents.parent else []
    words += ["--codec", options.codec] if options.codec != earlier.codec else []
    words += ["--kernels", options.kernels] if options.kernels != earlier.kernels else []
    words += ["--conv", options.conv] if options.conv != earlier.conv else []
    if options.vae_precision != earlier.vae_precision:
        words += ["--vae-precision", options.vae_precision]
    words += ["--fragmented"] if request.fragmented else []
    words += ["--overwrite"] if clip.target.exists() else []
    return shlex.join(words)


def _stored_options(clip: Clip) -> RunOptions:
    """Return the options in the clip's latents file: of this run, or of one before it."""
    assert clip.latents is not None
    try:
        return read_provenance(clip.latents).options
    except BadRequest:  # why silent: this is about another failure, and `pw decode` tells of it
        return clip.provenance.options
