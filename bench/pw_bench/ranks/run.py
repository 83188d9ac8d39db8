# SPDX-License-Identifier: Apache-2.0
"""One clip by several processes together, on a CPU or on GPUs, beside the same clip by one.

    pw bench ranks --preset bench/results/ranks.toml --synthetic large --out FILE

Setups take turns (A B C A B C), with new processes for every clip. On a CPU all have as many
threads together: one process has T, each of N has T / N. Latents and frames of a setup are compared
with those of one process that has as many threads as each of the N.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pw_bench.choices import SyntheticSize
from pw_bench.e2e.stages import limit_steps
from pw_bench.e2e.weights import Weights, make_job, pick_weights, scope_of
from pw_bench.measure.environment import envelope, identify
from pw_bench.measure.nvml import Nvml, skipped_without_gpu
from pw_bench.ranks.processes import RanksClip, Setup, make_clip
from pw_bench.ranks.program import CLIP, RankTask
from pw_bench.result_sections import OutputDifference, Ratio
from pw_bench.results import Figure, Result
from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.errors import BadRequest
from pw_runtime.job.checks import pick_device
from pw_runtime.job.latents import SUFFIX
from pw_runtime.presets import find_preset
from pw_runtime.stages.codecs import suffix
from pw_runtime.system.video_input import video_frames
from pw_runtime.types import Precision


def measure_ranks(
    preset_name: str,
    *,
    model: Path | None,
    synthetic: SyntheticSize | None,
    counts: Sequence[int],
    threads: int | None,
    rounds: int,
    steps: int | None,
    chunk: int,
    precision: Precision | None,
    device_name: str,
    say: Callable[[str], None],
) -> Result:
    """Measure a clip by each number of processes, with whole and with divided weights.

    Args:
        preset_name: as for `pw generate`.
        model: bundle.
        synthetic: size of random weights instead.
        counts: numbers of processes; empty: one, and what the machine has. One is always measured.
        threads: of all processes together, on a CPU; None: its cores.
        rounds: clips of each setup.
        steps: of each denoising stage, at most.
        chunk: most tokens in a call; a pass is divided among no more processes than it has calls.
        precision: of the transformers; None for the device's default.
        device_name: "auto", "cpu" or "cuda".
        say: receives progress.

    Raises BadRequest, BadWeights, BadResult where a clip cannot be made.
    """
    device = pick_device(device_name)
    setups = setups_for(device, counts, threads)
    preset = find_preset(preset_name)
    if steps is not None:
        preset = limit_steps(preset, steps)
    nvml = Nvml(0)
    identity = identify(device, nvml)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = _weights(preset_name, model, synthetic, folder, say)
        job = replace(make_job(weights, preset, folder, device, precision), codec="ffv1")
        task = RankTask(job=job, folder=folder, divide_weights=False, chunk=chunk)
        task = _with_attention(task, setups[0], say)
        clips = _in_turns(task, setups, rounds, say)
        differences = _differences(task, setups, say)
    scope = scope_of(job, weights) | {
        "words": "a clip by processes that `pw generate` starts for --processes; ours, --policy "
        "eager, lossless video",
        "processes": ", ".join(setup.name for setup in setups),
        "chunk": str(chunk),
    }
    figures = tuple(
        figure for setup in setups for figure in figures_of(setup.name, clips[setup.name])
    )
    first = clips[setups[0].name][0].records[0]
    identity = replace(
        identity,
        weights={weights.name: weights.digest},
        engines=first.engines,
        operations=first.operations,
        threads=setups[0].threads or identity.threads,
    )
    return replace(
        envelope("ranks", scope, identity, nvml=nvml),
        figures=figures,
        sides={name: "; ".join(made[0].records[0].decisions) for name, made in clips.items()},
        ratios=tuple(
            ratio for setup in setups[1:] for ratio in ratios_of(figures, setup, setups[0])
        ),
        differences=differences,
        skipped=tuple(skipped_without_gpu(device)),
    )


def setups_for(
    device: torch.device, counts: Sequence[int], threads: int | None
) -> tuple[Setup, ...]:
    """Return the setups: one process first, then each number, with whole and divided weights.

    Raises BadRequest for more processes than the machine can serve.
    """
    if device.index is not None:
        raise BadRequest(
            "`pw bench ranks` takes a GPU for each process",
            got=f"--device {device}",
            do="give --device cuda, and choose GPUs by CUDA_VISIBLE_DEVICES",
        )
    gpus = torch.cuda.device_count() if device.type == "cuda" else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    places = gpus or threads or cores or 1
    what = "GPUs" if gpus else "threads"
    several = sorted({*counts} - {1})
    if not several:  # threads are divided evenly, and a GPU is left over without harm
        several = [n for n in (2, 4, 8) if n <= places and (gpus or places % n == 0)]
    if not several:
        raise BadRequest(
            "`pw bench ranks` compares several processes with one",
            got=f"{places} {what}",
            do="run it on a machine with more" + ("" if gpus else ", or give --threads"),
        )
    for count in several:
        if count > places or (gpus is None and places % count):
            raise BadRequest(
                f"{count} processes cannot share {places} {what} evenly",
                do="give other --counts" + ("" if gpus else ", or --threads, a multiple of them"),
            )

    def setup(count: int, *, divided: bool) -> Setup:
        each = None if gpus else places // count
        return Setup(processes=count, threads=each, divide_weights=divided)

    return (
        setup(1, divided=False),
        *(setup(count, divided=divided) for count in several for divided in (False, True)),
    )


def _weights(
    preset: str,
    model: Path | None,
    synthetic: SyntheticSize | None,
    folder: Path,
    say: Callable[[str], None],
) -> Weights:
    """Return the weights of --model or --synthetic, else the built-in ones. Raises BadRequest."""
    if model is None:
        return pick_weights(preset, None, synthetic, folder, say)
    if synthetic is not None:
        raise BadRequest("--model and --synthetic both name the weights", do="leave one out")
    bundle = open_bundle(model)
    digest = f"sha256:{bundle.digest}"
    return Weights(name=model.name, checkpoint=model, bundle=model.resolve(), digest=digest)


def _with_attention(task: RankTask, setup: Setup, say: Callable[[str], None]) -> RankTask:
    """Return the task with the attention that a clip of its own settles, on GPUs.

    Otherwise the first clip that is timed would measure attention, and compile kernels for all.
    """
    if setup.threads is not None:
        return task
    say(f"{setup.name}: not timed, to measure attention and compile kernels")
    _make(task, setup)
    receipt = json.loads((_folder(task, setup) / f"{CLIP}.json").read_text(encoding="utf-8"))
    return replace(task, attention=receipt["options"]["attention"])


def _in_turns(
    task: RankTask, setups: Sequence[Setup], rounds: int, say: Callable[[str], None]
) -> dict[str, list[RanksClip]]:
    """Make `rounds` clips by each setup, in turns; the files of the last of each are kept."""
    clips: dict[str, list[RanksClip]] = {setup.name: [] for setup in setups}
    for number in range(1, rounds + 1):
        for setup in setups:
            clip = _make(task, setup)
            clips[setup.name].append(clip)
            seconds = ", ".join(f"{name} {x.seconds:.1f} s" for name, x in clip.samples.items())
            say(f"round {number}/{rounds} {setup.name}: {seconds}")
    return clips


def _make(task: RankTask, setup: Setup) -> RanksClip:
    """Make a clip in an empty folder of the setup's."""
    folder = _folder(task, setup)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return make_clip(replace(task, folder=folder, divide_weights=setup.divide_weights), setup)


