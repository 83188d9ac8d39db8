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
from pw_runtime.execution.engine_lookup import EngineSet
from pw_runtime.job.contact_sheet import Filmstrip, SheetRow
from pw_runtime.job.latents import (
    SUFFIX,
    read_latent,
    vae_digest,
    write_latents,
)
from pw_runtime.job.provenance import Provenance
from pw_runtime.job.receipt import Receipt, kernel_launches, machine, versions, write_receipt
from pw_runtime.planning.exactness import exactness
from pw_runtime.planning.oom_fallback import OomFallback
from pw_runtime.sampling.noise import Seeds, draw_noise, latent_shape, seeds_for, tensor_digest
from pw_runtime.stages.codecs import suffix
from pw_runtime.stages.fragmented_mp4 import partial_path
from pw_runtime.system.trace import Stopwatch
from pw_runtime.types import (
    Latent,
    Network,
    Notice,
    Outcome,
    Prompt,
    Request,
    StageName,
    TextContext,
    TilingConfig,
)

TILES = ".tiles"  # ending of the file with the finished tiles of a decode in progress


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
    draft: Latent | None = None
    highres: Latent | None = None
    kept: Path | None = None  # file with everything computed so far
    latents: Path | None = None  # the same, once it has the last stage's latent
    resumed: bool = False  # an earlier run made that file
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

    def latent_of(self, stage: StageName) -> Latent:
        """Return a stage's latent on the device: from the latents file, else from memory."""
        if self.latents is not None:
            return read_latent(self.latents, self.provenance, stage, self.request.device)
        latent = self.draft if stage == "draft" else self.highres
        assert latent is not None
        return Latent(x=latent.x.to(self.request.device))

    def release_tensors(self) -> None:
        """Free the memory of the clip's tensors."""
        self.noise.clear()
        self.text = self.draft = self.highres = None

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
    bundle: Bundle,
    engines: Mapping[Network, EngineSet],
    tiling: TilingConfig,
) -> Clip:
    """Return a clip with nothing computed; `noise` by stage replaces what the seeds would draw."""
    seeds = seeds_for(request.seed, prompt.position)
    files = {name: record.sha256 for name, record in bundle.files.items()}
    provenance = Provenance(
        prompt=prompt,
        negative=request.negative,
        preset=request.preset,
        decode=tiling,
        options=request.options.resolved(),
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
    )
    return Clip(
        prompt=prompt,
        request=request,
        seeds=seeds,
        model=bundle.root,
        provenance=provenance,
        noise=dict(noise),
        stopwatch=Stopwatch(request.device),
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
    request, options, earlier = clip.request, clip.request.options, clip.provenance.options
    words = ["pw", "decode", str(clip.latents), "--model", str(clip.model)]
    words += ["--device", options.device]
    words += ["--out", str(request.out)] if request.out != clip.latents.parent else []
    words += ["--codec", options.codec] if options.codec != earlier.codec else []
    words += ["--kernels", options.kernels] if options.kernels != earlier.kernels else []
    words += ["--conv", options.conv] if options.conv != earlier.conv else []
    words += ["--fragmented"] if request.fragmented else []
    words += ["--overwrite"] if clip.target.exists() else []
    return shlex.join(words)


def write_clip_receipt(clip: Clip, loading: float, video_bytes: int, fallback: OomFallback) -> None:
    """Write `<id>.json` for a finished clip. Raises WriteFailed.

    For a clip finished from its latents, fields that only the earlier run could fill are absent.

    Args:
        clip: the clip.
        loading: seconds that loading the networks took.
        video_bytes: size of the video file.
        fallback: the plan of the run.
    """
    provenance, options = clip.provenance, clip.request.options
    seconds = {name: round(value, 4) for name, value in clip.stopwatch.seconds.items()}
    peaks, launches, plan = fallback.peaks(), kernel_launches(), fallback.memory_report()
    finished = None
    if clip.resumed:
        assert clip.latents is not None
        finished = {
            "latents": clip.latents.name,
            "codec": options.codec,
            "device": options.device,
            "kernels": options.kernels,
            "conv": options.conv,
            "vae_precision": options.vae_precision,
            "load_seconds": round(loading, 4),
            "peak_memory_bytes": peaks,
            "plan": plan,
            "kernel_launches": launches,
            "versions": versions(),
            "machine": machine(clip.request.device),
        }
    else:
        seconds = {"load_all_networks": round(loading, 4), **seconds}
    # The transformers ran as the provenance says, the decoder as this run has it.
    ran = replace(provenance.options, vae_precision=options.vae_precision, conv=options.conv)
    backends = {network: entry["backend"] for network, entry in provenance.engines.items()}
    receipt = Receipt(
        prompt=asdict(provenance.prompt),
        negative=provenance.negative,
        seeds=provenance.seeds,
        noise=provenance.noise,
        noise_file=provenance.noise_file,
        preset=asdict(provenance.preset),
        passes={name: list(config.passes) for name, config in clip.request.stages.items()},
        options=asdict(provenance.options),
        exactness=asdict(exactness(backends, ran, replace(ran, kernels=options.kernels))),
        bundle=provenance.bundle,
        video={"file": clip.target.name, "bytes": video_bytes},
        seconds=seconds,
        engines=provenance.engines,
        notices=[notice.text for notice in clip.notices],
        fallbacks=[notice.text for notice in clip.notices if notice.kind == "fallback"],
        versions=provenance.versions,
        machine=provenance.machine,
        peak_memory_bytes=None if finished else peaks,
        plan=None if finished else plan,
        kernel_launches=None if finished else launches,
        finished_from_latents=finished,
    )
    write_receipt(receipt, clip.path(".json"))
