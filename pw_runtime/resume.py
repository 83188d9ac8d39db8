# SPDX-License-Identifier: Apache-2.0
"""`pw decode`: clips finished from the latents that an earlier run left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pw_kernels.launcher import tally
from pw_kernels.op import using
from pw_runtime.checkpoint.bundle import Bundle, load_tensors, verify
from pw_runtime.errors import BadRequest
from pw_runtime.execution.decoder_lookup import choose_decoder
from pw_runtime.execution.engine_lookup import EngineSet
from pw_runtime.job.clip import Clip
from pw_runtime.job.failures import report_on_abort
from pw_runtime.job.latents import Provenance, check_latents
from pw_runtime.job.preflight import check_request
from pw_runtime.pipeline import Run, decode_clips
from pw_runtime.planning.oom_fallback import fit
from pw_runtime.sampling.noise import Seeds
from pw_runtime.system.progress import Reporter
from pw_runtime.system.trace import Stopwatch
from pw_runtime.types import Codec, Kernels, Network, Outcome, Precision, Request


def finish(
    files: Sequence[Path],
    bundle: Bundle,
    reporter: Reporter,
    *,
    device: torch.device,
    out: Path | None = None,
    codec: Codec | None = None,
    kernels: Kernels | None = None,
    vae_precision: Precision | None = None,
    fragmented: bool = False,
    overwrite: bool = False,
    gpu_memory: int | None = None,
    host_memory: int | None = None,
) -> tuple[Outcome, ...]:
    """Decode and encode clips whose latents are on the disk, which stay there.

    On the device, with the kernels, the engines and the cut of the run that made the latents, the
    frames are those that it would have made, bit for bit. The cut is another, and then they differ
    by rounding, where the memory that is free now asks for it.

    Args:
        files: latents files.
        bundle: one with the VAE of the run that made them.
        reporter: told about progress.
        device: to decode on.
        out: folder for the clips; None: that of each file.
        codec: None: that of the run.
        kernels: implementation of the operations; None: that of the run.
        vae_precision: of the decoder; None: that of the run.
        fragmented: make an mp4 beside each clip that plays while it grows.
        overwrite: replace clips that exist.
        gpu_memory: most bytes to take; None: what is free.
        host_memory: as that.

    Returns:
        One outcome per file, in order.

    Raises:
        BadRequest, BadWeights: nothing was decoded.
        KeyboardInterrupt: finished clips are on disk.
    """
    clips = []
    for file in files:
        origin = check_latents(file, bundle)
        request = Request(
            prompts=(origin.prompt,),
            preset=replace(origin.preset, decode=origin.decode),
            out=file.parent if out is None else out,
            negative=origin.negative,
            seed=origin.seeds["base"],
            codec=codec or origin.options.codec,
            fragmented=fragmented,
            save_latents=True,
            draft_only=origin.options.draft_only,
            precision=origin.options.precision,
            vae_precision=vae_precision or origin.options.vae_precision,
            gpu_memory=gpu_memory,
            host_memory=host_memory,
            kernels=kernels or origin.options.kernels,
            attention=None if kernels else origin.options.attention,
            policy=origin.options.policy,
            chunk=origin.options.chunk,
            device=device,
        )
        _check_kernels(file, request)
        check_request(request)
        clips.append(_reopen(file, origin, request, bundle))
    _check_targets(clips, overwrite=overwrite)
    load_tensors(bundle, "vae")
    verify(bundle, bundle.networks.vae.files)
    tally.clear()
    runs = [_run(group, bundle, device, reporter) for group in _alike(clips)]
    with torch.inference_mode(), report_on_abort(clips, reporter):
        for run in runs:
            with (
                using(run.request.kernels, attention=run.request.attention_kernel),
                run.fitting.measuring("decode"),
            ):
                decode_clips(run)
    return tuple(clip.outcome() for clip in clips)


def _run(group: Sequence[Clip], bundle: Bundle, device: torch.device, reporter: Reporter) -> Run:
    """The decode of clips that have their settings in common, planned."""
    request = group[0].request
    picked: dict[Network, EngineSet] = {"vae": choose_decoder(request, bundle, reporter.say)}
    fitting = fit(request, bundle, reporter, picked, decode_only=True)
    return Run(request, bundle, tuple(group), Stopwatch(device), reporter, picked, fitting)


def _reopen(file: Path, origin: Provenance, request: Request, bundle: Bundle) -> Clip:
    watch = Stopwatch(request.device)
    watch.seconds.update(origin.seconds)
    return Clip(
        prompt=origin.prompt,
        request=request,
        seeds=Seeds(draft=origin.seeds["draft"], highres=origin.seeds["highres"]),
        model=bundle.root,
        origin=origin,
        noise={},
        watch=watch,
        notices=list(origin.notices),
        latents=file,
        reopened=True,
    )


def _alike(clips: Sequence[Clip]) -> list[list[Clip]]:
    """Clips that one run can decode, together: they have their settings and engines in common."""
    groups: dict[tuple[object, ...], list[Clip]] = {}
    for clip in clips:
        one = clip.request
        settings = (one.kernels, one.attention_kernel, one.precision, one.policy, one.chunk)
        key = (settings, one.vae_precision, one.preset, one.draft_only)
        groups.setdefault(key, []).append(clip)
    return list(groups.values())


def _check_kernels(file: Path, request: Request) -> None:
    wanted = (request.kernels, request.attention_kernel)
    if request.device.type != "cuda" and wanted != ("reference", "reference"):
        raise BadRequest(
            f"{file} comes from a run with --kernels {wanted[0]} --attention {wanted[1]}",
            got=f"device {request.device}",
            wanted="a CUDA device, for the same frames bit for bit",
            do="add --kernels reference: frames then differ by rounding",
        )


def _check_targets(clips: Sequence[Clip], *, overwrite: bool) -> None:
    taken: dict[Path, Path] = {}
    for clip in clips:
        assert clip.latents is not None
        target = clip.target.resolve()
        if target in taken:
            raise BadRequest(
                f"two latents files would become {clip.target}",
                got=f"{taken[target]} and {clip.latents}",
                do="run `pw decode` for each, with an --out of its own",
            )
        taken[target] = clip.latents
        if clip.target.exists() and not overwrite:
            raise BadRequest(
                f"{clip.target} exists",
                do="add --overwrite if these latents shall replace it, or choose another --out",
            )
