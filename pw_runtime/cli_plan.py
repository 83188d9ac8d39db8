# SPDX-License-Identifier: Apache-2.0
"""`pw plan`: what a run will take, before anything is loaded."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import click

from pw_runtime.cli_options import DONE, FOLDER, chunk_option, precision_option
from pw_runtime.errors import BadRequest

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class Bytes(click.ParamType):  # type: ignore[type-arg]
    """A size in bytes: 24GiB, 24G, 512MiB; powers of two."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Turn the text of an option into bytes."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", value.strip().lower())
        size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
        if size <= 0:
            self.fail(f"{value!r} is no size: write 24GiB or 512MiB", param, ctx)
        return size


gpu_memory_option = click.option(
    "--gpu-memory", type=Bytes(), help="Most GPU memory to take. [default: what is free]"
)
host_memory_option = click.option(
    "--host-memory", type=Bytes(), help="Most host memory to take. [default: what is free]"
)


@click.command()
@click.option("--model", type=FOLDER, help="Bundle. [default: the published 5B networks]")
@click.option("--preset", "--resolution", required=True, help="As for `pw generate`.")
@gpu_memory_option
@host_memory_option
@click.option(
    "--gpu", type=click.Choice(["H200"]), help="Estimate times for this GPU. [default: this one]"
)
@click.option(
    "--codec",
    type=click.Choice(["h264", "hevc", "av1", "ffv1"]),
    default="h264",
    show_default=True,
)
@click.option("--draft-only", is_flag=True, help="Stop after the draft.")
@precision_option
@chunk_option
@click.option("--verbose", is_flag=True, help="List everything that lives at each stage's peak.")
def plan(**options: Any) -> int:
    """Show how a clip would be made within a budget of memory, and what each stage takes."""
    import torch

    from pw_runtime.bundle import open_bundle
    from pw_runtime.estimate import KNOWN, measure_rates
    from pw_runtime.plan_report import plan_report
    from pw_runtime.planner import ladders, make_plan
    from pw_runtime.presets import find_preset
    from pw_runtime.request import default_precision
    from pw_runtime.workload import budget_of, workload

    budgeted = options["gpu_memory"] is not None
    device = torch.device("cuda" if budgeted or torch.cuda.is_available() else "cpu")
    if options["gpu"] is not None and device.type == "cpu":
        raise BadRequest("--gpu without a GPU to plan for", do="add --gpu-memory, as 24GiB")
    precision = default_precision(options["precision"], device)
    # By name: the runtime must not import what stands above it.
    networks = (
        import_module("pw_export.published").NETWORKS
        if options["model"] is None
        else open_bundle(options["model"]).networks
    )
    work = workload(
        networks,
        find_preset(options["preset"]),
        draft_only=options["draft_only"],
        precision=precision,
        codec=options["codec"],
        chunk=options["chunk"],
    )
    budget = budget_of(device, options["gpu_memory"], options["host_memory"])
    run_plan = make_plan(ladders(work, gpu=budget.device is not None), budget)
    rates = None
    if options["gpu"] is not None:
        rates = KNOWN[options["gpu"]]
    elif device.type == "cpu" or not budgeted:
        rates = measure_rates(device, precision)
    click.echo(plan_report(work, run_plan, rates, verbose=options["verbose"]))
    return DONE
