# SPDX-License-Identifier: Apache-2.0
"""The second half of the program, `pw decode`: finish clips from latents that a run left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from pw_kernels.launcher import tally
from pw_runtime.checkpoint.bundle import Bundle, load_tensors, verify
from pw_runtime.errors import BadRequest
from pw_runtime.execution.decoder_lookup import select_decoder_engines
from pw_runtime.execution.engine_lookup import EngineSet
from pw_runtime.execution.engine_report import describe_engines
from pw_runtime.job.checks import check_request
from pw_runtime.job.clip import TILES, Clip, resume_clip
from pw_runtime.job.conv_choice import settle_conv
from pw_runtime.job.existing import require_one_container
from pw_runtime.job.failures import report_on_abort
from pw_runtime.job.journal import Journal
from pw_runtime.job.latents import NO_DIGESTS, check_latents
from pw_runtime.job.preflight import computing
from pw_runtime.job.provenance import Provenance
from pw_runtime.job.restore import earlier_tiling
from pw_runtime.job.run import Run
from pw_runtime.pipeline import decode_clips
from pw_runtime.planning.oom_fallback import plan_run
from pw_runtime.system.atomic_files import require_replaceable
from pw_runtime.system.folder_lock import locked_folder
from pw_runtime.system.progress import Reporter
from pw_runtime.system.run_progress import RunProgress
from pw_runtime.system.stop import StopRequest
from pw_runtime.system.trace import Stopwatch
from pw_runtime.types import (
    Codec,
    Conv,
    Kernels,
    Network,
    Outcome,
    Precision,
    Preset,
    Request,
    TilingConfig,
)

_TILING = TypeAdapter(TilingConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """Differences from the run that made the latents; None: as in that run.

    Attributes:
        device: to decode on.
        out: folder for the clips; None: that of each latents file.
        codec: of the video.
        kernels: implementation of the operations.
        conv: convolutions of the decoder on a CPU.
        vae_precision: of the decoder.
        fragmented: also write an mp4 that can be played while it is encoded.
        gpu_memory: maximum bytes; None: what is free.
        host_memory: maximum bytes; None: what is free.
    """

    device: str
    out: Path | None = None
    codec: Codec | None = None
    kernels: Kernels | None = None
    conv: Conv | None = None
    vae_precision: Precision | None = None
    fragmented: bool = False
    gpu_memory: int | None = None
    host_memory: int | None = None


def finish(
    files: Sequence[Path],
    bundle: Bundle,
    reporter: Reporter,
    overrides: Overrides,
    *,
    overwrite: bool = False,
    stop: StopRequest | None = None,
) -> tuple[Outcome, ...]:
    """Decode and encode clips whose latents are on the disk, where they stay.

    On the same device, with the kernels, engines and tiling of the run that made the latents, the
    frames are what that run would have made, bit for bit. Where the memory that is free now
    requires another tiling, they differ by rounding.

    Args:
        files: latents files.
        bundle: one with the VAE of the run that made them.
        reporter: shows progress.
        overrides: what differs from that run.
        overwrite: replace clips that exist.
        stop: with which another thread or a signal handler asks the run to stop.

    Returns:
        One outcome per file, in order.

    Raises:
        BadRequest, BadWeights: nothing was decoded.
        KeyboardInterrupt, Stopped: finished clips are on disk.
    """
    clips = open_clips(files, bundle, reporter, overrides)
    return finish_clips(clips, bundle, reporter, overwrite=overwrite, stop=stop)


def open_clips(
    files: Sequence[Path], bundle: Bundle, reporter: Reporter, overrides: Overrides
) -> list[Clip]:
    """Return the clips of latents files, with nothing decoded; arguments are those of `finish`.

    Raises BadRequest: a file, or what is asked for, cannot work.
    """
    clips = []
    for file in files:
        provenance = check_latents(file, bundle)
        if NO_DIGESTS in provenance.notices:
            reporter.warn(f"{file}: {NO_DIGESTS}")
        request = _request(file, provenance, overrides)
        _check_kernels(file, request)
        check_request(request)
        request = replace(request, options=settle_conv(request.options, reporter.say))
        clips.append(resume_clip(file, provenance, request, bundle))
    return clips


def finish_clips(
    clips: Sequence[Clip],
    bundle: Bundle,
    reporter: Reporter,
    *,
    overwrite: bool = False,
    stop: StopRequest | None = None,
) -> tuple[Outcome, ...]:
    """Decode and encode clips that `open_clips` returned; all else is as of `finish`.

    The video of each that is finished is in it, also where the run is ended early.
    """
    with ExitStack() as locks:
        for folder in sorted({clip.request.out.resolve() for clip in clips}):
            locks.enter_context(locked_folder(folder))
        _check_targets(clips, overwrite=overwrite)  # under the lock: no other run adds a clip now
        load_tensors(bundle, "vae")
        verify(bundle, bundle.networks.vae.files)
        tally.clear()
        stop, progress = stop or StopRequest(), RunProgress(reporter.progress)
        runs = [_run(group, bundle, reporter, stop, progress) for group in _groups(clips)]
        for run in runs:
            locks.callback(run.journal.close)
        with report_on_abort(clips, reporter):
            for run in runs:
                with computing(run.request.options), run.fallback.track_peak("decode"):
                    decode_clips(run)
    return tuple(clip.outcome() for clip in clips)


def _request(file: Path, provenance: Provenance, overrides: Overrides) -> Request:
    """Return the request of the run that made the latents, with what is overridden."""
    earlier = provenance.options
    out = file.parent if overrides.out is None else overrides.out
    return Request(
        prompts=(provenance.prompt,),
        preset=_preset(file, provenance, out),
        out=out,
        negative=provenance.negative,
        seed=provenance.seeds["base"],
        options=replace(
            earlier,
            device=overrides.device,
            codec=overrides.codec or earlier.codec,
            kernels=overrides.kernels or earlier.kernels,
            attention=None if overrides.kernels else earlier.attention,
            conv=overrides.conv or _conv_of(provenance, overrides.device),
            vae_precision=overrides.vae_precision or earlier.vae_precision,
            save_latents=True,
        ),
        fragmented=overrides.fragmented,
        gpu_memory=overrides.gpu_memory,
        host_memory=overrides.host_memory,
    )


def _conv_of(provenance: Provenance, device: str) -> Conv:
    """Return the convolutions that the run would have decoded with on this device."""
    if not device.startswith("cpu"):
        return "auto"
    return provenance.options.conv if provenance.format >= 4 else "onednn"  # there was no other


def _preset(file: Path, provenance: Provenance, out: Path) -> Preset:
    """Return the preset with the tiling of the run: as planned, or of its finished tiles.

    They differ where that run ran out of memory and went on with more tiles.
    """
    return replace(
        provenance.preset,
        decode=earlier_tiling(file, provenance, out / f"{provenance.prompt.id}{TILES}"),
    )


def _run(
    group: Sequence[Clip],
    bundle: Bundle,
    reporter: Reporter,
    stop: StopRequest,
    progress: RunProgress,
) -> Run:
    """Plan the decode of clips that have their settings in common."""
    request = group[0].request
    say: Callable[[str], None] = reporter.say
    engine_set = select_decoder_engines(bundle, request.preset, request.options)
    engines: dict[Network, EngineSet] = {"vae": engine_set}
    say(describe_engines(engines, bundle, request.preset, request.options))
    fallback = plan_run(request, bundle, say, engines, needed=())
    clips, loading = tuple(group), Stopwatch(request.device)
    for clip in clips:
        progress.expect(clip.target, clip.prompt.id, fallback.expected)
    shared = (request, bundle, clips, reporter, engines, fallback, loading)
    return Run(*shared, Journal(reporter.warn), stop=stop, progress=progress)


def _groups(clips: Sequence[Clip]) -> list[list[Clip]]:
    """Group clips that one run can decode: all but their codec and their files is equal."""
    groups: dict[object, list[Clip]] = {}
    for clip in clips:
        settings = replace(clip.request.options, codec="h264")
        groups.setdefault((settings, clip.request.preset), []).append(clip)
    return list(groups.values())


def _check_kernels(file: Path, request: Request) -> None:
    """Raise BadRequest where the run's kernels cannot run on the device."""
    chosen = (request.options.kernels, request.options.attention_kernel)
    if request.device.type != "cuda" and chosen != ("reference", "reference"):
        raise BadRequest(
            f"{file} comes from a run with --kernels {chosen[0]} --attention {chosen[1]}",
            got=f"device {request.device}",
            wanted="a CUDA device, for the same frames bit for bit",
            do="add --kernels reference: frames then differ by rounding",
        )


def _check_targets(clips: Sequence[Clip], *, overwrite: bool) -> None:
    """Raise BadRequest where two clips would be one file, or a file exists."""
    sources: dict[Path, Path] = {}
    for clip in clips:
        assert clip.latents is not None
        target = clip.target.resolve()
        if target in sources:
            raise BadRequest(
                f"two latents files would become {clip.target}",
                got=f"{sources[target]} and {clip.latents}",
                do="run `pw decode` for each, with an --out of its own",
            )
        sources[target] = clip.latents
        require_one_container(clip)
        for file in (clip.target, clip.path(".json")):
            require_replaceable(file)
            if file.exists() and not overwrite:
                raise BadRequest(
                    f"{file} exists", do="pass --overwrite to replace it, or choose another --out"
                )
