# SPDX-License-Identifier: Apache-2.0
"""End to end: prompt in, closed video on disk, by this runtime and by others in turns.

    pw bench e2e --preset nano --out FILE

The weights were written just before: they are in the page cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pw_bench.choices import ENGINES, FAST, OURS, SPARSE, ProgramName, SyntheticSize
from pw_bench.e2e.job import Job
from pw_bench.e2e.programs import CONTENDERS, describe, why_unavailable
from pw_bench.e2e.session import Measurements, Session, compare_programs
from pw_bench.e2e.weights import Weights, make_job, pick_weights, scope_of
from pw_bench.measure.environment import envelope, identify
from pw_bench.measure.nvml import Nvml, skipped_without_gpu
from pw_bench.measure.peaks import measure_ceilings
from pw_bench.measure.timing import FULL
from pw_bench.results import Figure, Result, Skipped
from pw_engines.child import child_environment
from pw_runtime.errors import BadRequest, BadResult
from pw_runtime.job.checks import pick_device
from pw_runtime.presets import find_preset
from pw_runtime.system.packages import require_packages
from pw_runtime.system.progress import Reporter
from pw_runtime.types import Precision, Preset


def measure_e2e(
    preset_name: str,
    *,
    draft_only: bool,
    checkpoint: Path | None,
    synthetic: SyntheticSize | None,
    requested: Sequence[ProgramName],
    rounds: int,
    warm: int,
    precision: Precision | None,
    device_name: str,
) -> Result:
    """Measure prompt to video by several programs.

    Args:
        preset_name: as for `pw generate`.
        draft_only: the draft is the clip.
        checkpoint: folder of weights in the official layout.
        synthetic: size of random weights instead.
        requested: programs; if empty, all that can make the clip, without engines.
        rounds: processes of each program.
        warm: clips of each process after its first.
        precision: of the transformers; None for the device's default.
        device_name: as for `pw generate`.

    Raises BadRequest, BadWeights; BadResult where our own program makes no clip; Interrupted with
    what was measured before.
    """
    device = pick_device(device_name)
    preset = find_preset(preset_name)
    if draft_only:
        preset = replace(preset, highres=None)
    skipped = skipped_without_gpu(device)
    reporter, nvml = Reporter(), Nvml(device.index or 0)
    identity = identify(device, nvml)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = pick_weights(preset_name, checkpoint, synthetic, folder, reporter.say)
        programs = pick_programs(requested, preset, weights, device, skipped)
        job = make_job(weights, preset, folder, device, precision)
        figures: tuple[Figure, ...] = ()
        environment: dict[str, str] = {}
        if ENGINES in programs:
            figures, environment = build_engines(job, folder / "cache", reporter)
        ceilings = measure_ceilings(device, FULL)
        session = Session(
            programs=programs,
            job=job,
            folder=folder,
            rounds=rounds,
            warm=warm,
            environment=environment,
            nvml=nvml if device.type == "cuda" else None,
            reporter=reporter,
        )
        measured = compare_programs(session)
    identity = replace(identity, weights={weights.name: weights.digest})
    result = envelope("e2e", scope_of(job, weights), identity, ceilings, nvml)
    result = replace(result, sides={program: describe(program) for program in programs})
    return measured.interruption.ended_with(_filled(result, measured, figures, skipped))


def _filled(
    result: Result,
    measured: Measurements,
    figures: tuple[Figure, ...],
    skipped: list[Skipped],
) -> Result:
    """Add what was measured, after figures and skipped parts from before the session."""
    return replace(
        result,
        identity=replace(
            result.identity,
            threads=measured.threads,
            engines=measured.engines,
            operations=measured.operations,
        ),
        figures=(*figures, *measured.figures),
        clips=measured.clips,
        equivalence=measured.equivalence,
        ratios=measured.ratios,
        skipped=(*skipped, *measured.skipped),
    )


def pick_programs(
    requested: Sequence[ProgramName],
    preset: Preset,
    weights: Weights,
    device: torch.device,
    skipped: list[Skipped],
) -> tuple[ProgramName, ...]:
    """Return the programs to run, ours first.

    A program that cannot take part is added to `skipped`, or refused if it was requested.

    Raises BadRequest, MissingPackage.
    """
    on_request = (ENGINES, FAST, SPARSE)
    names = requested or tuple(name for name in CONTENDERS if name not in on_request)
    programs: list[ProgramName] = []
    for name in dict.fromkeys((OURS, *names)):
        reason = why_unavailable(
            name,
            highres=preset.highres is not None,
            gpu=device.type == "cuda",
            in_memory=weights.in_memory is not None,
        )
        if reason is None:
            programs.append(name)
        elif requested:
            do = "add --draft-only" if "high-res" in reason else f"leave --side {name} out"
            raise BadRequest(f"the program of --side {name} cannot run here", got=reason, do=do)
        else:
            skipped.append(Skipped(part=name, reason=reason))
    if len(programs) > 1:
        require_packages("the comparison of frames", "scikit-image", "scipy")
    return tuple(programs)


def build_engines(
    job: Job, cache: Path, reporter: Reporter
) -> tuple[tuple[Figure, ...], dict[str, str]]:
    """Run `pw build` into a store of its own, for the job's device and precision.

    Returns the build time, and the environment variable by which the engines are found.

    Raises BadResult where it fails; it has printed why.
    """
    reporter.say("building engines")
    environment = {"PW_CACHE": str(cache)}
    command = [sys.executable, "-m", "pw_runtime", "build", "--model", str(job.bundle)]
    command += ["--device", job.device, "--precision", job.precision]
    start = time.perf_counter()
    settings = child_environment(os.environ | environment)
    code = subprocess.run(command, env=settings, check=False).returncode
    seconds = time.perf_counter() - start
    if code != 0:
        raise BadResult("the engines could not be built", got=f"exit code {code} of `pw build`")
    return (Figure(name=f"{ENGINES}/build", unit="s", samples=(seconds,)),), environment
