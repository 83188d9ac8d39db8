# SPDX-License-Identifier: Apache-2.0
"""Small results for tests, of an invented machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pw_bench.results import Ceiling, Ceilings, Figure, Identity, Result
from pw_runtime.system.machine import Machine

MACHINE = Machine(
    python="3.11", os="Linux", cpu="a CPU", cores=2, memory_bytes=2**34, packages=(), gpus=(),
    driver=None,
)  # fmt: skip


def figure(name: str, *samples: float, **fields: Any) -> Figure:
    return Figure(name=name, unit=fields.pop("unit", "s"), samples=samples, **fields)


def result(*figures: Figure, **fields: Any) -> Result:
    one = Ceiling(work="work", rate=1e9, figure=figure("ceiling", 1.0))
    made = Result(
        kind="e2e",
        when="2030-01-01T00:00:00Z",
        command="pw bench e2e",
        scope={"words": "all of it", "device": "cpu"},
        identity=Identity(
            machine=MACHINE, commit="abc", dirty=False, threads=2, load_average=0.0,
            weights={}, engines={}, operations={},
        ),
        ceilings=Ceilings(gemm=one, attention=one, convolution=one, copy=one),
        figures=figures,
        sides={},
    )  # fmt: skip
    return replace(made, **fields)
