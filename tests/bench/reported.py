# SPDX-License-Identifier: Apache-2.0
"""Small results to report, and the page as its elements."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from pw_bench.report import write_html
from pw_bench.results import (
    Ceiling,
    Ceilings,
    Clip,
    Equivalence,
    Figure,
    GpuState,
    Identity,
    KernelRow,
    Ratio,
    Result,
    Skipped,
    StepDifference,
)
from pw_runtime.system.machine import Gpu, Machine, Package
from pw_runtime.system.trace import Span

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
VOID = {"meta", "br", "hr", "img", "input", "link"}


def figure(name: str, *samples: float, **more: Any) -> Figure:
    return Figure(name=name, unit=more.pop("unit", "s"), samples=samples, **more)


def span(name: str, start: float, end: float, depth: int = 0, thread: str = "MainThread") -> Span:
    return Span(name=name, start=start, end=end, depth=depth, thread=thread)


OURS, THEIRS = figure("ours/warm", 5.0, 5.01, 5.02), figure("theirs/warm", 10.0, 10.1, 10.2)
CEILING = Ceiling(work="some", rate=1e12, figure=figure("any", 1.5e-3, 1.5e-3, 1.5e-3))
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
RESULT = Result(
    kind="e2e",
    when="2026-01-02T03:04:05Z",
    command="pw bench e2e --out again.json",
    scope={"words": "prompt in, closed mp4 on disk", "frames": "13"},
    identity=IDENTITY,
    ceilings=Ceilings(gemm=CEILING, attention=CEILING, convolution=CEILING, copy=CEILING),
    figures=(OURS, THEIRS),
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
KERNELS = replace(
    RESULT,
    kind="kernels",
    clips=(), equivalence=(), ratios=(), sides={},
    figures=(figure("norm/2k/triton", 1e-3, 1e-3, 1e-3, flops=1e9, bytes=2e9, of_ceiling=0.75),),
    kernels=(
        KernelRow(figure="norm/2k/triton", op="norm", size="2k", implementation="triton",
                  error=3e-7, rate=2e12, same_twice=False),
        KernelRow(figure="norm/2k/native", op="norm", size="2k", implementation="native",
                  refused="is for another GPU"),
    ),
)  # fmt: skip


class Page(HTMLParser):
    """Elements in order with attributes and their text; fails where one is not closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.found) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.found[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.found[self.open[-1]][2].append(data)

    def texts(self, tag: str) -> list[str]:
        return ["".join(text).strip() for name, _, text in self.found if name == tag]

    def having(self, kind: str) -> list[str]:
        """Text of the elements of a class and, for a picture's parts, of their titles."""
        kinds = [(a.get("class") or "").split() for _, a, _ in self.found]
        places = [i for i, of in enumerate(kinds) if kind in of]
        titles = [tag == "title" for tag, _, _ in self.found]
        whole = ["".join(self.found[i + titles[i + 1]][2]) for i in places]
        return [text.strip() for text in whole]


def page(folder: Path, *results: Result) -> Page:
    write_html(results, folder / "report.html")
    return Page((folder / "report.html").read_text(encoding="utf-8"))
