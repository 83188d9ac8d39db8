# SPDX-License-Identifier: Apache-2.0
"""The packages of TensorRT: supported versions, their messages, and checks of their tensors.

There are two: TensorRT, and TensorRT for RTX, with nearly the same interface. `Library` says what
differs. Modules of this folder use only names that exist in every supported version, and in both
unless they ask for the one; `python tests/engines/tensorrt/names.py` prints them. Integers of enums
moved between versions and are never stored.
"""

from __future__ import annotations

import importlib
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

from pw_engines.engine import EngineError
from pw_engines.spec import DType, EngineSpec, TensorSpec

KEPT: Final = 40  # messages; a failing build repeats them
LibraryName = Literal["tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """One of the packages.

    Attributes:
        name: of the backend, and of the extra that installs it.
        title: as users know it.
        modules: its Python module; the first that can be imported.
        oldest: first supported version.
        before: first version that is not.
        workspace: bytes of scratch memory that the builder may plan with. A number that never
            changes: it is part of a plan's bytes.
        targets: GPU architectures that plans are compiled for, on any machine; empty where the
            builder needs the GPU itself.
    """

    name: LibraryName
    title: str
    modules: tuple[str, ...]
    oldest: tuple[int, int]
    before: tuple[int, int]
    workspace: int
    targets: tuple[str, ...] = ()

    @property
    def remedy(self) -> str:
        """The command that installs it."""
        return f'pip install "pixelwizard-runtime[{self.name}]"'


TENSORRT: Final = Library(
    name="tensorrt",
    title="TensorRT",
    modules=("tensorrt",),
    oldest=(10, 8),
    before=(12, 0),
    workspace=8 << 30,  # of one tactic; the default is the whole GPU
)
RTX: Final = Library(
    name="tensorrt-rtx",
    title="TensorRT for RTX",
    # The second one is a few lines around the first, from a package that has to be compiled.
    modules=("tensorrt_rtx_bindings", "tensorrt_rtx"),
    oldest=(1, 7),
    before=(1, 8),
    # Of the whole graph, and a smaller limit gives no smaller plan but none: see `Built.scratch`.
    workspace=64 << 30,
    # It also knows sm_75, which has neither the bf16 nor the fp32 products of our networks.
    targets=("sm_80", "sm_86", "sm_89", "sm_120", "sm_121"),
)
LIBRARIES: Final[Mapping[LibraryName, Library]] = MappingProxyType(
    {library.name: library for library in (TENSORRT, RTX)}
)


def bindings(library: Library = TENSORRT) -> Any:
    """Import the package. Raises EngineError where it is missing or not supported."""
    trt, first = None, None
    for name in library.modules:
        try:
            trt = importlib.import_module(name)
            break
        except (ImportError, OSError) as error:  # OSError: one of its libraries is damaged
            first = first or error
    if trt is None:
        raise EngineError(
            f"{library.title} cannot be imported ({first}): {library.remedy}"
        ) from first
    if not library.oldest <= version(trt) < library.before:
        oldest, before = (".".join(map(str, v)) for v in (library.oldest, library.before))
        raise EngineError(
            f"{library.title} {trt.__version__} is installed, expected >={oldest},"
            f"<{before.removesuffix('.0')}: {library.remedy}"
        )
    return trt


def version(trt: Any) -> tuple[int, int]:
    """Return major and minor version of the package."""
    text: str = trt.__version__
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


class Messages:
    """Warnings and errors of TensorRT, kept for an exception to quote.

    Attributes:
        logger: receives them.
        scratch: bytes of scratch memory of the plan that was built last, where the builder said.
    """

    def __init__(self, trt: Any) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT)
        self.scratch: int | None = None
        self.logger = _logger(trt, self._keep)

    def _keep(self, level: str | None, message: str) -> None:
        """Keep a message of a level, and the facts among those of none."""
        # Without a driver each error is followed by one about that.
        if level is not None and "cudaError 35" not in message:
            self._lines.append(f"{level}: {message}")
        elif match := re.search(r"Max Scratch Memory: (\d+) bytes", message):
            self.scratch = int(match[1])

    def need(self, result: Any, failure: str) -> Any:
        """Return `result`. Raises EngineError if it is None or False, TensorRT's failures."""
        if result is None or result is False:
            raise self.error(failure)
        return result

    def error(self, failure: str) -> EngineError:
        """Make an exception of `failure` and all messages since the last one."""
        messages = "\n  ".join(self._lines) or "TensorRT gave no reason"
        self._lines.clear()
        return EngineError(f"{failure}\n  {messages}")


def _logger(trt: Any, keep: Callable[[str | None, str], None]) -> Any:
    levels = {
        trt.ILogger.Severity.INTERNAL_ERROR: "internal error",
        trt.ILogger.Severity.ERROR: "error",
        trt.ILogger.Severity.WARNING: "warning",
    }

    class Logger(trt.ILogger):  # type: ignore[misc]  # the package has no annotations
        """Called by TensorRT, from any of its threads."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            """Pass on warnings and worse with their level, the others without."""
            keep(levels.get(severity), msg)

    return Logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """An input or output as TensorRT describes it."""

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int, ...]  # -1 for a dynamic dimension


def dtype_names(trt: Any) -> dict[Any, DType]:
    """Map TensorRT's types that engines take to our names."""
    return {
        trt.DataType.FLOAT: "fp32",
        trt.DataType.HALF: "fp16",
        trt.DataType.BF16: "bf16",
        trt.DataType.INT64: "int64",
        trt.DataType.INT8: "int8",
        trt.DataType.FP8: "fp8",
        trt.DataType.FP4: "fp4",
    }


def check_tensors(spec: EngineSpec, tensors: Iterable[TensorInfo], source: str) -> None:
    """Raise EngineError where the tensors of `source` are not those of the spec."""
    by_name = {info.name: info for info in tensors}
    mismatches = []
    for is_input, expected_tensors in ((True, spec.inputs), (False, spec.outputs)):
        for expected in expected_tensors:
            mismatch = _mismatch(spec, expected, is_input, by_name.pop(expected.name, None))
            if mismatch:
                mismatches.append(f"{expected.name}: {mismatch}")
    mismatches += [f"{name}: not in the spec" for name in by_name]
    if mismatches:
        raise EngineError(
            f"{source} is not one of {spec.segment}; export and build it again\n  "
            + "\n  ".join(mismatches)
        )


def match_by_order(spec: EngineSpec, tensors: Iterable[TensorInfo], source: str) -> tuple[str, ...]:
    """Return the names in `source` of the spec's inputs, then outputs, matched by their order.

    Raises EngineError where their number, a dtype or a shape is not that of the spec.
    """
    listed = tuple(tensors)
    names: list[str] = []
    mismatches = []
    for is_input, expected_tensors in ((True, spec.inputs), (False, spec.outputs)):
        side = "inputs" if is_input else "outputs"
        candidates = [info for info in listed if info.is_input == is_input]
        if len(candidates) != len(expected_tensors):
            mismatches.append(f"expected {len(expected_tensors)} {side}, got {len(candidates)}")
            continue
        for expected, info in zip(expected_tensors, candidates, strict=True):
            names.append(info.name)
            mismatch = _mismatch(spec, expected, is_input, info)
            if mismatch:
                mismatches.append(f"{expected.name}, there {info.name}: {mismatch}")
    if mismatches:
        raise EngineError(
            f"{source} does not have the inputs and outputs of {spec.segment} in their order\n  "
            + "\n  ".join(mismatches)
        )
    return tuple(names)


def _mismatch(
    spec: EngineSpec, expected: TensorSpec, is_input: bool, info: TensorInfo | None
) -> str:
    """Describe what is wrong with a tensor; empty if nothing is."""
    if info is None:
        return "missing"
    if info.is_input != is_input:
        sides = ("output", "input")
        return f"expected an {sides[is_input]}, got an {sides[info.is_input]}"
    if info.dtype != expected.dtype:
        return f"expected {expected.dtype}, got {info.dtype}"
    sized = expected.numbers(dict(spec.limits))
    fits = len(info.shape) == len(sized) and all(
        size == limit or (size == -1 and isinstance(dim, str))
        for size, limit, dim in zip(info.shape, sized, expected.shape, strict=True)
    )
    return "" if fits else f"expected shape {sized}, got {info.shape}"