def _folder(task: RankTask, setup: Setup) -> Path:
    return task.folder / setup.name


def figures_of(name: str, clips: Sequence[RanksClip]) -> Iterable[Figure]:
    """Yield times and memory by stage, the memory of each rank, and the bytes that were sent."""
    fell_back = tuple(text for clip in clips for text in clip.records[0].fallbacks)
    memory = "GPU memory" if "device" in clips[0].records[0].peaks else "process memory"
    for stage in clips[0].samples:
        samples = [clip.samples[stage] for clip in clips]
        times = {
            "time": tuple(sample.seconds for sample in samples),
            "CPU time": tuple(sample.cpu_seconds for sample in samples),
        }
        side = f"{stage}, {name}"
        for measure, values in times.items():
            yield Figure(name=f"{side}/{measure}", unit="s", samples=values, fell_back=fell_back)
        yield Figure(
            name=f"{side}/{memory if stage == 'clip' else 'process memory'}",
            unit="B",
            samples=tuple(max(sample.memory) for sample in samples),
            fell_back=fell_back,
        )
    ranks = zip(*(clip.samples["clip"].memory for clip in clips), strict=True)
    for rank, peaks in enumerate(ranks):
        yield Figure(name=f"{name}, rank {rank}/{memory}", unit="B", samples=peaks)
    for kind, size in clips[0].sent.items():
        yield Figure(name=f"{name}/sent/{kind}", unit="B", samples=(size,), counted=True)


