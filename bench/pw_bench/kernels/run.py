# SPDX-License-Identifier: Apache-2.0
"""Check and time every kernel at the sizes of the draft, of 2K and of 4K clips.

    pw bench kernels --out FILE

On a CUDA GPU every implementation of every operation; on a CPU the references, with --interpret
the kernels too, on reduced shapes. A result is compared with fp64 at sampled rows, computed into
memory filled with NaN, and computed twice: a difference between the two is a race.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pw_bench.kernels.cases import GRIDS, Case, Maker
from pw_bench.kernels.cases_decoder import decoder_cases
from pw_bench.kernels.cases_transformer import transformer_cases
from pw_bench.measure.environment import envelope, identify
from pw_bench.measure.nvml import Nvml
from pw_bench.measure.peaks import measure_ceilings
from pw_bench.measure.timing import FULL, QUICK, Protocol, time_all
from pw_bench.results import (
    Ceilings,
    Figure,
    KernelRow,
    Result,
    Skipped,
    require_folder,
    write_result,
)
from pw_kernels import library
from pw_kernels.interpreter import install_exact_casts
from pw_kernels.op import Implementation
from pw_runtime.cli.options import FILE
from pw_runtime.errors import BadRequest

NO_GPU = "no CUDA GPU that torch can use"


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


def check(case: Case, implementation: Implementation) -> KernelRow:
    """Run once on poisoned memory and once more; compare."""
    row = KernelRow(
        figure=f"{case.name}/{case.size}/{implementation}",
        op=case.name,
        size=case.size,
        implementation=implementation,
        bound=case.bound,
    )
    results = []
    try:
        for _ in range(2):
            arguments = case.arguments()
            with poisoned():
                results.append(case.result(case.run(implementation, arguments), arguments))
            if len(results) == 1:
                exact = case.exact(case.arguments())
    except Exception as error:  # Triton's are no RuntimeError; none may take the others along
        words = str(error).splitlines() or [type(error).__name__]
        return replace(row, refused=words[0])
    return replace(
        row,
        error=relative_l2(case.sample(results[0]), exact),
        same_twice=torch.equal(*results),
        finite=bool(results[0].isfinite().all()) if results[0].is_floating_point() else None,
    )


Measured = tuple[KernelRow, Figure | None]  # no figure: it did not run, or was interpreted


def measure(
    case: Case, device: torch.device, ceilings: Ceilings, protocol: Protocol
) -> list[Measured]:
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
        if case.op == "attention":
            ceiling = ceilings.attention.rate
        elif "conv" in case.op:  # libraries turn some into products
            ceiling = max(ceiling, ceilings.convolution.rate)
    baseline = next((rows[one] for one in ("cudnn", "reference") if one in ran), None)
    finished: list[Measured] = []
    for one, row in rows.items():
        if row.error and baseline is not None and baseline.error:
            row = replace(row, error_ratio=row.error / baseline.error)
        if one not in timed:
            finished.append((row, None))
            continue
        rate = work / timings[one].median
        figure = replace(
            timings[one],
            name=row.figure,
            flops=cost.flops,
            bytes=cost.bytes,
            of_ceiling=rate / ceiling,
        )
        finished.append((replace(row, rate=rate), figure))
    return finished


def show(found: Sequence[Measured], console: Console) -> None:
    """The table."""
    table = Table("operation", "size", "by", "ms", "rate", "of ceiling", "error", "ratio", "notes")
    for row, figure in found:
        notes = [row.refused] if row.refused else []
        notes += ["differs when repeated"] if row.same_twice is False else []
        notes += ["NaN"] if row.finite is False else []
        notes += ["unstable"] if figure is not None and not figure.stable else []
        timed = ("", "", "")
        if figure is not None and row.rate is not None:
            timed = (
                f"{figure.median * 1e3:.3f}",
                f"{row.rate / 1e9:,.1f} G/s",
                f"{figure.of_ceiling:.0%}",
            )
        table.add_row(
            row.op,
            row.size,
            row.implementation,
            *timed,
            "" if row.error is None else f"{row.error:.1e}",
            "" if row.error_ratio is None else f"{row.error_ratio:.2f}",
            "; ".join(str(note) for note in notes),
        )
    console.print(table)


def measure_kernels(
    sizes: Sequence[str], only: str, device: torch.device, protocol: Protocol, *, interpreted: bool
) -> Result:
    """Check and time the operations whose name holds `only`; the table goes to the terminal.

    After Ctrl-C the result is of those until then. Raises BadRequest where no name holds it.
    """
    cases = _cases(sizes, only, Maker(device, interpreted=interpreted))
    nvml = Nvml()
    identity = identify(device, nvml)
    console = Console(width=None if sys.stdout.isatty() else 160)
    ceilings = measure_ceilings(device, protocol)
    console.print(
        f"{device}: product {ceilings.gemm.rate / 1e9:,.1f} GFLOP/s, attention "
        f"{ceilings.attention.rate / 1e9:,.1f} GFLOP/s, copy {ceilings.copy.rate / 1e9:,.1f} GB/s; "
        f"kernels: {library.status()}"
    )
    found: list[Measured] = []
    skipped = [] if device.type == "cuda" else [Skipped(part="kernels on a GPU", reason=NO_GPU)]
    try:
        with torch.inference_mode():
            for case in cases:
                found += measure(case, device, ceilings, protocol)
    except KeyboardInterrupt:
        if not found:
            raise
        skipped.append(Skipped(part="the remaining operations", reason="interrupted"))
    show(found, console)
    for part in skipped:
        console.print(f"skipped: {part.part} ({part.reason})")
    scope = {
        "words": "one call of each operation on random tensors, its caches cold on a GPU",
        "sizes": ", ".join(sizes),
        "device": device.type,
        "kernels": library.status(),
        "baseline of errors": "cudnn for attention where it runs, else the reference",
    }
    return replace(
        envelope("kernels", scope, identity, ceilings, nvml),
        figures=tuple(figure for _, figure in found if figure is not None),
        kernels=tuple(row for row, _ in found),
        skipped=tuple(skipped),
    )


def _cases(sizes: Sequence[str], only: str, make: Maker) -> list[Case]:
    """Those whose name holds `only`. Raises BadRequest where there is none."""
    cases = [
        case
        for size in sizes
        for case in (
            *transformer_cases(size, make),
            *(() if size == "draft" else decoder_cases(size, make)),
        )
    ]
    chosen = [case for case in cases if only in case.name]
    if not chosen:
        raise BadRequest(
            "no operation has such a name",
            got=f"--only {only!r}",
            wanted=f"part of one of: {'; '.join(dict.fromkeys(case.name for case in cases))}",
            do="leave --only out, or name one of them",
        )
    return chosen


@click.command()
@click.option("--out", type=FILE, help="Results file.")
@click.option(
    "--sizes", multiple=True, type=click.Choice([*GRIDS]), help="[default: all true ones]"
)
@click.option("--only", default="", help="Only operations whose name holds this text.")
@click.option("--quick", is_flag=True, help="Three samples each, no warm-up.")
@click.option("--interpret", is_flag=True, help="On a CPU, with Triton's interpreter.")
def kernels(
    out: Path | None, sizes: tuple[str, ...], only: str, quick: bool, interpret: bool
) -> None:
    """Check and time every kernel: on a GPU all implementations, on a CPU the references."""
    if out is not None:
        require_folder(out)
    device = torch.device("cuda" if torch.cuda.is_available() and not interpret else "cpu")
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
        install_exact_casts()
    sizes = sizes or (("draft", "2k", "4k") if device.type == "cuda" else ("tiny",))
    protocol = QUICK if quick else FULL
    result = measure_kernels(sizes, only, device, protocol, interpreted=interpret)
    if out is not None:
        write_result(result, out)
