# SPDX-License-Identifier: Apache-2.0
"""A fleet's run from its request to its outcomes, and its plan for those who only want to look."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.checkpoint.loader import check_networks, require_dit
from pw_runtime.fleet.cluster import Cluster
from pw_runtime.fleet.driver import Fleet
from pw_runtime.fleet.layout import Layout
from pw_runtime.fleet.output_folder import OutputFolder
from pw_runtime.job.checks import check_content, make_output_folder, require_divisible
from pw_runtime.job.clip import start_clip
from pw_runtime.job.conv_choice import settle_conv
from pw_runtime.job.existing import settle_existing
from pw_runtime.job.provenance import require_storable
from pw_runtime.job.sources import examine_pictures, examine_videos, read_sources
from pw_runtime.models.quantized_linear import require_quantizable
from pw_runtime.planning.candidates import candidates
from pw_runtime.planning.planner import make_plan
from pw_runtime.planning.rank_report import ranks_report
from pw_runtime.planning.report import plan_report
from pw_runtime.planning.workload import everything, request_workload
from pw_runtime.system.progress import Reporter
from pw_runtime.types import Budget, Outcome, Request


def run_fleet(
    request: Request,
    bundle: Bundle,
    reporter: Reporter,
    cluster: Cluster,
    layout: Layout,
    ending: Callable[[], bool],
) -> tuple[Outcome, ...]:
    """Make a clip of every prompt on the workers of a cluster.

    Args:
        request: what to make; its device is that of the workers.
        bundle: the converted checkpoint, under the path that it has on every machine.
        reporter: shows progress.
        cluster: starts workers.
        layout: how many, with what.
        ending: tells whether no further prompt may be begun.

    Returns:
        The outcomes of prompts whose clip is there or failed, in order. Those that nobody made,
        because the run was ended or no worker was left, have none.

    Raises:
        BadRequest, BadWeights: the request, the bundle or a machine cannot work.
        WriteFailed: the output folder refuses a file; the clips that are finished are in it.
    """
    request = checked(request, bundle, layout, reporter.say)
    make_output_folder(request)
    folder = OutputFolder(request.out)
    with folder.opened():
        finished = finished_clips(request, bundle)
        for prompt_id, video in finished.items():
            reporter.say(f"prompt {prompt_id}: skipped, {video} is finished")
            reporter.finished(video)
        rest = tuple(prompt for prompt in request.prompts if prompt.id not in finished)
        made: dict[str, Outcome] = {}
        if rest:
            fleet = Fleet(replace(request, prompts=rest), bundle, cluster, reporter, folder, layout)
            made = fleet.run(ending)
    made |= {
        prompt.id: Outcome(prompt=prompt, video=finished[prompt.id], error=None)
        for prompt in request.prompts
        if prompt.id in finished
    }
    return tuple(made[prompt.id] for prompt in request.prompts if prompt.id in made)


def checked(
    request: Request, bundle: Bundle, layout: Layout, say: Callable[[str], None]
) -> Request:
    """Check what this machine can check; return the request with what it decides for all.

    Raises BadRequest, BadWeights.
    """
    check_content(request)
    if layout.processes > 1:
        require_divisible(request.options, divide_weights=request.divide_weights)
    check_networks(bundle, request.stages, request.options.attention_kernel)
    for stage in request.stages:
        require_quantizable(require_dit(bundle, stage), request.options.linear)
    return replace(request, options=settle_conv(request.options, say))


def finished_clips(request: Request, bundle: Bundle) -> dict[str, Path]:
    """Return the videos of earlier runs that this one accepts, by prompt id.

    Raises BadRequest where a file would be replaced that may not be, or is of another clip.
    """
    # why: the device decides nothing about a clip that its receipt does not say in other fields,
    # and the GPU of a worker is not here to be asked for its name
    local = replace(request, options=replace(request.options, device="cpu"))
    clips = [
        start_clip(local, prompt, {}, read_sources([prompt]), bundle, {}, local.preset.decode)
        for prompt in local.prompts
    ]
    for clip in clips:
        require_storable(clip.provenance)
    options = request.options
    asked = {"kernels": options.kernels, "attention": options.attention_kernel}
    settle_existing(clips, local, elsewhere=[name for name in asked if asked[name] == "auto"])
    examine_pictures(clips)
    examine_videos(clips)
    return {clip.prompt.id: clip.video for clip in clips if clip.video is not None}


def dry_run(request: Request, bundle: Bundle, layout: Layout) -> Iterator[str]:
    """Describe the workers, the batches, what is skipped, and a worker's memory plan.

    Raises BadRequest, BadWeights.
    """
    request = checked(request, bundle, layout, lambda text: None)
    finished = finished_clips(request, bundle)
    for node, count in layout.places:
        each = " each" * (count > 1)
        yield f"{node.name}: {count} worker{'s' * (count > 1)} with {layout.each}{each}"
    rest = len(request.prompts) - len(finished)
    yield f"{len(request.prompts)} prompts: {len(finished)} are finished, {rest} to make"
    if not rest:
        return
    yield f"{layout.workers} workers, up to {layout.batch(rest)} prompts at a time"
    yield f"into {request.out}"
    yield ""
    budget = _expected_budget(request, layout)
    if isinstance(budget, str):
        yield budget
        return
    needed = everything(request)
    work = request_workload(
        bundle.networks,
        request,
        loras=bundle.loras,
        prompts=layout.batch(rest),
        ranks=layout.processes,
        needed=needed,
    )
    plan = make_plan(candidates(work, gpu=budget.device is not None, needed=needed), budget)
    yield "the plan of each worker, if it runs without engines:"
    report = plan_report if layout.processes == 1 else ranks_report
    yield report(work, plan, None, verbose=False)


def _expected_budget(request: Request, layout: Layout) -> Budget | str:
    """Return the memory of each worker, or why it is not known before a worker has started."""
    if layout.gpus and request.gpu_memory is None:
        return "no memory plan: add --gpu-memory, since only a worker knows the memory of its GPU"
    host = request.host_memory or min(node.memory_bytes // count for node, count in layout.places)
    if not host:
        return "no memory plan: add --host-memory, since the cluster does not say what it has"
    return Budget(host=host, device=request.gpu_memory)
