# SPDX-License-Identifier: Apache-2.0
"""Programs that compute the same, side by side: a process of its own for every sample, in turns.

A program that compares has two commands in one. Without `--side` it starts itself for every sample
(`in_turns`); with it, it is such a sample (`report`).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pw_bench.measure.tensor_ledger import Ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run in a process of its own; `peak_bytes` beyond what lay there before it."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What the processes of one side gave."""

    samples: list[Sample]
    ledger_bytes: int  # most that its tensors took at once, beside weights and inputs
    output: Tensor

    @property
    def seconds(self) -> float:
        """Wall seconds, at best."""
        return min(one.seconds for one in self.samples)

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds, at best."""
        return min(one.cpu_seconds for one in self.samples)

    @property
    def peak_bytes(self) -> int:
        """Resident bytes, at most."""
        return max(one.peak_bytes for one in self.samples)

    def __str__(self) -> str:
        return (
            f"{self.seconds:6.1f} s and {self.cpu_seconds:6.1f} CPU s at best, "
            f"process +{self.peak_bytes / 2**20:5.0f} MiB, "
            f"tensors {self.ledger_bytes / 2**20:5.0f} MiB"
        )

    def against(self, other: Taken) -> str:
        """How much faster than another side, and what share of its memory."""
        theirs = max(other.peak_bytes, 1)  # a small run may find all its pages there
        return (
            f"{other.seconds / self.seconds:.2f} x as fast "
            f"({other.cpu_seconds / self.cpu_seconds:.2f} x in CPU seconds), "
            f"{self.peak_bytes / theirs:.2f} of its process memory, "
            f"{self.ledger_bytes / other.ledger_bytes:.2f} of its tensors"
        )


def in_turns(module: str, names: Sequence[str], args: list[str], rounds: int) -> dict[str, Taken]:
    """All sides in turns, `rounds` times, then the account of each.

    Args:
        module: whose command takes `--side NAME --out FILE [--account]`, and calls `report`.
        names: of the sides.
        args: of the command, for all sides.
        rounds: samples of each side.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    taken = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "output.pt"
        for _ in range(rounds):
            for name in names:
                samples[name].append(run_child(module, [*args, "--side", name, "--out", str(file)]))
        for name in names:
            command = [*args, "--side", name, "--out", str(file), "--account"]
            account = run_child(module, command).peak_bytes
            output = torch.load(file)
            taken[name] = Taken(samples=samples[name], ledger_bytes=account, output=output)
    return taken


def run_child(module: str, args: list[str]) -> Sample:
    """Run a command that ends with `report`."""
    command = [sys.executable, "-m", module, *args]
    return parsed(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def parsed(printed: str) -> Sample:
    """What `report` printed, last of all that a child did."""
    seconds, cpu_seconds, peak = printed.split()[-3:]
    return Sample(seconds=float(seconds), cpu_seconds=float(cpu_seconds), peak_bytes=int(peak))


def report(run: Callable[[], Tensor], held: Iterable[Tensor], *, account: bool, file: Path) -> None:
    """In a child: run once, write the output; print seconds, CPU seconds and bytes for the parent.

    Args:
        run: one sample.
        held: weights and inputs, which are no part of what `run` takes.
        account: count tensors, for which no time is taken, instead of resident memory.
        file: for the output.
    """
    if account:
        with Ledger() as ledger:
            ledger.enter(held, "held")
            before, seconds, cpu_seconds = ledger.live["cpu"], 0.0, 0.0
            output = run()
        peak = ledger.peak["cpu"] - before
    else:
        before = reset_peak()
        start, cpu = time.perf_counter(), time.process_time()
        output = run()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        peak = process_bytes("VmHWM") - before
    torch.save(output, file)
    print(seconds, cpu_seconds, peak)


def process_bytes(key: str) -> int:
    """A size of this process as Linux states it: VmRSS, or VmHWM, the most it has been."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def reset_peak() -> int:
    """Begin the process's peak anew; resident bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return process_bytes("VmRSS")
