# SPDX-License-Identifier: Apache-2.0
"""`pw bench e2e`: options, weights and noise of a comparison, its table and its file."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from pw_bench.ceilings import measure_ceilings
from pw_bench.e2e import run_all
from pw_bench.identity import envelope, identify
from pw_bench.job import SCOPE, Job
from pw_bench.nvml import Nvml
from pw_bench.programs import OURS, SIDES, why_not
from pw_bench.results import Skipped, write_result
from pw_bench.shown import show
from pw_bench.timing import FULL
from pw_bench.weights import Weights, pick_weights, weights_options
from pw_runtime.atomic import write_tensors
from pw_runtime.cli_options import FILE, device_option, precision_option
from pw_runtime.errors import BadRequest
from pw_runtime.noise import draw_noise, latent_shape, seeds_for
from pw_runtime.presets import find_preset
from pw_runtime.progress import Reporter
from pw_runtime.request import default_precision, pick_device
from pw_runtime.types import OFFICIAL_NEGATIVE, Preset

PROMPT = "a red ball rolls over green grass, the camera follows it"
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
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--warm", type=click.IntRange(0), default=2, show_default=True, help="Per process.")
@precision_option
@device_option
@click.option("--out", type=FILE, required=True, help="Results file.")
def e2e(out: Path, **options: Any) -> None:
    """Measure prompt to video, beside other programs: time, memory, equivalence."""
    device = pick_device(options["device"])
    preset = find_preset(options["preset"])
    if options["draft_only"]:
        preset = replace(preset, highres=None)
    skipped = [] if device.type == "cuda" else [Skipped(part=NO_NVML, reason="no CUDA GPU")]
    reporter, nvml = Reporter(), Nvml()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = pick_weights(options["checkpoint"], options["synthetic"], folder, reporter.say)
        sides = pick_sides(options["sides"], preset, weights, device, skipped)
        job = Job(
            checkpoint=weights.checkpoint,
            bundle=weights.bundle,
            prompt=PROMPT,
            negative=OFFICIAL_NEGATIVE,
            preset=preset,
            noise=write_noise(preset, folder / "noise.safetensors"),
            device=str(device),
            precision=default_precision(options["precision"], device),
            codec="h264",
            in_memory=weights.in_memory,
        )
        names = {weights.name: weights.digest}
        identity = identify(device, nvml, weights=names, engines={})
        ceilings = measure_ceilings(device, FULL)
        taken = run_all(
            sides,
            job,
            folder,
            rounds=options["rounds"],
            warm=options["warm"],
            environment={},
            reporter=reporter,
        )
    identity = replace(identity, threads=taken.threads, engines=taken.engines)
    result = replace(
        envelope("e2e", scope_of(job, weights), identity, ceilings, nvml),
        figures=taken.figures,
        sides={side: SIDES[side].what for side in sides},
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
    names = wanted or tuple(name for name in SIDES if name != "ours-engines")
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
            do = "add --draft-only" if "high-res" in reason else "install it, or leave it out"
            raise BadRequest(f"--side {name} cannot run", got=reason, do=do)
        else:
            skipped.append(Skipped(part=name, reason=reason))
    return tuple(sides)


def write_noise(preset: Preset, path: Path) -> Path:
    """The noise that `pw generate --seed 0` draws for the first prompt, in a file for all."""
    seeds = seeds_for(0, 1)
    noise = {
        f"{stage}_noise": draw_noise(
            latent_shape(plan, preset.video), getattr(seeds, stage), torch.device("cpu")
        )
        for stage, plan in preset.stages().items()
    }
    write_tensors(path, noise)
    return path


def scope_of(job: Job, weights: Weights) -> dict[str, str]:
    """What is measured. Results compare where this is equal."""
    scope = {"words": SCOPE}
    for stage, plan in job.preset.stages().items():
        scope[stage] = (
            f"{plan.width}x{plan.height}, {plan.steps} steps of {plan.solver}, "
            f"shift {plan.shift}, guidance {plan.guidance}"
        )
    video = job.preset.video
    return scope | {
        "video": f"{video.frames} frames at {video.fps} per second, {job.codec}",
        "decode": f"{job.preset.decode.strips} strips in the official recipe",
        "weights": weights.name,
        "precision": job.precision,
        "device": job.device,
        "files": "in the page cache",
    }
