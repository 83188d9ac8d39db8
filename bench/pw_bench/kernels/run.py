# SPDX-License-Identifier: Apache-2.0
"""Check and time every kernel at the sizes of draft, 2K and 4K clips.

    pw bench kernels --out FILE

On a CUDA GPU every implementation of every operation runs; on a CPU the references and, with
--interpret, the kernels on reduced shapes. A result is compared with fp64 at sampled rows. It is
computed into memory filled with NaN, and computed twice: a difference between the two is a race.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch

from pw_bench.choices import CaseSize
from pw_bench.kernels.cases import Case, CaseTensors
from pw_bench.kernels.cases_decoder import decoder_cases
from pw_bench.kernels.cases_transformer import transformer_cases
from pw_bench.measure.environment import envelope, identify, usual_operations
from pw_bench.measure.interruption import Interruption
from pw_bench.measure.nvml import Nvml
from pw_bench.measure.peaks import measure_ceilings
from pw_bench.measure.timing import FULL, QUICK, Protocol, time_all
from pw_bench.result_sections import KernelRow
from pw_bench.results import Ceilings, Figure, Result, Skipped
from pw_engines.engine import relative_l2
from pw_kernels import library
from pw_kernels.interpreter import install_exact_casts
from pw_kernels.op import Implementation
from pw_runtime.errors import BadRequest

NO_GPU = "no CUDA GPU that torch can use"

Measured = tuple[KernelRow, Figure | None]  # no figure: it did not run, or was interpreted


def measure_kernels(
    sizes: Sequence[CaseSize],
    only: str,
    *,
    quick: bool,
    interpret: bool,
    say: Callable[[str], None],
) -> Result:
    """Check and time operations, on the GPU if there is one.

    Args:
        sizes: sizes of the cases; if empty, all true ones on a GPU, "tiny" on a CPU.
        only: text that the names of the operations contain.
        quick: take three samples each, without warm-up.
        interpret: run the kernels in Triton's interpreter, on the CPU.
        say: receives the measured ceilings, before the operations run.

    Raises BadRequest where no operation has such a name; Interrupted with the operations that were
    measured before.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and not interpret else "cpu")
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
        install_exact_casts()
    sizes = sizes or (("draft", "2k", "4k") if device.type == "cuda" else ("tiny",))
    protocol = QUICK if quick else FULL
    cases = select_cases(sizes, only, CaseTensors(device, interpreted=interpret))
    nvml = Nvml()
    identity = identify(device, nvml, operations=usual_operations(device))
    ceilings = measure_ceilings(device, protocol)
    say(
        f"{device}: product {ceilings.gemm.rate / 1e9:,.1f} GFLOP/s, attention "
        f"{ceilings.attention.rate / 1e9:,.1f} GFLOP/s, copy {ceilings.copy.rate / 1e9:,.1f} GB/s; "
        f"kernels: {library.status()}"
    )
    measured: list[Measured] = []
    skipped = [] if device.type == "cuda" else [Skipped(part="kernels on a GPU", reason=NO_GPU)]
    with Interruption() as interruption, torch.inference_mode():
        for case in cases:
            measured += measure(case, device, ceilings, protocol)
    interruption.require(measured)
    skipped += interruption.skipped("the remaining operations")
    scope = {
        "words": "one call of each operation on random tensors, its caches cold on a GPU",
        "sizes": ", ".join(sizes),
        "device": device.type,
        "kernels": library.status(),
        "baseline of errors": "cudnn for attention where it runs, else the reference",
    }
    result = replace(
        envelope("kernels", scope, identity, ceilings, nvml),
        figures=tuple(figure for _, figure in measured if figure is not None),
        kernels=tuple(row for row, _ in measured),
        skipped=tuple(skipped),
    )
    return interruption.ended_with(result)


