# SPDX-License-Identifier: Apache-2.0
"""All measurements of a GPU machine, by one command and in parts.

    pw bench gpu-suite --out FOLDER

The published networks run with random weights, so nothing is downloaded. Each part is a results
file in FOLDER. Parts whose file is complete, of the same commit without changes and of the same GPU
are not run again, so the command can be repeated until all are there; until then its exit code is
not 0. A part does not start where the time left is less than its expected duration. The most
valuable ones come first.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from pw_bench.measure.environment import commit, is_dirty
from pw_bench.measure.interruption import REASON
from pw_bench.results import read_result
from pw_engines.child import child_environment
from pw_runtime.errors import BadRequest

SAVING: Final = 30.0  # seconds in which an interrupted part writes what it has


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One results file; seconds are those of an H200 and a reserve, of long parts an estimate."""

    name: str
    arguments: tuple[str, ...]  # of `pw bench`
    seconds: float
    long: bool = False  # only with --full
    gpus: int = 1  # that the machine must have


_5B = ("--synthetic", "5b")
PARTS = (
    Part(name="kernels-2k", arguments=("kernels", "--sizes", "2k", "--quick"), seconds=40),
    Part(
        name="e2e-2k",
        arguments=("e2e", "--preset", "2k", *_5B, "--side", "ours", "--rounds", "1", "--warm", "0"),
        seconds=170,
    ),
    Part(
        name="stages-4k",
        arguments=("stages", "--preset", "4k", *_5B, "--steps", "1", "--clips", "1", "--cold"),
        seconds=200,
    ),
    Part(
        name="stages-2k-sparse",
        arguments=("stages", "--preset", "2k", *_5B, "--clips", "1", "--cold")
        + ("--side", "ours-sparse"),
        seconds=110,
    ),
    Part(name="kernels-draft", arguments=("kernels", "--sizes", "draft"), seconds=40),
    Part(name="kernels-4k", arguments=("kernels", "--sizes", "4k", "--quick"), seconds=80),
    Part(
        name="stages-2k",
        arguments=("stages", "--preset", "2k", *_5B, "--steps", "2", "--clips", "3"),
        seconds=320,
        long=True,
    ),
    Part(
        name="e2e-2k-all",
        arguments=("e2e", "--preset", "2k", *_5B, "--rounds", "3", "--warm", "1"),
        seconds=2400,
        long=True,
    ),
    Part(
        name="e2e-4k",
        arguments=("e2e", "--preset", "4k", *_5B, "--side", "ours", "--rounds", "3"),
        seconds=3600,
        long=True,
    ),
    Part(
        name="ranks-2k",
        arguments=("ranks", "--preset", "2k", *_5B, "--steps", "1", "--rounds", "1"),
        seconds=500,
        gpus=2,
    ),
    Part(
        name="ranks-4k",
        arguments=("ranks", "--preset", "4k", *_5B, "--steps", "1", "--rounds", "3"),
        seconds=5400,
        long=True,
        gpus=2,
    ),
)


def run_parts(
    folder: Path, minutes: float, *, full: bool, gpus: int, say: Callable[[str], None]
) -> dict[str, str]:
    """Run the parts whose files are missing.

    Args:
        folder: of the results files; is created.
        minutes: time for this call.
        full: run the long parts too.
        gpus: that the machine has; parts for more of them do not run.
        say: receives the command of each part that starts.

    Returns:
        For each part that still has no file: why, and what to do about it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    until, missing = time.monotonic() + 60 * minutes, {}
    parts = [part for part in PARTS if full or not part.long]
    at_once = _at_once([part for part in parts if part.gpus <= gpus], say) if is_dirty() else None
    for part in parts:
        out = folder / f"{part.name}.json"
        if is_done(out):
            continue
        if part.gpus > gpus:
            say(f"{part.name}: left out, as it takes {part.gpus} GPUs or more, and this has {gpus}")
            continue
        left = until - time.monotonic()
        if left < part.seconds:
            enough = part.seconds < 60 * minutes
            do = "repeat the command" if enough else f"give --minutes {part.seconds / 60 + 1:.0f}"
            do = at_once or do
            missing[part.name] = f"{left:.0f} s left, {part.seconds:.0f} s expected: {do}"
            continue
        say(f"== {part.name}: pw bench {' '.join(part.arguments)}")
        command = [sys.executable, "-m", "pw_runtime", "bench", *part.arguments]
        code = _run_part([*command, "--out", str(out)])
        if code != 0 or not out.exists():
            missing[part.name] = f"it ended with exit code {code}, and printed why above"
    return missing


def _run_part(command: list[str]) -> int:
    """Run a part to its end and return its exit code; interrupted, it may write what it has."""
    with subprocess.Popen(command, env=child_environment()) as part:
        try:
            return part.wait()
        except BaseException:
            with suppress(subprocess.TimeoutExpired):  # of a terminal, the part got the signal, too
                part.wait(SAVING)
            if part.poll() is None:
                part.terminate()
            part.wait()
            raise


def _at_once(parts: Sequence[Part], say: Callable[[str], None]) -> str:
    """Say that no file of an earlier call counts; return what to do about parts without time."""
    say(f"the sources are {commit()}: files of earlier calls may be of others, and do not count")
    minutes = sum(part.seconds for part in parts) / 60 + 1
    return (
        f"give --minutes {minutes:.0f} for all parts in one call, or commit the changes "
        "(PW_COMMIT states the commit of a copy)"
    )


def is_done(out: Path) -> bool:
    """Return True where a part was measured to its end, with these sources on these GPUs.

    A file of sources that differ from their commit, or have none, is never of these sources.
    """
    try:
        result = read_result(out)
    except BadRequest:
        return False
    interrupted = any(skipped.reason == REASON for skipped in result.skipped)
    identity = result.identity
    same_sources = not identity.dirty and identity.commit == commit()
    same_gpus = [gpu.name for gpu in identity.machine.gpus] == gpu_names()
    return not interrupted and same_sources and same_gpus


def gpu_names() -> list[str]:
    """Return the names of this machine's GPUs."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
