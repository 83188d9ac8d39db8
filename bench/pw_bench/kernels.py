# SPDX-License-Identifier: Apache-2.0
"""Check and time every kernel at the sizes of the draft, of 2K and of 4K clips.

    python -m pw_bench.kernels --out bench/results/NAME.json

On a CUDA GPU every implementation of every operation; on a CPU the references, with --interpret
the kernels too, on reduced shapes. A result is compared with fp64 at sampled rows, computed into
memory filled with NaN, and computed twice: a difference between the two is a race.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pw_bench.cases_decoder import decoder_cases
from pw_bench.cases_transformer import transformer_cases
from pw_bench.ceilings import Ceilings, measure_ceilings
from pw_bench.commit import commit
from pw_bench.kernel_cases import GRIDS, Case, Maker
from pw_bench.timing import FULL, QUICK, Protocol, Timing, time_all
from pw_kernels import library
from pw_kernels.interpreter import install_exact_casts
from pw_kernels.op import Implementation
from pw_runtime.atomic import write_text
from pw_runtime.machine import Machine, describe


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One implementation of one operation at one size."""

    op: str
    size: str
    implementation: str
    refused: str | None = None  # why it did not run
    error: float | None = None  # relative L2 to fp64 at the sampled rows
    error_ratio: float | None = None  # to the error of the baseline
    same_twice: bool | None = None
    finite: bool | None = None  # nothing of the NaN that memory was filled with
    timing: Timing | None = None
    median_ms: float | None = None
    stable: bool | None = None
    rate: float | None = None  # FLOP/s or bytes/s, by the operation's least cost
    of_ceiling: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Content of the result file."""

    machine: Machine
    commit: str
    kernels: str  # what they were launched from
    baseline: str = "cudnn for attention where it runs, else the reference"
    ceilings: Ceilings
    rows: list[Row]


def relative_l2(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact| in fp64."""
    return ((got.double() - exact).norm() / exact.norm()).item()


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill every new tensor with NaN, or the largest byte: what is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check(case: Case, implementation: Implementation) -> Row:
    """Run once on poisoned memory and once more; compare."""
    row = Row(op=case.name, size=case.size, implementation=implementation)
    results = []
    try:
        for _ in range(2):
            arguments = case.arguments()
            with poisoned():
                results.append(case.result(case.run(implementation, arguments), arguments))
            if len(results) == 1:
                exact = case.exact(case.arguments())
    except (RuntimeError, ValueError) as error:
        return replace(row, refused=str(error).splitlines()[0])
    return replace(
        row,
        error=relative_l2(case.sample(results[0]), exact),
        same_twice=torch.equal(*results),
        finite=bool(results[0].isfinite().all()) if results[0].is_floating_point() else None,
    )


def measure(case: Case, device: torch.device, ceilings: Ceilings, protocol: Protocol) -> list[Row]:
    """Check every implementation, then time those that ran in turns; not what is interpreted."""
    rows = {one: check(case, one) for one in case.implementations}
    ran = [one for one, row in rows.items() if row.refused is None]
    timed = [one for one in ran if device.type == "cuda" or one == "reference"]
    arguments = case.arguments()
    runs = {str(one): lambda one=one: case.run(one, arguments) for one in timed}
    timings = time_all(runs, device, protocol) if runs else {}
    cost = case.cost(arguments)
    work, ceiling = cost.bytes, ceilings.copy.rate
    if case.bound == "flops":
        work, ceiling = cost.flops, ceilings.gemm.rate
    baseline = next(rows[one] for one in ("cudnn", "reference") if one in ran)
    finished = []
    for one, row in rows.items():
        if row.error and baseline.error:
            row = replace(row, error_ratio=row.error / baseline.error)
        if one not in timed:
            finished.append(row)
            continue
        timing = timings[one]
        rate = work / timing.median * 1e3
        finished.append(
            replace(
                row,
                timing=timing,
                median_ms=timing.median,
                stable=timing.stable,
                rate=rate,
                of_ceiling=rate / ceiling,
            )
        )
    return finished


def show(rows: Sequence[Row], console: Console) -> None:
    """The table."""
    table = Table("operation", "size", "by", "ms", "rate", "of ceiling", "error", "ratio", "notes")
    for row in rows:
        notes = [row.refused] if row.refused else []
        notes += ["differs when repeated"] if row.same_twice is False else []
        notes += ["NaN"] if row.finite is False else []
        notes += ["unstable"] if row.stable is False else []
        table.add_row(
            row.op,
            row.size,
            row.implementation,
            "" if row.median_ms is None else f"{row.median_ms:.3f}",
            "" if row.rate is None else f"{row.rate / 1e9:,.1f} G/s",
            "" if row.of_ceiling is None else f"{row.of_ceiling:.0%}",
            "" if row.error is None else f"{row.error:.1e}",
            "" if row.error_ratio is None else f"{row.error_ratio:.2f}",
            "; ".join(str(note) for note in notes),
        )
    console.print(table)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Result file.")
@click.option(
    "--sizes", multiple=True, type=click.Choice([*GRIDS]), help="[default: all true ones]"
)
@click.option("--only", default="", help="Only operations whose name holds this text.")
@click.option("--quick", is_flag=True, help="Two samples each, no warm-up.")
@click.option("--interpret", is_flag=True, help="On a CPU, with Triton's interpreter.")
def main(out: Path | None, sizes: tuple[str, ...], only: str, quick: bool, interpret: bool) -> None:
    """Check and time every kernel."""
    device = torch.device("cuda" if torch.cuda.is_available() and not interpret else "cpu")
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
        install_exact_casts()
    sizes = sizes or (("draft", "2k", "4k") if device.type == "cuda" else ("tiny",))
    protocol = QUICK if quick else FULL
    console = Console(width=None if sys.stdout.isatty() else 160)
    ceilings = measure_ceilings(device, protocol)
    console.print(
        f"{device}: product {ceilings.gemm.rate / 1e9:,.1f} GFLOP/s, "
        f"copy {ceilings.copy.rate / 1e9:,.1f} GB/s; kernels: {library.status()}"
    )
    rows: list[Row] = []
    make = Maker(device, interpreted=interpret)
    with torch.inference_mode():
        for size in sizes:
            found = [*transformer_cases(size, make)]
            found += [] if size == "draft" else [*decoder_cases(size, make)]
            for case in found:
                if only in case.name:
                    rows += measure(case, device, ceilings, protocol)
    show(rows, console)
    if out is not None:
        result = Result(
            machine=describe(),
            commit=commit(),
            kernels=library.status(),
            ceilings=ceilings,
            rows=rows,
        )
        write_text(out, TypeAdapter(Result).dump_json(result, indent=1).decode() + "\n")


if __name__ == "__main__":
    main()
