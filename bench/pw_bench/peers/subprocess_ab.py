# SPDX-License-Identifier: Apache-2.0
"""Contenders that compute the same, side by side: a process for every sample, in turns.

A module that compares has a function `prepare(contender, work)`. The parent starts the module as
a child for every sample (`run_in_turns`); as `__main__` the module calls `serve`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from pw_bench.measure.tensor_ledger import Ledger
from pw_bench.result_sections import Ratio
from pw_bench.results import Figure
from pw_engines.child import child_environment, end_with_parent
from pw_runtime.errors import BadResult
from pw_runtime.system.machine import peak_rss_bytes, reset_peak_rss, rss_bytes

Run = Callable[[], Tensor]
# Contender and work -> the function to measure, and the weights and inputs that it does not count.
Prepare = Callable[[str, Any], tuple[Run, Iterable[Tensor]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run in a process of its own.

    Attributes:
        seconds: wall time; 0 where tensors were counted.
        cpu_seconds: CPU time of all threads.
        peak_bytes: resident memory beyond what the process held before; or, where tensors were
            counted, their bytes beyond weights and inputs.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trials:
    """All processes of one contender."""

    samples: tuple[Sample, ...]
    tensor_bytes: int  # peak of its tensors, beyond weights and inputs
    output: Tensor


def run_in_turns(
    module: str, contenders: Sequence[str], work: object, rounds: int
) -> dict[str, Trials]:
    """Run all contenders in turns, `rounds` times; then count the tensors of each once.

    Args:
        module: name of the module that serves as child.
        contenders: names.
        work: what is computed, a dataclass; the same for all.
        rounds: samples of each contender.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    trials = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "output.pt"
        for _ in range(rounds):
            for name in contenders:
                samples[name].append(run_child(module, name, work, file, count_tensors=False))
        for name in contenders:
            counted = run_child(module, name, work, file, count_tensors=True).peak_bytes
            trials[name] = Trials(
                samples=tuple(samples[name]), tensor_bytes=counted, output=torch.load(file)
            )
    return trials


def run_child(
    module: str, contender: str, work: object, file: Path, *, count_tensors: bool
) -> Sample:
    """Run one sample in a process of its own; its output goes to `file`."""
    mode = "tensors" if count_tensors else "time"
    child = subprocess.run(
        [sys.executable, "-m", module, contender, str(file), mode],
        check=True,
        env=child_environment(),
        input=TypeAdapter(type(work)).dump_json(work).decode(),
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    return TypeAdapter(Sample).validate_json(child.stdout.splitlines()[-1])


def serve(work_type: type, prepare: Prepare) -> None:
    """Be the child of `run_child`: read the work from stdin, write the sample to stdout."""
    end_with_parent()
    contender, file, mode = sys.argv[1:]
    adapter: TypeAdapter[Any] = TypeAdapter(work_type)
    work = adapter.validate_json(sys.stdin.read())
    sample = measure(*prepare(contender, work), Path(file), count_tensors=mode == "tensors")
    print(TypeAdapter(Sample).dump_json(sample).decode())


def measure(run: Run, held: Iterable[Tensor], file: Path, *, count_tensors: bool) -> Sample:
    """Run once and save the output.

    Args:
        run: one sample.
        held: weights and inputs, which are not counted.
        file: for the output.
        count_tensors: count tensors, without timing, instead of resident memory.
    """
    if count_tensors:
        with Ledger() as ledger:
            ledger.enter(held, "held")
            before = ledger.live["cpu"]
            output = run()
        sample = Sample(seconds=0.0, cpu_seconds=0.0, peak_bytes=ledger.peak["cpu"] - before)
    else:
        before = reset_peak()
        start, cpu = time.perf_counter(), time.process_time()
        output = run()
        sample = Sample(
            seconds=time.perf_counter() - start,
            cpu_seconds=time.process_time() - cpu,
            peak_bytes=peak_rss_bytes() - before,
        )
    torch.save(output, file)
    return sample


def reset_peak() -> int:
    """Reset this process's peak of resident memory; return what it holds now, in bytes.

    Raises BadResult where the system cannot.
    """
    if not reset_peak_rss():
        raise BadResult(
            "the peak of resident memory cannot be reset",
            got="/proc/self/clear_refs is not writable",
            do="measure memory on Linux",
        )
    return rss_bytes()


def figures_of(trials: Mapping[str, Trials]) -> tuple[Figure, ...]:
    """Return times, process memory and counted tensors of every contender."""
    figures = []
    for name, trial in trials.items():
        seconds, cpu, peaks = (
            tuple(getattr(sample, field) for sample in trial.samples)
            for field in ("seconds", "cpu_seconds", "peak_bytes")
        )
        figures += [
            Figure(name=f"{name}/time", unit="s", samples=seconds),
            Figure(name=f"{name}/CPU time", unit="s", samples=cpu),
            Figure(name=f"{name}/process memory", unit="B", samples=peaks),
            Figure(name=f"{name}/tensors", unit="B", samples=(trial.tensor_bytes,), counted=True),
        ]
    return tuple(figures)


def ratios_of(figures: Iterable[Figure], ours: str, others: Sequence[str]) -> tuple[Ratio, ...]:
    """Return the ratios of medians, ours against each other contender."""
    medians = {figure.name: figure.median for figure in figures}

    def quotient(measure: str, above: str, below: str) -> float | None:
        divisor = medians[f"{below}/{measure}"]  # a small run may need no new pages
        return medians[f"{above}/{measure}"] / divisor if divisor else None

    return tuple(
        Ratio(
            side=ours,
            against=other,
            time=quotient("time", other, ours),
            cpu_time=quotient("CPU time", other, ours),
            memory=quotient("process memory", ours, other),
            tensors=quotient("tensors", ours, other),
        )
        for other in others
    )