def ratios_of(figures: Iterable[Figure], setup: Setup, one: Setup) -> Iterable[Ratio]:
    """Yield the ratios of medians of each stage, several processes against one."""
    found = {figure.name: figure for figure in figures}
    medians = {name: figure.median for name, figure in found.items()}
    for stage in ("draft", "highres", "decode", "clip"):
        ours, other = f"{stage}, {setup.name}", f"{stage}, {one.name}"
        if f"{ours}/time" not in found:
            continue
        fell_back = [*found[f"{ours}/time"].fell_back, *found[f"{other}/time"].fell_back]
        if fell_back:
            yield Ratio(side=ours, against=other, refused=f"fell back: {'; '.join(fell_back)}")
            continue
        memory = "GPU memory" if f"{ours}/GPU memory" in found else "process memory"
        yield Ratio(
            side=ours,
            against=other,
            time=medians[f"{other}/time"] / medians[f"{ours}/time"],
            cpu_time=medians[f"{other}/CPU time"] / medians[f"{ours}/CPU time"],
            memory=medians[f"{ours}/{memory}"] / medians[f"{other}/{memory}"],
        )


def _differences(
    task: RankTask, setups: Sequence[Setup], say: Callable[[str], None]
) -> tuple[OutputDifference, ...]:
    """Compare the files of every setup with those of one process.

    Both with one of as many threads as each of the setup's, and with the one that is timed.
    """
    one, several = setups[0], setups[1:]
    alike = {setup.threads: replace(one, threads=setup.threads) for setup in several}
    for setup in alike.values():
        if setup != one:
            say(f"{setup.name}: for comparison")
            _make(task, setup)
    differences: dict[tuple[str, str], OutputDifference] = {}
    for setup in several:
        for other in (alike[setup.threads], one):
            for stage, found in _compared(_folder(task, setup), _folder(task, other)):
                sides = f"{stage}, {setup.name}", f"{stage}, {other.name}"
                differences[sides] = replace(found, side=sides[0], against=sides[1])
    return tuple(differences.values())


def _compared(folder: Path, reference: Path) -> Iterable[tuple[str, OutputDifference]]:
    """Yield how the clip in one folder differs from that in another, by stage."""
    latents, others = (load_file(path / f"{CLIP}{SUFFIX}") for path in (folder, reference))
    for stage in ("draft", "highres"):
        if (name := f"{stage}_latent") in latents:
            yield stage, _difference([(latents[name], others[name])], "latent")
    for stage in ("decode", "clip"):
        pairs = zip(_frames(folder), _frames(reference), strict=True)
        yield stage, _difference(pairs, "levels of 255")


def _frames(folder: Path) -> Iterable[Tensor]:
    """Yield the frames of a clip, [H, W, 3] in levels of 255."""
    for frame in video_frames(folder / f"{CLIP}{suffix('ffv1')}"):
        yield torch.from_numpy(frame.to_ndarray(format="rgb24"))


def _difference(pairs: Iterable[tuple[Tensor, Tensor]], unit: str) -> OutputDifference:
    """Compare all values of pairs of tensors; the sides are the caller's to name."""
    worst, differing, total = 0.0, 0, 0
    for x, other in pairs:
        change = (x.float() - other.float()).abs()
        worst = max(worst, change.max().item())
        differing, total = differing + int(change.count_nonzero()), total + change.numel()
    share = differing / total
    return OutputDifference(side="", against="", max_abs=worst, unit=unit, share=share)
