# SPDX-License-Identifier: Apache-2.0
"""`pw bench e2e`: options, weights and noise of a comparison, its table and its file."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch

from pw_bench.e2e.job import Job, make_job, scope_of
from pw_bench.e2e.programs import ENGINES, OURS, SIDES, told, why_not
from pw_bench.e2e.run import run_all
from pw_bench.e2e.weights import Weights, pick_weights, weights_options
from pw_bench.measure.environment import envelope, identify
from pw_bench.measure.nvml import Nvml
from pw_bench.measure.peaks import measure_ceilings
from pw_bench.measure.timing import FULL
from pw_bench.report.console import show
from pw_bench.results import Figure, Skipped, require_folder, write_result
from pw_runtime.cli.options import FILE, device_option, precision_option
from pw_runtime.errors import BadRequest, BadResult
from pw_runtime.job.preflight import pick_device
from pw_runtime.presets import find_preset
from pw_runtime.system.progress import Reporter
from pw_runtime.types import Preset

NO_NVML = "memory, power and energy by NVML"


@click.command()
@click.option("--preset", required=True, help="As for `pw generate`.")
@click.option("--draft-only", is_flag=True, help="The draft is the clip.")
@weights_options
@click.option(
    "--side",
    "sides",
    multiple=True,
    type=click.Choice([*SIDES]),
    help="Program; may be repeated. [default: all that can make the clip, without engines]",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--warm", type=click.IntRange(0), default=2, show_default=True, help="Per process.")
@precision_option
@device_option
@click.option("--out", type=FILE, required=True, help="Results file.")
def e2e(out: Path, **options: Any) -> None:
    """Measure prompt to video, beside other programs: time, memory, equivalence."""
    require_folder(out)
    device = pick_device(options["device"])
    preset = find_preset(options["preset"])
    if options["draft_only"]:
        preset = replace(preset, highres=None)
    skipped = [] if device.type == "cuda" else [Skipped(part=NO_NVML, reason="no CUDA GPU")]
    reporter, nvml = Reporter(), Nvml(device.index or 0)
    identity = identify(device, nvml)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = pick_weights(options, folder, reporter.say)
        sides = pick_sides(options["sides"], preset, weights, device, skipped)
        job = make_job(weights, preset, folder, device, options["precision"])
        figures: tuple[Figure, ...] = ()
        environment: dict[str, str] = {}
        if ENGINES in sides:
            figures, environment = build_engines(job, folder / "cache", reporter)
        ceilings = measure_ceilings(device, FULL)
        taken = run_all(
            sides,
            job,
            folder,
            rounds=options["rounds"],
            warm=options["warm"],
            environment=environment,
            nvml=nvml if device.type == "cuda" else None,
            reporter=reporter,
        )
    identity = replace(
        identity,
        weights={weights.name: weights.digest},
        threads=taken.threads,
        engines=taken.engines,
        operations=taken.operations,
    )
    result = replace(
        envelope("e2e", scope_of(job, weights), identity, ceilings, nvml),
        figures=(*figures, *taken.figures),
        sides={side: told(side) for side in sides},
        clips=taken.clips,
        equivalence=taken.equivalence,
        ratios=taken.ratios,
        skipped=(*skipped, *taken.skipped),
    )
    write_result(result, out)
    show(result)
    click.echo(out)


def pick_sides(
    wanted: tuple[str, ...],
    preset: Preset,
    weights: Weights,
    device: torch.device,
    skipped: list[Skipped],
) -> tuple[str, ...]:
    """The programs to run, ours first; those that cannot are skipped, or refused if asked for.

    Raises BadRequest.
    """
    names = wanted or tuple(name for name in SIDES if name != ENGINES)
    sides = []
    for name in dict.fromkeys((OURS, *names)):
        reason = why_not(
            name,
            highres=preset.highres is not None,
            gpu=device.type == "cuda",
            in_memory=weights.in_memory,
        )
        if reason is None:
            sides.append(name)
        elif wanted:
            do = "add --draft-only" if "high-res" in reason else f"leave --side {name} out"
            raise BadRequest(f"--side {name} cannot run", got=reason, do=do)
        else:
            skipped.append(Skipped(part=name, reason=reason))
    if len(sides) > 1 and find_spec("skimage") is None:
        raise BadRequest(
            "frames cannot be compared", got="no scikit-image", do="pip install '.[bench]'"
        )
    return tuple(sides)


def build_engines(
    job: Job, cache: Path, reporter: Reporter
) -> tuple[tuple[Figure, ...], dict[str, str]]:
    """`pw build` into a store of its own, as the job will ask for engines: its time, and the
    variable by which it is found.

    Raises BadResult where it fails; it has said why.
    """
    reporter.say("building engines")
    environment = {"PW_CACHE": str(cache)}
    command = [sys.executable, "-m", "pw_runtime", "build", "--model", str(job.bundle)]
    command += ["--device", job.device, "--precision", job.precision]
    start = time.perf_counter()
    code = subprocess.run(command, env=os.environ | environment, check=False).returncode
    seconds = time.perf_counter() - start
    if code != 0:
        raise BadResult("the engines could not be built", got=f"exit code {code} of `pw build`")
    return (Figure(name=f"{ENGINES}/build", unit="s", samples=(seconds,)),), environment
