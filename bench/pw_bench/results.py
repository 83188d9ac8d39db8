# SPDX-License-Identifier: Apache-2.0
"""The results file that every program of `pw bench` writes: its content, writing, reading.

All kinds share one envelope. `figures` are the measurements, each with all of its samples; `pw
bench compare` compares them and the tables show them. Sections that only some kinds have
(`result_sections`) stand beside them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pw_bench.result_sections import (
    Clip,
    Equivalence,
    KernelRow,
    Kills,
    OutputDifference,
    Quality,
    Ratio,
)
from pw_runtime.errors import BadRequest
from pw_runtime.system.atomic_files import require_replaceable, write_text
from pw_runtime.system.input_files import UnreadableInput, parse_json, read_text
from pw_runtime.system.machine import Machine
from pw_runtime.system.printable import printable

Kind = Literal[
    "kernels",
    "stages",
    "e2e",
    "dit-peers",
    "vae-peers",
    "generate-memory",
    "decoder-memory",
    "quality",
    "linear-error",
    "sparse-error",
    "cpu-conv",
    "ranks",
    "approximations",
    "serve",
    "kills",
]

FORMAT: Final = 6  # 5 lacks two kinds, 4 two more, 3 one, 2 two, 1 six more; all are read
MAX_BYTES: Final = 64 * 2**20  # of a file that is read
# What a machine can take or do; beyond it, nothing that is computed with it would be a number.
Measured = Annotated[float, Field(ge=1e-12, le=1e24, allow_inf_nan=False)]
Sample = Annotated[float, Field(ge=0, le=1e24, allow_inf_nan=False)]  # memory may grow by nothing
SHORTEST: Final = 1e-12  # seconds: nothing takes none
STABLE: Final = 0.05  # largest (p90 - p10) / median of a stable figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One quantity, measured several times.

    Attributes:
        name: unique in its result, for instance "ours/cold".
        unit: "s" for times, "B" for memory, "J" for energy.
        samples: in the order of measurement.
        rejected: samples of a first, unstable series that was measured again.
        flops: minimum arithmetic of the work, in all; None where it is not counted.
        bytes: minimum memory traffic of the work.
        of_ceiling: share of the measured rate that bounds the work, at the median.
        fell_back: what ran otherwise than requested; such a figure makes no headline.
        counted: the value is counted or predicted, not measured: one sample is stable.
    """

    name: str
    unit: Literal["s", "B", "J"]
    samples: Annotated[tuple[Sample, ...], Field(min_length=1)]
    rejected: tuple[Sample, ...] = ()
    flops: Measured | None = None
    bytes: Measured | None = None
    of_ceiling: float | None = None
    fell_back: tuple[str, ...] = ()
    counted: bool = False

    @property
    def median(self) -> float:
        """Median of the samples."""
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
        """True for three or more samples close together, and for counted values."""
        low, high = self.spread
        return self.counted or (len(self.samples) >= 3 and high - low <= STABLE * self.median)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """The best rate of one kind of work, by PyTorch's own operation for it."""

    work: str  # what was timed
    rate: Measured  # FLOP/s, or bytes/s read and written
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
    """One reading of NVML; None where it gives no value."""

    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    power_w: float | None
    power_limit_w: float | None
    temperature_c: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Machine, sources and settings of a result."""

    machine: Machine
    commit: str
    dirty: bool  # files differ from the commit
    threads: int | None  # None: not recorded, in files of before format 1
    load_average: float | None  # of the minute before: what else the machine had to do
    weights: Mapping[str, str]  # name of a bundle or of synthetic weights -> digest or seed
    engines: Mapping[str, str]  # network -> backend and digest of its key
    operations: Mapping[str, str]  # operation -> implementation; for `kernels` the usual one
    libraries: Mapping[str, str] = field(default_factory=dict)  # below the packages -> version
    gpu_start: GpuState | None = None
    gpu_end: GpuState | None = None
    nvml: str = ""  # why NVML gives nothing; empty where it works or is not needed


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
        kind: the command that wrote it.
        when: UTC, ISO 8601.
        command: reproduces the result.
        scope: what was measured, in words and sizes; results with equal scope are comparable.
        ceilings: None for kinds without shares of a ceiling.
        sides: name of a program -> description.
        ratios: refused where two clips differ by more than rounding, or a program fell back.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    format: int = FORMAT
    kind: Kind
    when: str
    command: str
    scope: Mapping[str, str]
    identity: Identity
    ceilings: Ceilings | None
    figures: tuple[Figure, ...]
    sides: Mapping[str, str]
    kernels: tuple[KernelRow, ...] = ()
    clips: tuple[Clip, ...] = ()
    equivalence: tuple[Equivalence, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    differences: tuple[OutputDifference, ...] = ()
    quality: Quality | None = None
    kills: Kills | None = None
    skipped: tuple[Skipped, ...] = ()


_RESULT: Final[TypeAdapter[Any]] = TypeAdapter(Result)


def to_json(result: Result) -> str:
    """Return the text of a results file."""
    return _RESULT.dump_json(result, indent=1).decode() + "\n"


def require_folder(out: Path) -> None:
    """Raise BadRequest, before anything is measured, where a results file could not be written."""
    if not out.parent.is_dir():
        raise BadRequest(
            f"cannot write {out}",
            got=f"{out.parent}, which is not a folder",
            do=f"mkdir -p {out.parent}",
        )
    require_replaceable(out)


def write_result(result: Result, path: Path) -> None:
    """Write the file whole or not at all. Raises WriteFailed."""
    write_text(path, to_json(result))


def read_result(path: Path) -> Result:
    """Read a results file. Raises BadRequest where it is none, or a newer version's."""
    try:
        content = _escaped(parse_json(read_text(path, MAX_BYTES)))
    except UnreadableInput as error:
        raise BadRequest(
            f"cannot read {path}", got=error, do="give a results file of `pw bench`"
        ) from error
    version = content.get("format") if isinstance(content, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise BadRequest(
            f"{path} is from a newer version of PixelWizard Runtime",
            got=f"format {version}",
            wanted=f"format {FORMAT} or lower",
            do="use the version that wrote it, or a newer one",
        )
    try:
        result: Result = _RESULT.validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        location = ".".join(str(part) for part in first["loc"])
        raise BadRequest(
            f"{path} is not a results file",
            got=f"{location}: {first['msg']}" if location else first["msg"],
            wanted="a file written by a program of `pw bench`",
            do="measure again with this version",
        ) from error
    for figure in result.figures:
        if figure.unit == "s" and min(figure.samples) < SHORTEST:
            raise BadRequest(
                f"{path} is not a results file",
                got=f"{figure.name} took {min(figure.samples)} s",
                wanted="times above 0",
                do="measure again with this version",
            )
    return result


def _escaped(content: Any) -> Any:
    """Return JSON without characters that drive a terminal: tables show its texts."""
    if isinstance(content, dict):
        return {printable(key): _escaped(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_escaped(value) for value in content]
    return printable(content) if isinstance(content, str) else content
