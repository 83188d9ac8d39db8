# SPDX-License-Identifier: Apache-2.0
"""`pw bench`: the verbs of the benchmark suite."""

from __future__ import annotations

import click

from pw_bench.cli_e2e import e2e
from pw_bench.cli_report import report
from pw_bench.e2e.stages import stages
from pw_bench.kernels.run import kernels
from pw_bench.report.regressions import compare


@click.group()
def bench() -> None:
    """Measure latency and memory, compare, report (docs/benchmarks.md)."""


for command in (kernels, stages, e2e, compare, report):
    bench.add_command(command)
