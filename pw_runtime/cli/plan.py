# SPDX-License-Identifier: Apache-2.0
"""`pw plan`: what a run will take, before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from pw_runtime.cli.exit_codes import DONE
from pw_runtime.cli.json_output import json_text
from pw_runtime.cli.options import (
    CODECS,
    MODEL,
    Bytes,
    PresetName,
    blocks_option,
    chunk_option,
    gpu_memory_option,
    guidance_reuse_option,
    host_memory_option,
    json_option,
    linear_option,
    lora_highres_option,
    lora_option,
    own_loras,
    precision_option,
    set_option,
    sparse_attention_option,
    step_cache_option,
    vae_precision_option,
)
from pw_runtime.cli.plan_devices import Devices, ranks_and_memory, rates_of
from pw_runtime.cli.request import require_lora_stages
from pw_runtime.cli.sizes import preset_of, size_options
from pw_runtime.cli.source_options import source_options
from pw_runtime.cli.trained_size import untrained
from pw_runtime.errors import BadRequest
from pw_runtime.types import Blocks, Network, Prompt, Request, RunOptions, StageName

if TYPE_CHECKING:
    from pw_runtime.checkpoint.lora import Lora
    from pw_runtime.checkpoint.manifest import Networks
    from pw_runtime.planning.workload import Workload


@click.command()
@click.option("--model", type=MODEL, help="Bundle. [default: the published 5B networks]")
@click.option(
    "--preset", "--resolution", type=PresetName(), required=True, help="As for `pw generate`."
)
@set_option
@size_options
@gpu_memory_option
@host_memory_option
@click.option(
    "--gpu",
    type=click.Choice(["H200", "RTX 4090"]),
    help="Estimate times for this GPU. [default: this one]",
)
@click.option(
    "--devices",
    type=Devices(),
    help="Divide the work among several devices, one rank on each: their number, and the memory of "
    "each GPU, 8x24GiB for instance. Without a GPU that many processes share --host-memory.",
)
@click.option(
    "--link",
    type=Bytes(),
    help="Bytes per second from each device to the others, 12GiB for instance. [default: NVLink of "
    "an H200, PCIe 4.0 x16 of an RTX 4090]",
)
@click.option(
    "--target",
    help="Plan with the engines that `pw build --target` made for this GPU architecture, sm_89 for "
    "instance. [default: without engines]",
)
@click.option("--codec", type=CODECS, help="Video codec. [default: as for `pw generate`]")
@click.option("--draft-only", is_flag=True, help="Stop after the draft.")
@source_options
@lora_option
@lora_highres_option
@precision_option
@linear_option
@step_cache_option
@sparse_attention_option
@guidance_reuse_option
@vae_precision_option
@blocks_option
@chunk_option
@json_option
@click.option("--verbose", is_flag=True, help="List what is in memory at each stage's peak.")
def plan(**options: Any) -> int:
    """Show how a clip would be made within a memory budget, and what each stage takes."""
    import torch

    from pw_export.wan22_configs import NETWORKS
    from pw_runtime.checkpoint.bundle import open_bundle
    from pw_runtime.execution.block_division import (
        require_attention_precision,
        require_exact_attention,
    )
    from pw_runtime.job.checks import check_content, default_precision, require_divisible
    from pw_runtime.job.source_size import size_of_sources
    from pw_runtime.job.sources import read_sources
    from pw_runtime.models.quantized_linear import require_quantizable
    from pw_runtime.planning.candidates import candidates
    from pw_runtime.planning.plan_document import plan_document
    from pw_runtime.planning.planner import make_plan
    from pw_runtime.planning.rank_report import ranks_report
    from pw_runtime.planning.report import division_report, plan_report
    from pw_runtime.planning.time_estimate import measure_rates
    from pw_runtime.planning.workload import budget_of, everything, request_workload
    from pw_runtime.presets import preset_name

    ranks, gpu_memory = ranks_and_memory(options)
    budgeted = gpu_memory is not None
    device = torch.device("cuda" if budgeted or torch.cuda.is_available() else "cpu")
    if options["gpu"] is not None and device.type == "cpu":
        raise BadRequest(
            f"--gpu {options['gpu']} gives the times of a GPU, and this plan is for the CPU",
            got="no CUDA GPU here and no --gpu-memory",
            do="add the memory of that GPU, for instance --gpu-memory 24GiB",
        )
    precision = default_precision(options["precision"], device)
    networks = NETWORKS if options["model"] is None else open_bundle(options["model"]).networks
    prompt = Prompt(text="", image=options["image"], draft_video=options["draft_video"])
    read_sources([prompt])
    preset = preset_of(options, partial(size_of_sources, prompts=[prompt]))
    run_options = RunOptions(
        codec=options["codec"] or preset.video.usual_codec,
        precision=precision,
        vae_precision=options["vae_precision"],
        device=str(device),
        blocks=options["blocks"],
        chunk=options["chunk"],
        linear=options["linear"],
        step_cache=options["step_cache"],
        sparse_attention=options["sparse_attention"],
        guidance_reuse=options["guidance_reuse"],
        draft_only=options["draft_only"],
        image_highres=options["image_highres"],
        draft_strength=options["draft_strength"],
    )
    out = Path(os.devnull)  # where no file is: a plan has no output folder
    request = Request(prompts=(prompt,), preset=preset, out=out, options=run_options)
    check_content(request)
    if ranks > 1:
        require_divisible(run_options, divide_weights=False)
    require_attention_precision(run_options.blocks, precision)
    require_lora_stages(options, request)
    loras = _loras(networks, options)
    needed = everything(request)
    work = request_workload(networks, request, loras=loras, ranks=ranks, needed=needed)
    if options["gpu"] is not None:
        work = replace(work, rates=rates_of(options))
    budget = budget_of(device, gpu_memory, options["host_memory"], ranks=ranks)
    for config in work.transformers.values():
        require_quantizable(config, run_options.linear)
    require_exact_attention(run_options.blocks, run_options.linear)
    compared: tuple[str, ...] = ()
    if options["target"] is not None:
        if device.type == "cpu":
            raise BadRequest("--target is for a GPU", do="add its memory: --gpu-memory 16GiB")
        divisions = _divisions(work, options["target"])
        compared = tuple(division_report(divisions, budget, run_options.blocks))
        if not options["as_json"]:  # before the error that there are none
            for line in compared:
                click.echo(line)
        work = _chosen(divisions, options["target"], preset_name(preset), run_options.blocks)
    elif run_options.blocks != "segments":
        raise BadRequest(
            f"--blocks {run_options.blocks} is planned with engines that were built",
            got="no --target",
            do="add --target, sm_89 for instance, or leave --blocks out",
        )
    run_plan = make_plan(candidates(work, gpu=budget.device is not None, needed=needed), budget)
    if options["gpu"] is not None and precision != "bf16":
        raise BadRequest(
            f"the speed of --gpu {options['gpu']} is known for bf16 alone",
            got=f"--precision {precision}",
            do="add --precision bf16, or leave --gpu out: the plan then has no times",
        )
    rates = None
    if options["gpu"] is not None:
        rates = work.rates
    elif ranks == 1 and (device.type == "cpu" or not budgeted):
        rates = measure_rates(device, precision)
    warning = untrained(networks.draft.config, preset, draft_only=run_options.draft_only)
    if options["as_json"]:
        document = plan_document(work, run_plan, rates, verbose=options["verbose"])
        click.echo(json_text({**document, "divisions": compared, "warning": warning}))
        return DONE
    report = plan_report if ranks == 1 else ranks_report
    click.echo(report(work, run_plan, rates, verbose=options["verbose"]))
    if warning is not None:
        click.echo(warning)
    return DONE


def _loras(networks: Networks, options: dict[str, Any]) -> dict[StageName, tuple[Lora, ...]]:
    """Return the LoRAs, each checked against its network. Raises BadRequest, BadWeights."""
    from pw_runtime.checkpoint.lora import read_loras, transformer_configs
    from pw_runtime.checkpoint.lora_choice import lora_choice

    both, own = options["loras"], own_loras(options["loras_highres"])
    chosen = lora_choice(both, own, has_highres=networks.highres is not None)
    return read_loras(chosen, transformer_configs(networks))


def _divisions(work: Workload, target: str) -> dict[Blocks, Workload | str]:
    """Return the workload on the engines in the store for each division of a block.

    A text says what is missing. The decoder's engines are optional. Raises BadRequest where the
    target is unknown.
    """
    from pw_engines import EngineStore
    from pw_engines.tensorrt import rtx
    from pw_runtime.execution.decoder_lookup import unbaked_segments
    from pw_runtime.execution.engine_lookup import Unavailable, scratch_for
    from pw_runtime.execution.transformer_segments import segments_of

    if reason := rtx.cannot_build([target]):
        raise BadRequest("there is no plan for this target", got=reason)
    store, options = EngineStore(), work.options
    precision = options.compute_precision
    decoder: dict[Network, int] = {}
    if options.vae_precision == "fp32" and work.tiling == work.preset.decode:
        found = scratch_for(unbaked_segments(work.vae, work.preset), store, target)
        if not isinstance(found, Unavailable):
            decoder["vae"] = found

    def on_engines(blocks: Blocks) -> Workload | str:
        scratch = dict(decoder)
        for name, stage in work.stages.items():
            segments = segments_of(
                work.transformers[name],
                precision,
                options.chunk,
                options.linear,
                blocks=blocks,
                tokens=stage.tokens(work.preset.video),
            )
            found = scratch_for(segments, store, target)
            if isinstance(found, Unavailable):
                return f"{name} network, {found.reason}"
            scratch[name] = found
        divided = replace(options, blocks=blocks)
        return replace(work, options=divided, decoder_engines="vae" in scratch, scratch=scratch)

    alone = precision != "bf16" or options.linear != "exact"
    divisions = ("segments",) if alone else get_args(Blocks)
    return {blocks: on_engines(blocks) for blocks in divisions}


def _chosen(
    divisions: dict[Blocks, Workload | str], target: str, preset: str, blocks: Blocks
) -> Workload:
    """Return the workload of a division. Raises BadRequest where its engines are not built."""
    from pw_engines import EngineStore

    work = divisions[blocks]
    if not isinstance(work, str):
        return work
    more = "" if blocks == "segments" else f" --blocks {blocks} --preset {preset}"
    raise BadRequest(
        f"there are no engines for {target} in {EngineStore().root}",
        got=work,
        do=f"run `pw build --target {target}{more}` for this model, --precision and --chunk, or "
        "leave --target out",
    )
