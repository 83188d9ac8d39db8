# SPDX-License-Identifier: Apache-2.0
"""Every stage by itself, out of whole clips made one after the other in one warm process.

    pw bench stages --preset nano --out FILE

What is timed is `pw generate` itself: a figure collects the spans of one kind over all clips.
Where the arithmetic of a stage is known, its share of the measured ceilings stands beside it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import click
import torch

from pw_bench.cli_e2e import NO_NVML
from pw_bench.e2e.job import Job, make_job, scope_of
from pw_bench.e2e.runtime_program import Ours
from pw_bench.e2e.weights import pick_weights, weights_options
from pw_bench.measure.environment import envelope, identify
from pw_bench.measure.nvml import Nvml
from pw_bench.measure.peaks import measure_ceilings
from pw_bench.measure.timing import FULL
from pw_bench.report.console import show
from pw_bench.results import Ceilings, Figure, Result, Skipped, require_folder, write_result
from pw_export.wan22_configs import NETWORKS
from pw_runtime.checkpoint.bundle import Networks, open_bundle
from pw_runtime.cli.options import FILE, device_option, precision_option
from pw_runtime.job.preflight import pick_device
from pw_runtime.planning.time_estimate import Rates, decode_seconds, denoise_seconds
from pw_runtime.presets import find_preset
from pw_runtime.system.progress import Reporter
from pw_runtime.system.trace import Span, Trace
from pw_runtime.types import Preset, TransformerPlan

# Spans that a figure is made of. Steps are named by the stage around them.
KINDS: Final = (
    "check networks",
    "plan",
    "check files",
    "load text encoder",
    "text",
    "load draft",
    "load highres",
    "condition",
    "latents",
    "load vae",
    "first chunk",
    "chunk",
    "pack",
    "encode",
    "mux",
    "receipt",
)
WORDS: Final = "stages of `pw generate`, clip after clip in one process"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """What a stage computes at least, and how long that takes at the ceilings."""

    flops: float
    seconds: float


def sampled(spans: Iterable[Span]) -> Iterator[tuple[str, float]]:
    """(name of a figure, seconds) for each span of a clip that a figure is of."""
    spans = list(spans)
    stages = [one for one in spans if one.name in ("draft", "highres")]
    for one in spans:
        if one.name.startswith("step "):
            around = next(s for s in stages if s.start <= one.start and one.end <= s.end)
            yield f"{around.name} step", one.end - one.start
        elif one.name in KINDS:
            yield one.name, one.end - one.start


def arithmetic(networks: Networks, preset: Preset, ceilings: Ceilings) -> dict[str, Arithmetic]:
    """Of the figures whose arithmetic is known; of steps the mean."""
    once = Rates(matmul=1.0, attention=1.0, conv=1.0, copy=1.0, source="arithmetic alone")
    best = Rates(
        matmul=ceilings.gemm.rate,
        attention=ceilings.attention.rate,
        # Libraries turn some convolutions into products, which are faster than the one measured.
        conv=max(ceilings.convolution.rate, ceilings.gemm.rate),
        copy=ceilings.copy.rate,
        source="measured",
    )
    found = {}
    entries = {"draft": networks.draft, "highres": networks.highres}
    for name, stage in preset.stages().items():
        entry = entries[name]
        assert entry is not None

        def seconds(rates: Rates, entry: Any = entry, stage: Any = stage) -> float:
            whole = denoise_seconds(entry.config, stage, preset.video, TransformerPlan(), rates)
            return whole / stage.steps

        found[f"{name} step"] = Arithmetic(flops=seconds(once), seconds=seconds(best))
    vae, last = networks.vae.config, list(preset.stages().values())[-1]

    def decoded(frames: int, rates: Rates) -> float:
        return decode_seconds(vae, last, replace(preset.video, frames=frames), rates)

    first, two = (
        Arithmetic(flops=decoded(frames, once), seconds=decoded(frames, best)) for frames in (1, 5)
    )
    later = Arithmetic(flops=two.flops - first.flops, seconds=two.seconds - first.seconds)
    return found | {"first chunk": first, "chunk": later}


def figures_of(
    clips: Iterable[Iterable[Span]],
    known: Mapping[str, Arithmetic],
    fell_back: tuple[str, ...] = (),
) -> list[Figure]:
    """One figure for each kind of span, in the order in which they first end; `fell_back` is what
    ran otherwise than asked in any clip."""
    samples: dict[str, list[float]] = {}
    for spans in clips:
        for name, seconds in sampled(spans):
            samples.setdefault(name, []).append(seconds)
    figures = [
        Figure(name=name, unit="s", samples=tuple(taken), fell_back=fell_back)
        for name, taken in samples.items()
    ]
    return [
        replace(one, flops=known[one.name].flops, of_ceiling=known[one.name].seconds / one.median)
        if one.name in known
        else one
        for one in figures
    ]


def measure_stages(
    job: Job,
    clips: int,
    ceilings: Ceilings,
    reporter: Reporter,
    skipped: list[Skipped],
    *,
    cold: bool = False,
) -> list[Figure]:
    """Make clips, one more than asked for: the first warms the process up, unless `cold`. Ctrl-C
    ends early."""
    program, device = Ours("eager"), torch.device(job.device)
    made: list[list[Span]] = []
    fell_back: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        left_out = 0 if cold else 1
        for number in range(clips + left_out):
            trace = Trace(device)
            try:
                with trace.recording():
                    program.clip(job, Path(folder) / f"{number}.mp4")
            except KeyboardInterrupt:
                if len(made) <= left_out:
                    raise
                reporter.warn("interrupted: the clips until now count")
                skipped.append(Skipped(part="the remaining clips", reason="interrupted"))
                break
            made.append(trace.spans)
            fell_back.update(program.fell_back)
            reporter.say(f"clip {number + 1} of {clips + left_out}")
    networks = NETWORKS if job.in_memory else open_bundle(job.bundle).networks
    known = arithmetic(networks, job.preset, ceilings)
    return figures_of(made[left_out:], known, tuple(sorted(fell_back)))


def shortened(preset: Preset, steps: int) -> Preset:
    """The preset with fewer steps: each of them is timed by itself."""
    draft, highres = (
        None if stage is None else replace(stage, steps=min(steps, stage.steps))
        for stage in (preset.draft, preset.highres)
    )
    assert draft is not None
    return replace(preset, draft=draft, highres=highres)


@click.command()
@click.option("--preset", required=True, help="As for `pw generate`.")
@weights_options
@click.option("--steps", type=click.IntRange(1), help="At most, of each denoising stage.")
@click.option("--clips", type=click.IntRange(1), default=5, show_default=True)
@click.option("--cold", is_flag=True, help="Do not leave out the first clip.")
@precision_option
@device_option
@click.option("--out", type=FILE, required=True, help="Results file.")
def stages(out: Path, **options: Any) -> None:
    """Measure every stage of a clip by itself, beside what this machine can do at best."""
    require_folder(out)
    device, preset = pick_device(options["device"]), find_preset(options["preset"])
    if options["steps"] is not None:
        preset = shortened(preset, options["steps"])
    reporter, nvml = Reporter(), Nvml(device.index or 0)
    skipped = [] if device.type == "cuda" else [Skipped(part=NO_NVML, reason="no CUDA GPU")]
    identity = identify(device, nvml)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = pick_weights(options, folder, reporter.say)
        job = make_job(weights, preset, folder, device, options["precision"])
        ceilings = measure_ceilings(device, FULL)
        figures = measure_stages(
            job, options["clips"], ceilings, reporter, skipped, cold=options["cold"]
        )
    words = f"{WORDS}, {'none' if options['cold'] else 'the first'} left out"
    identity = replace(identity, weights={weights.name: weights.digest})
    result: Result = replace(
        envelope("stages", scope_of(job, weights) | {"words": words}, identity, ceilings, nvml),
        figures=tuple(figures),
        skipped=tuple(skipped),
    )
    write_result(result, out)
    show(result)
    click.echo(out)
