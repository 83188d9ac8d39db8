# SPDX-License-Identifier: Apache-2.0
"""`pw plan`: what a run will take, before anything is loaded."""

from __future__ import annotations

from typing import Any

import click

from pw_runtime.cli.exit_codes import DONE
from pw_runtime.cli.options import (
    CODECS,
    FOLDER,
    chunk_option,
    gpu_memory_option,
    host_memory_option,
    precision_option,
    vae_precision_option,
)
from pw_runtime.errors import BadRequest
from pw_runtime.types import RunOptions


@click.command()
@click.option("--model", type=FOLDER, help="Bundle. [default: the published 5B networks]")
@click.option("--preset", "--resolution", required=True, help="As for `pw generate`.")
@gpu_memory_option
@host_memory_option
@click.option(
    "--gpu", type=click.Choice(["H200"]), help="Estimate times for this GPU. [default: this one]"
)
@click.option("--codec", type=CODECS, default="h264", show_default=True, help="Video codec.")
@click.option("--draft-only", is_flag=True, help="Stop after the draft.")
@precision_option
@vae_precision_option
@chunk_option
@click.option("--verbose", is_flag=True, help="List what is in memory at each stage's peak.")
def plan(**options: Any) -> int:
    """Show how a clip would be made within a memory budget, and what each stage takes."""
    import torch

    from pw_export.wan22_configs import NETWORKS
    from pw_runtime.checkpoint.bundle import open_bundle
    from pw_runtime.job.preflight import default_precision
    from pw_runtime.planning.candidates import candidates
    from pw_runtime.planning.planner import make_plan
    from pw_runtime.planning.report import plan_report
    from pw_runtime.planning.time_estimate import KNOWN, measure_rates
    from pw_runtime.planning.workload import budget_of, workload
    from pw_runtime.presets import find_preset

    budgeted = options["gpu_memory"] is not None
    device = torch.device("cuda" if budgeted or torch.cuda.is_available() else "cpu")
    if options["gpu"] is not None and device.type == "cpu":
        raise BadRequest("--gpu without a GPU to plan for", do="add --gpu-memory, e.g. 24GiB")
    precision = default_precision(options["precision"], device)
    networks = NETWORKS if options["model"] is None else open_bundle(options["model"]).networks
    run_options = RunOptions(
        codec=options["codec"],
        precision=precision,
        vae_precision=options["vae_precision"],
        device=str(device),
        chunk=options["chunk"],
        draft_only=options["draft_only"],
    )
    work = workload(networks, find_preset(options["preset"]), run_options)
    budget = budget_of(device, options["gpu_memory"], options["host_memory"])
    run_plan = make_plan(candidates(work, gpu=budget.device is not None), budget)
    if options["gpu"] is not None and precision != "bf16":
        raise BadRequest(
            "published rates of a GPU are for bf16",
            got=f"--gpu {options['gpu']} --precision {precision}",
            do="leave --gpu out: the plan then has no times",
        )
    rates = None
    if options["gpu"] is not None:
        rates = KNOWN[options["gpu"]]
    elif device.type == "cpu" or not budgeted:
        rates = measure_rates(device, precision)
    click.echo(plan_report(work, run_plan, rates, verbose=options["verbose"]))
    return DONE
