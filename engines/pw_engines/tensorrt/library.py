# SPDX-License-Identifier: Apache-2.0
"""The TensorRT package: supported versions, its messages, and checks of its tensors.

All modules of this folder use only names that exist in every version from 10.8 to 11.4;
`python tests/engines/tensorrt/names.py` prints them. Integers of its enums moved between versions
and are never stored.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from pw_engines.engine import EngineError
from pw_engines.spec import DType, EngineSpec, TensorSpec

OLDEST: Final = (10, 8)
BEFORE: Final = (12, 0)
REMEDY: Final = 'pip install "pixelwizard-runtime[tensorrt]"'
WORKSPACE: Final = 8 << 30  # bytes that one tactic may take; the default is the whole GPU
KEPT: Final = 40  # messages; a failing build repeats them


def bindings() -> Any:
    """Import the package `tensorrt`. Raises EngineError where it is missing or not supported."""
    try:
        trt = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:  # OSError: one of its libraries is damaged
        raise EngineError(f"TensorRT cannot be imported ({error}): {REMEDY}") from error
    if not OLDEST <= version(trt) < BEFORE:
        raise EngineError(f"TensorRT {trt.__version__} is installed, expected >=10.8,<12: {REMEDY}")
    return trt


def version(trt: Any) -> tuple[int, int]:
    """Return major and minor version of the package."""
    text: str = trt.__version__
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


class Messages:
    """Warnings and errors of TensorRT, kept for an exception to quote."""

    def __init__(self, trt: Any) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT)
        self.logger = _logger(trt, self._lines)

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


def _logger(trt: Any, lines: deque[str]) -> Any:
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
            """Keep warnings and worse."""
            if severity in levels:
                lines.append(f"{levels[severity]}: {msg}")

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
    sized = expected.sized(dict(spec.limits))
    fits = len(info.shape) == len(sized) and all(
        size == limit or (size == -1 and isinstance(dim, str))
        for size, limit, dim in zip(info.shape, sized, expected.shape, strict=True)
    )
    return "" if fits else f"expected shape {sized}, got {info.shape}"
