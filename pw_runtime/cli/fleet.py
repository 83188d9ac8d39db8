# SPDX-License-Identifier: Apache-2.0
"""`pw fleet run`: many clips on many machines."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import click

from pw_runtime.cli.exit_codes import DONE, SOME_FAILED
from pw_runtime.cli.generate import generate
from pw_runtime.cli.launch import MOST
from pw_runtime.cli.options import MODEL, exit_code, with_chosen_loras
from pw_runtime.cli.request import read_request, require_lora_stages
from pw_runtime.cli.trained_size import beyond_training
from pw_runtime.system.packages import require_packages

if TYPE_CHECKING:
    from pw_runtime.fleet.layout import Node
    from pw_runtime.types import LoraFile, Outcome

# Options of `pw generate` that a fleet does not have, and the values that it runs with. All others
# are options of `pw fleet run` too, and mean the same.
LEFT_OUT: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "noise": None,
        "drafts": None,
        "spill_dir": None,
        "wait_for_disk": False,
        "fragmented": False,
        "contact_sheet": False,
        "trace": None,
        "as_json": False,
        "device": "auto",  # a GPU where workers have one
        "processes": None,
        "devices": None,
        "rank_timeout": None,
        "ulysses_size": None,
        "dit_fsdp": False,
        "t5_fsdp": False,
        "ckpt_dir": None,
        "lr_ckpt": None,
        "hr_ckpt": None,
    }
)


@click.group()
def fleet() -> None:
    """Make many clips on many machines, with Ray."""


@fleet.command()
@click.option(
    "--model", type=MODEL, required=True, help="Bundle, under this path on every machine."
)
@click.option(
    "--address",
    help="Of the Ray cluster: ray://HOST:10001, or HOST:6379 on one of its nodes. [default: "
    "RAY_ADDRESS, or else the cluster that this machine is in, or else this machine alone]",
)
@click.option(
    "--gpus-per-worker",
    type=click.IntRange(0, MOST),
    help="All on one node; several make each clip together. [default: 1 where the cluster has "
    "GPUs, otherwise 0]",
)
@click.option(
    "--processes-per-worker",
    type=click.IntRange(1, MOST),
    help="Several processes make each clip together, on CPUs of one node; GPUs have one each. "
    "[default: 1]",
)
@click.option(
    "--cpus-per-worker",
    type=click.IntRange(min=1),
    help="Also a worker's threads, those of all its processes. [default: its share of a node with "
    "GPUs, otherwise 1 per process]",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Maximum workers. [default: as many as fit]"
)
@click.option("--dry-run", is_flag=True, help="Show workers, batches and memory; start nothing.")
def run(**options: Any) -> int:
    """Make one clip per prompt, as `pw generate` does, on the workers of a Ray cluster.

    The clips are those of one `pw generate` over all prompts, whichever worker makes them. Memory
    options are for each worker.
    """
    require_packages("`pw fleet run`", "ray")
    import torch

    from pw_runtime.checkpoint.bundle import open_bundle
    from pw_runtime.fleet.cluster import RayCluster, connected, nodes
    from pw_runtime.fleet.layout import lay_out
    from pw_runtime.fleet.run import dry_run, run_fleet
    from pw_runtime.job.sources import located
    from pw_runtime.system.progress import Reporter

    reporter = Reporter(quiet=options["quiet"])
    bundle = with_chosen_loras(open_bundle(options["model"].absolute()), _absolute(options))
    with connected(options["address"], may_start=not options["dry_run"]) as there:
        layout = lay_out(
            nodes() if there else (_this_machine(),),
            options["gpus_per_worker"],
            options["cpus_per_worker"],
            options["workers"],
            options["processes_per_worker"],
        )
        device = torch.device("cuda" if layout.gpus else "cpu")
        absolute = {"out": options["out"].absolute()}
        request = read_request({**options, **LEFT_OUT, **absolute}, reporter.warn, device)
        request = replace(request, prompts=located(request.prompts))
        require_lora_stages(options, request)
        if options["dry_run"]:
            if not there:
                click.echo("no Ray cluster runs here: this machine alone would be used")
            for line in dry_run(request, bundle, layout):
                click.echo(line)
            return DONE
        if warning := beyond_training(request, bundle):
            reporter.warn(warning)
        with _stop_signals() as stopped:
            outcomes: list[Outcome] | None = None

            def make() -> list[Outcome]:
                nonlocal outcomes
                cluster = RayCluster(layout)
                outcomes = list(
                    run_fleet(request, bundle, reporter, cluster, layout, stopped.is_set)
                )
                return outcomes

            code = exit_code(make, reporter)
    if outcomes is not None and (missing := len(request.prompts) - len(outcomes)):
        seed = ["--seed", str(request.seed)] if options["seed"] < 0 else []
        reporter.warn(
            f"{missing} of {len(request.prompts)} clips are not made: "
            f"{'the run was ended' if stopped.is_set() else 'no worker is left'}\n"
            f"  do this: {_continuing(sys.argv[1:], seed)}"
        )
        code = SOME_FAILED
    return code if stopped.number is None else 128 + stopped.number


run.params += [  # shown after those above
    option
    for option in generate.params
    if option.name not in LEFT_OUT and option.name not in {known.name for known in run.params}
]


def _absolute(options: Mapping[str, Any]) -> dict[str, tuple[LoraFile, ...]]:
    """Return the LoRAs under the paths that they have on every machine."""
    return {
        name: tuple(
            lora if str(lora.path) == "none" else replace(lora, path=lora.path.absolute())
            for lora in options[name]
        )
        for name in ("loras", "loras_highres")
    }


def _continuing(arguments: list[str], seed: list[str]) -> str:
    """Return the command that makes the clips that are missing."""
    words = [word for word in arguments if word != "--fresh"]
    return shlex.join(["pw", *words, *seed])


def _this_machine() -> Node:
    """Return what a cluster on this machine alone would have."""
    import torch

    from pw_runtime.fleet.layout import Node
    from pw_runtime.system.machine import available_memory_bytes

    return Node(
        name=socket.gethostname(),
        cpus=os.cpu_count() or 1,
        gpus=torch.cuda.device_count(),
        memory_bytes=available_memory_bytes() or 0,
    )


@dataclass(slots=True)
class _Stopped:
    """The first signal that asked the run to end."""

    number: int | None = None

    def is_set(self) -> bool:
        return self.number is not None


@contextmanager
def _stop_signals() -> Iterator[_Stopped]:
    """Note the first signal that asks for an end; a second one interrupts the block.

    Entered after Ray has connected, which takes SIGTERM for itself.
    """
    from pw_runtime.cli.main import Terminated

    stopped = _Stopped()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.number is None:
            stopped.number = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise Terminated(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
