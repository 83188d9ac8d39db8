# SPDX-License-Identifier: Apache-2.0
"""Everything that is checked, selected and planned before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch

from pw_kernels.launcher import tally
from pw_runtime.checkpoint.bundle import Bundle, verify
from pw_runtime.checkpoint.loader import check_networks, require_dit
from pw_runtime.checkpoint.lora import lora_texts
from pw_runtime.execution.decoder_lookup import select_decoder_engines
from pw_runtime.execution.engine_lookup import EngineSet, select_engines
from pw_runtime.execution.engine_report import describe_engines
from pw_runtime.job.checks import check_request, pick_device, require_divisible
from pw_runtime.job.clip import Clip, start_clip
from pw_runtime.job.conv_choice import computing_as, settle_conv
from pw_runtime.job.existing import settle_existing
from pw_runtime.job.failures import report_on_abort
from pw_runtime.job.follow import common_budget
from pw_runtime.job.journal import Journal
from pw_runtime.job.kernel_choice import settle_kernels
from pw_runtime.job.provenance import require_storable
from pw_runtime.job.restore import first_tiling, take_draft
from pw_runtime.job.run import Run
from pw_runtime.job.sources import (
    examine_pictures,
    examine_videos,
    read_sources,
    told_of_sources,
)
from pw_runtime.models.quantized_linear import require_quantizable
from pw_runtime.planning.exactness import approximations
from pw_runtime.planning.oom_fallback import plan_run
from pw_runtime.planning.warm_networks import WarmNetworks, loading_options
from pw_runtime.planning.workload import everything
from pw_runtime.sampling.noise import load_noise
from pw_runtime.system.folder_lock import locked_folder
from pw_runtime.system.progress import Reporter
from pw_runtime.system.ranks import Ranks
from pw_runtime.system.run_progress import RunProgress
from pw_runtime.system.stop import StopRequest
from pw_runtime.system.trace import Stopwatch, span
from pw_runtime.types import Network, Request, RunOptions


@contextmanager
def prepare(
    request: Request,
    bundle: Bundle,
    reporter: Reporter,
    ranks: Ranks | None = None,
    warm: WarmNetworks | None = None,
    stop: StopRequest | None = None,
) -> Iterator[Run]:
    """Check a request, select its engines and plan it; yield the run to compute inside the block.

    With `ranks`, this process is the first of several that make each clip together. `warm` has what
    earlier runs of a process that makes them alone kept loaded. `stop` asks the run to stop.

    Raises:
        BadRequest, BadWeights: the request or the bundle cannot work.
    """
    pick_device(request.options.device)
    request = replace(request, options=request.options.resolved())
    check_request(request)
    with locked_folder(request.out):
        run = _planned(request, bundle, reporter, ranks, warm)
        run = replace(run, stop=stop or run.stop)
        with ExitStack() as stack:
            stack.callback(run.journal.close)
            stack.enter_context(computing(run.request.options))
            stack.enter_context(report_on_abort(run.clips, reporter))
            yield run


def _planned(
    request: Request,
    bundle: Bundle,
    reporter: Reporter,
    ranks: Ranks | None,
    warm: WarmNetworks | None,
) -> Run:
    """Select the engines, plan the run and verify the bundle. Raises BadRequest, BadWeights."""
    options, noise = request.options, {}
    if request.noise is not None:
        noise = load_noise(request.noise, request.computed, request.preset.video)
    with span("check networks"):
        check_networks(bundle, request.computed, options.attention_kernel)
        for stage in request.computed:
            require_quantizable(require_dit(bundle, stage), options.linear)
    tally.clear()
    with span("engines"):
        engines = selected(request, bundle, warm)
    reporter.say(describe_engines(engines, bundle, request.preset, options))
    for text in lora_texts(bundle.loras, request.stages):
        reporter.say(text)
    if approximate := approximations(options):
        reporter.say(f"approximate: {'; '.join(approximate)}")
    request = replace(request, options=settled(request, bundle, reporter.say))
    if ranks is not None:
        require_divisible(options, divide_weights=request.divide_weights)
    with span("sources"):
        sources = read_sources(request.prompts)
    with span("noise"):
        clips = tuple(
            start_clip(request, prompt, noise, sources, bundle, engines, request.preset.decode)
            for prompt in request.prompts
        )
    for clip in clips:
        require_storable(clip.provenance)
    needed = _taken_over(clips, request, bundle, reporter)
    with span("sources"):
        examine_pictures(clips)
        examine_videos(clips)
    with span("plan"):
        count, budget = 1, None
        if ranks is not None:
            count, budget = ranks.size, common_budget(ranks, request, held_by(engines))
        fallback = plan_run(
            replace(request, preset=replace(request.preset, decode=first_tiling(clips))),
            bundle,
            reporter.say,
            engines,
            # What is kept warm, and which ranks are of use, is a matter of all stages.
            needed=needed if ranks is None and warm is None else everything(request),
            ranks=count,
            budget=budget,
            warm=warm,
        )
    for clip in clips:
        clip.provenance = replace(clip.provenance, decode=fallback.plan.decode.tiling)
    if ranks is not None:
        ranks.command("verify")
    if files := _files_of(needed, bundle):
        reporter.say(f"checking the files of {bundle.root}")
        with span("check files"):
            verify(bundle, files)
    loading = Stopwatch(request.device)
    progress, stages = RunProgress(reporter.progress), list(fallback.expected.items())
    for clip in clips:
        if clip.needs is not None:
            first = next(i for i, (stage, _) in enumerate(stages) if stage == clip.needs)
            skipped = request.stages.keys() - request.computed_for(clip.prompt).keys()
            left = {stage: s for stage, s in stages[first:] if stage not in skipped}
            progress.expect(clip.target, clip.prompt.id, left)
    shared = (request, bundle, clips, reporter, engines, fallback, loading)
    run = Run(*shared, Journal(reporter.warn), ranks, warm, progress=progress)
    for clip in clips:
        for text in told_of_sources(clip):
            run.add_notice((clip,), "source", text)
    if noise and len(clips) > 1:
        text = f"every prompt of this run starts from the noise in {request.noise}"
        run.add_notice(clips, "noise", text)
    return run


def _taken_over(
    clips: Sequence[Clip], request: Request, bundle: Bundle, reporter: Reporter
) -> frozenset[str]:
    """Take over what earlier runs made; return the stages that are left. Raises BadRequest."""
    settle_existing(clips, request, reporter.say)
    for clip in clips:
        if clip.video is not None:
            reporter.say(f"prompt {clip.prompt.id}: skipped, {clip.video} is finished")
            reporter.finished(clip.video)
        elif request.drafts is not None and clip.needs in ("text", "encode", "draft"):
            take_draft(clip, request.drafts, bundle)
    order = ("text", "encode", *request.stages, "decode")
    first = [order.index(clip.needs) for clip in clips if clip.needs is not None]
    skipped = request.stages.keys() - request.computed.keys()
    return frozenset(order[min(first) :] if first else ()) - skipped


def _files_of(stages: Collection[str], bundle: Bundle) -> list[str]:
    """List the files that some stages read."""
    networks = bundle.networks
    unread = {
        "text": networks.text_encoder.files,
        "draft": networks.draft.files,
        "highres": networks.highres.files if networks.highres else (),
        "decode": networks.vae.files,
    }
    for stage in stages:
        unread.pop(stage, None)
    if not stages:
        return []
    return [name for name in bundle.files if all(name not in files for files in unread.values())]


def selected(
    request: Request, bundle: Bundle, warm: WarmNetworks | None = None
) -> dict[Network, EngineSet]:
    """Select the engines of all networks, or return those that an earlier run selected."""
    options, preset = request.options, request.preset
    select: dict[Network, Callable[[], EngineSet]] = {
        stage: partial(select_engines, bundle, stage, options, preset) for stage in request.computed
    }
    select["vae"] = partial(select_decoder_engines, bundle, preset, options)
    if warm is None:
        return {network: choose() for network, choose in select.items()}
    made_of = {
        network: (bundle.digest, options if network == "vae" else loading_options(options), preset)
        for network in select  # a draft is decoded without engines
    }
    return {n: warm.engines(n, made_of[n], choose) for n, choose in select.items()}


def held_by(engines: Mapping[Network, EngineSet]) -> int:
    """Return the bytes of the device that engines have taken by being opened."""
    return max((engine_set.scratch for engine_set in engines.values()), default=0)


def settled(
    request: Request,
    bundle: Bundle,
    say: Callable[[str], None],
    *,
    measure_here: bool = True,
) -> RunOptions:
    """Return the request's options with nothing left to choose; see `settle_kernels`.

    Raises BadRequest.
    """
    with span("CPU kernels"):
        options = settle_conv(request.options, say)
    networks = {"draft": bundle.networks.draft, "highres": bundle.networks.highres}
    configs = {
        stage: entry.config
        for stage in request.preset.stages()
        if (entry := networks[stage]) is not None
    }
    request = replace(request, options=options)
    return settle_kernels(request, configs, say, measure_here=measure_here)


@contextmanager
def computing(options: RunOptions) -> Iterator[None]:
    """Compute without gradients, with the implementations of the operations that were chosen."""
    with torch.inference_mode(), computing_as(options):
        yield