def select_cases(sizes: Sequence[CaseSize], only: str, tensors: CaseTensors) -> list[Case]:
    """Return the cases whose name contains `only`. Raises BadRequest where there is none."""
    cases = [
        case
        for size in sizes
        for case in (
            *transformer_cases(size, tensors),
            *(() if size == "draft" else decoder_cases(size, tensors)),
        )
    ]
    selected = [case for case in cases if only in case.name]
    if not selected:
        raise BadRequest(
            "no operation has such a name",
            got=f"--only {only!r}",
            wanted=f"part of one of: {'; '.join(dict.fromkeys(case.name for case in cases))}",
            do="leave --only out, or name one of them",
        )
    return selected


def measure(
    case: Case, device: torch.device, ceilings: Ceilings, protocol: Protocol
) -> list[Measured]:
    """Check every implementation, then time in turns those that ran and are not interpreted."""
    rows = {name: check(case, name) for name in case.implementations}
    ran = [name for name, row in rows.items() if row.refused is None]
    timed = [name for name in ran if device.type == "cuda" or name == "reference"]
    if not timed:
        return [(row, None) for row in _with_ratios(rows).values()]
    try:
        arguments = case.arguments()
        runs = {str(name): lambda name=name: case.run(name, arguments) for name in timed}
        timings = time_all(runs, device, protocol)
    except Exception as error:  # as in `check`: memory may run out here
        rows |= {name: replace(_row(case, name), refused=_reason(error)) for name in timed}
        return [(row, None) for row in _with_ratios(rows).values()]
    cost = case.cost(arguments)
    bound: Literal["flops", "bytes"] = "bytes"
    work, ceiling = cost.bytes, ceilings.copy.rate
    arithmetic = _arithmetic_ceiling(case, ceilings)
    if cost.flops / arithmetic > work / ceiling:  # the longer of the two least times
        bound, work, ceiling = "flops", cost.flops, arithmetic
    measured: list[Measured] = []
    for name, row in _with_ratios(rows).items():
        if name not in timed:
            measured.append((row, None))
            continue
        rate = work / timings[name].median
        figure = replace(
            timings[name],
            name=row.figure,
            flops=cost.flops,
            bytes=cost.bytes,
            of_ceiling=rate / ceiling,
        )
        measured.append((replace(row, rate=rate, bound=bound), figure))
    return measured


def _with_ratios(rows: Mapping[Implementation, KernelRow]) -> dict[Implementation, KernelRow]:
    """Return the rows with their errors beside that of the baseline, where both ran."""
    bases = (rows[name] for name in ("cudnn", "reference") if name in rows)
    base = next((row.error for row in bases if row.refused is None), None)
    return {
        name: replace(row, error_ratio=row.error / base) if row.error and base else row
        for name, row in rows.items()
    }


def _row(case: Case, implementation: Implementation) -> KernelRow:
    """Return the row of an implementation, without results."""
    return KernelRow(
        figure=f"{case.name}/{case.size}/{implementation}",
        op=case.name,
        size=case.size,
        implementation=implementation,
    )


def _reason(error: Exception) -> str:
    """Return the first line of an error, or its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _arithmetic_ceiling(case: Case, ceilings: Ceilings) -> float:
    """Return the FLOP/s that an operation's arithmetic can have."""
    if case.op in ("attention", "sparse_attention"):
        return ceilings.attention.rate
    if "conv" in case.op:  # libraries turn some into matrix products
        return max(ceilings.gemm.rate, ceilings.convolution.rate)
    return ceilings.gemm.rate


def check(case: Case, implementation: Implementation) -> KernelRow:
    """Run twice on poisoned memory and compare with the exact rows and with each other."""
    row, results = _row(case, implementation), []
    try:
        for _ in range(2):
            arguments = case.arguments()
            with poisoned_memory():
                results.append(case.result(case.run(implementation, arguments), arguments))
            if len(results) == 1:
                exact = case.exact(case.arguments())
    except Exception as error:  # Triton's are no RuntimeError; no failure may stop the others
        return replace(row, refused=_reason(error))
    return replace(
        row,
        error=relative_l2(case.sample(results[0]), exact),
        same_twice=torch.equal(*results),
        finite=bool(results[0].isfinite().all()) if results[0].is_floating_point() else None,
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every new tensor with NaN, or the largest byte, so that unwritten elements show."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
