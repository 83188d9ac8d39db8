# SPDX-License-Identifier: Apache-2.0
"""Small results for tests, measured by no machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pw_bench.result_sections import Clip, Equivalence, KernelRow, Ratio, StepDifference
from pw_bench.results import Ceiling, Ceilings, Figure, GpuState, Identity, Result, Skipped
from pw_runtime.system.machine import Gpu, Machine
from pw_runtime.system.packages import Package
from pw_runtime.system.trace import Span


def figure(name: str, *samples: float, **fields: Any) -> Figure:
    return Figure(name=name, unit=fields.pop("unit", "s"), samples=samples, **fields)


def span(name: str, start: float, end: float, depth: int = 0, thread: str = "MainThread") -> Span:
    return Span(name=name, start=start, end=end, depth=depth, thread=thread)


GPU = GpuState(
    sm_clock_mhz=1755, memory_clock_mhz=2619, power_w=88.5, power_limit_w=None, temperature_c=41
)
MACHINE = Machine(
    python="3.11.9",
    os="Linux 6.1",
    cpu="Processor",
    cores=2,
    memory_bytes=24 * 2**30,
    packages=(Package(name="torch", version="2.13.0"), Package(name="x", version="1", broken="so")),
    gpus=(Gpu(name="Accelerator", memory_bytes=80 * 2**30, capability="9.0"),),
    driver="570.1",
)
IDENTITY = Identity(
    machine=MACHINE,
    commit="abc1234",
    dirty=False,
    threads=7,
    load_average=0.25,
    weights={"nano": "digest-of-weights"},
    engines={"draft": "kind-of-engine"},
    operations={"attention": "who-attends"},
    gpu_start=GPU,
)
CEILING = Ceiling(work="some", rate=1e12, figure=figure("any", 1.5e-3, 1.5e-3, 1.5e-3))
CEILINGS = Ceilings(gemm=CEILING, attention=CEILING, convolution=CEILING, copy=CEILING)


def result(*figures: Figure, **fields: Any) -> Result:
    """Return a result with these figures and nothing else."""
    plain = Result(
        kind="e2e",
        when="2026-01-02T03:04:05Z",
        command="pw bench e2e --out again.json",
        scope={"words": "prompt in, closed mp4 on disk", "device": "cpu"},
        identity=IDENTITY,
        ceilings=CEILINGS,
        figures=figures,
        sides={},
    )
    return replace(plain, **fields)


OURS, THEIRS = figure("ours/warm", 5.0, 5.01, 5.02), figure("theirs/warm", 10.0, 10.1, 10.2)
CLIP = Clip(
    side="ours",
    start="warm",
    wall=10.0,
    spans=(
        span("plan", 0, 0.01),
        span("draft", 0.01, 8),
        *(span(f"step {i + 1}", i + 0.1, i + 1, 1) for i in range(7)),
        span("write", 8, 9.5),
        span("encode", 8.2, 9, 1, "pw-overlap"),
    ),
    unattributed=0.5,
    unattributed_shares=(0.05, 0.01, 0.0625),
    host=tuple((i / 100, 2**30 + (i == 777) * 2**30) for i in range(1000)),
    peaks={"rss": 2**31},
    predicted={"draft": {"host": 3 * 2**29}},
)
RESULT = result(
    OURS,
    THEIRS,
    sides={"ours": "this runtime", "theirs": "another"},
    clips=(CLIP,),
    equivalence=(
        Equivalence(
            side="theirs", against="ours", label="rounding", limit=1e-4, psnr=71.5, ssim=0.5,
            seam_index=None, flicker_ratio=1.0,
            steps=(StepDifference(stage="draft", step=1, cosine=1, relative_l2=3e-6, max_abs=1),),
        ),
    ),
    ratios=(Ratio(side="ours", against="theirs", warm=2.02),),
    skipped=(Skipped(part="energy", reason="nobody counts it"),),
)  # fmt: skip
KERNELS = result(
    figure("norm/2k/triton", 1e-3, 1e-3, 1e-3, flops=1e9, bytes=2e9, of_ceiling=0.75),
    kind="kernels",
    kernels=(
        KernelRow(figure="norm/2k/triton", op="norm", size="2k", implementation="triton",
                  error=3e-7, rate=2e12, same_twice=False),
        KernelRow(figure="norm/2k/native", op="norm", size="2k", implementation="native",
                  refused="is for another GPU"),
    ),
)  # fmt: skip
