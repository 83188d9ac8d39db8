# SPDX-License-Identifier: Apache-2.0
"""What a results file of `pw bench` holds: every noun of the suite, frozen; read and written here.

All kinds of results share one envelope. `figures` are what was measured, each with its samples;
they are what `pw bench compare` compares and the tables show. What only one kind has lies beside
them: `kernels` the checks of kernels, `clips` the waterfalls and memory of end-to-end runs.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pw_runtime.errors import BadRequest
from pw_runtime.system.atomic_files import write_text
from pw_runtime.system.machine import Machine
from pw_runtime.system.trace import Span

Kind = Literal["kernels", "stages", "e2e"]
Label = Literal["bit-exact", "rounding", "approximate"]

FORMAT: Final = 1
STABLE: Final = 0.05  # (p90 - p10) / median that still counts as stable


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One quantity, measured several times.

    Attributes:
        name: unique in its result, for instance "nano/ours/cold".
        unit: "s" for times, "B" for memory, "J" for energy.
        samples: in the order in which they were taken.
        rejected: those of a first round that was unstable and taken again.
        flops: least that the work takes, in all; None where it is not counted.
        bytes: least that must be moved.
        of_ceiling: share of the measured rate that bounds the work, at the median.
        fell_back: what ran otherwise than asked: no headline is made of this figure.
    """

    name: str
    unit: Literal["s", "B", "J"]
    samples: tuple[float, ...]
    rejected: tuple[float, ...] = ()
    flops: float | None = None
    bytes: float | None = None
    of_ceiling: float | None = None
    fell_back: tuple[str, ...] = ()

    @property
    def median(self) -> float:
        """Of the samples."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """10th and 90th percentile, interpolated."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        cuts = statistics.quantiles(self.samples, n=10, method="inclusive")
        return cuts[0], cuts[-1]

    @property
    def stable(self) -> bool:
        """Whether three samples or more lie together."""
        low, high = self.spread
        return len(self.samples) >= 3 and high - low <= STABLE * self.median


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """The best rate of one kind of work, by PyTorch's own operation for it."""

    work: str  # what was timed
    rate: float  # FLOP/s, or bytes/s read and written
    figure: Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """The rates that shares refer to, measured in the same run."""

    gemm: Ceiling
    attention: Ceiling
    convolution: Ceiling
    copy: Ceiling


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuState:
    """What NVML says at one moment; None where it says nothing."""

    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    power_w: float | None
    power_limit_w: float | None
    temperature_c: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """On what and with what a result was measured."""

    machine: Machine
    commit: str
    dirty: bool  # files differ from the commit
    threads: int
    load_average: float  # of the minute before: what else the machine had to do
    weights: Mapping[str, str]  # name of a bundle or of synthetic weights -> digest or seed
    engines: Mapping[str, str]  # network -> backend and digest of its key
    operations: Mapping[str, str]  # operation -> what ran; of `kernels`, which run all, the default
    libraries: Mapping[str, str] = field(default_factory=dict)  # beneath the packages -> version
    gpu_start: GpuState | None = None
    gpu_end: GpuState | None = None
    nvml: str = ""  # why it says nothing; empty where it works or is not needed


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow:
    """One implementation of one operation at one size; its time is the figure of that name."""

    figure: str
    op: str
    size: str
    implementation: str
    refused: str | None = None  # why it did not run
    error: float | None = None  # relative L2 to fp64 at the sampled rows
    error_ratio: float | None = None  # to the error of the baseline
    same_twice: bool | None = None
    finite: bool | None = None  # nothing of the NaN that memory was filled with
    rate: float | None = None  # FLOP/s or bytes/s, by the operation's least cost
    bound: Literal["flops", "bytes"] = "bytes"  # the ceiling that counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One end-to-end run of one program: "prompt in, closed mp4 on disk".

    Attributes:
        side: program, for instance "ours" or "official".
        start: "cold" from starting the process, "warm" a later clip of the same process.
        wall: seconds.
        spans: in seconds from the start of the run.
        unattributed: seconds of the wall time that lie in no span of the main thread.
        unattributed_shares: of the wall time, in every run of this side and start.
        host: (seconds from the start, resident bytes of the process).
        device: (seconds from the start, bytes of the GPU that the process holds by NVML).
        peaks: bytes by what counted them: "rss", "pss", "allocator", "nvml", and "reserved" of
            programs that do not start that counter again themselves.
        predicted: peak bytes by stage and place, of the plan; ours only.
        joules: GPU energy by NVML.
        disk_bytes: written by the process.
    """

    side: str
    start: Literal["cold", "warm"]
    wall: float
    spans: tuple[Span, ...]
    unattributed: float
    unattributed_shares: tuple[float, ...]
    host: tuple[tuple[float, int], ...]
    device: tuple[tuple[float, int], ...] = ()
    peaks: Mapping[str, int]
    predicted: Mapping[str, Mapping[str, int]]
    joules: float | None = None
    disk_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDifference:
    """A latent after one step against the same of the exact path."""

    stage: str
    step: int
    cosine: float
    relative_l2: float
    max_abs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Equivalence:
    """What a program's clip differs by from another's, same weights, noise and texts.

    Attributes:
        side: program.
        against: program that it is compared with.
        label: what the difference is.
        limit: relative L2 of the last latent up to which it counts as rounding.
        psnr: dB over all frames, None where not a byte differs.
        ssim: mean over all frames.
        seam_index: gradient energy on borders of tiles against elsewhere; None without tiles.
        flicker_ratio: mean change between frames, against that of the other clip; None where that
            one stands still.
    """

    side: str
    against: str
    label: Label
    limit: float
    steps: tuple[StepDifference, ...]
    psnr: float | None
    ssim: float
    seam_index: float | None
    flicker_ratio: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One program against another, or why there is no ratio."""

    side: str
    against: str
    cold: float | None = None  # how many times as fast
    warm: float | None = None
    memory: float | None = None  # share of the other's peak
    refused: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A part that did not run, and why."""

    part: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Content of a results file.

    Attributes:
        format: raised when the meaning of a field changes.
        kind: which command wrote it.
        when: UTC, ISO 8601.
        command: that makes it again.
        scope: what was measured, in words and sizes: results are comparable where it is equal.
        sides: name of a program -> what it is.
        ratios: refused where the clips of the two differ by more than rounding, or fell back.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    format: int = FORMAT
    kind: Kind
    when: str
    command: str
    scope: Mapping[str, str]
    identity: Identity
    ceilings: Ceilings
    figures: tuple[Figure, ...]
    sides: Mapping[str, str]  # what each program is, in words
    kernels: tuple[KernelRow, ...] = ()
    clips: tuple[Clip, ...] = ()
    equivalence: tuple[Equivalence, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    def figure(self, name: str) -> Figure:
        """By name. Raises KeyError."""
        for one in self.figures:
            if one.name == name:
                return one
        raise KeyError(name)


_RESULT: Final[TypeAdapter[Any]] = TypeAdapter(Result)


def to_json(result: Result) -> str:
    """The text of a results file."""
    return _RESULT.dump_json(result, indent=1).decode() + "\n"


def require_folder(out: Path) -> None:
    """Raise BadRequest, before anything is measured, where a results file could not be written."""
    if not out.parent.is_dir():
        raise BadRequest(
            f"cannot write {out}",
            got=f"{out.parent}, which is no folder",
            do=f"mkdir -p {out.parent}",
        )


def write_result(result: Result, path: Path) -> None:
    """Write it whole or not at all. Raises WriteFailed."""
    write_text(path, to_json(result))


def read_result(path: Path) -> Result:
    """Read a results file. Raises BadRequest where it is none, or a newer version's."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise BadRequest(
            f"cannot read {path}", got=error, do="name a file of `pw bench`"
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise BadRequest(
            f"{path} is from a newer version of PixelWizard Runtime",
            got=f"format {found}",
            wanted=f"format {FORMAT}",
            do="use the version that wrote it, or a newer one",
        )
    try:
        return _RESULT.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BadRequest(
            f"{path} is not a results file",
            got=f"{place}: {first['msg']}" if place else first["msg"],
            wanted="a file that `pw bench kernels`, `stages` or `e2e` wrote",
            do="measure again with this version",
        ) from error
