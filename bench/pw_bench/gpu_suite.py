# SPDX-License-Identifier: Apache-2.0
"""Everything that is measured on a GPU machine, by one command and in parts.

    python -m pw_bench.gpu_suite --out FOLDER

The published networks run with random weights, so nothing is downloaded. Each part is a results
file in FOLDER; parts whose file is there, whole and of the same commit, are not run again, so the
command can be repeated until all are there; until then its exit code is not 0. A part is not begun
where the time left is less than it is expected to take.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from pw_bench.measure.commit import commit
from pw_bench.report.console import show
from pw_bench.results import read_result
from pw_runtime.cli.options import FOLDER, SOME_FAILED
from pw_runtime.errors import BadRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One results file; seconds are guessed from the arithmetic of an H200."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    long: bool = False  # only with --full


_5B = ("--synthetic", "5b")
PARTS = (
    Part(name="kernels-draft", arguments=("kernels", "--sizes", "draft"), seconds=40),
    Part(
        name="e2e-2k",
        arguments=("e2e", "--preset", "2k", *_5B, "--side", "ours", "--rounds", "1", "--warm", "0"),
        seconds=220,
    ),
    Part(
        name="stages-4k",
        arguments=("stages", "--preset", "4k", *_5B, "--steps", "1", "--clips", "1", "--cold"),
        seconds=260,
    ),
    Part(name="kernels-2k", arguments=("kernels", "--sizes", "2k", "--quick"), seconds=80),
    Part(name="kernels-4k", arguments=("kernels", "--sizes", "4k", "--quick"), seconds=120),
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
        arguments=("e2e", "--preset", "4k", *_5B, "--side", "ours-cudnn", "--rounds", "3"),
        seconds=3600,
        long=True,
    ),
)


def is_done(out: Path) -> bool:
    """Whether a part is there: measured whole, and with these sources."""
    try:
        result = read_result(out)
    except BadRequest:
        return False
    interrupted = any(one.reason == "interrupted" for one in result.skipped)
    return not interrupted and result.identity.commit == commit().removesuffix("-dirty")


def run_parts(folder: Path, minutes: float, *, full: bool) -> dict[str, str]:
    """Run what is missing; why each part that has no file has none, and what to do about it."""
    until, missing = time.monotonic() + 60 * minutes, {}
    for part in PARTS:
        out = folder / f"{part.name}.json"
        if is_done(out) or (part.long and not full):
            continue
        left = until - time.monotonic()
        if left < part.seconds:
            enough = part.seconds < 60 * minutes
            do = "repeat the command" if enough else f"give --minutes {part.seconds / 60 + 1:.0f}"
            missing[part.name] = f"{left:.0f} s left, {part.seconds:.0f} s expected: {do}"
            continue
        click.echo(f"== {part.name}: pw bench {' '.join(part.arguments)}")
        command = [sys.executable, "-m", "pw_runtime", "bench", *part.arguments]
        code = subprocess.run([*command, "--out", str(out)], check=False).returncode
        if code != 0 or not out.exists():
            missing[part.name] = f"it ended with exit code {code}, and said why above"
    return missing


@click.command()
@click.option("--out", type=FOLDER, required=True, help="Folder of results files.")
@click.option("--minutes", default=9.0, show_default=True, help="Time for this call.")
@click.option(
    "--full",
    is_flag=True,
    help="Hours: our programs in rounds at 2K, whole clips of 4K; give it --minutes.",
)
def main(out: Path, minutes: float, full: bool) -> None:
    """Measure kernels, stages and whole clips of 2K and 4K; the tables come last."""
    if not torch.cuda.is_available():
        raise click.ClickException("no CUDA GPU that torch can use: these sizes are for one")
    out.mkdir(parents=True, exist_ok=True)
    missing = run_parts(out, minutes, full=full)
    for file in (out / f"{part.name}.json" for part in PARTS):
        if not file.exists():
            continue
        click.echo(f"\n{file.name}")
        try:
            show(read_result(file))
        except BadRequest as error:  # the other tables are still to be shown
            missing[file.stem] = str(error)
    for name, reason in missing.items():
        click.echo(f"not there yet: {name}: {reason}")
    if missing:
        sys.exit(SOME_FAILED)


if __name__ == "__main__":
    main()
