# SPDX-License-Identifier: Apache-2.0
"""The TensorRT package: which versions we take, what it says, and how its tensors must look.

Only names that exist in every version from 10.8 to 11.4 are used, in all tensorrt*.py;
`python tests/engines/tensorrt/names.py` prints them. Integers of its enums moved between
versions and are never kept.
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
KEPT: Final = 40  # messages; a failing build repeats itself


def bindings() -> Any:
    """The package `tensorrt`. Raises EngineError where it is missing or of another version."""
    try:
        trt = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:  # OSError: one of its libraries is damaged
        raise EngineError(f"TensorRT cannot be imported ({error}): {REMEDY}") from error
    if not OLDEST <= version(trt) < BEFORE:
        raise EngineError(f"TensorRT {trt.__version__} is installed, wanted >=10.8,<12: {REMEDY}")
    return trt


def version(trt: Any) -> tuple[int, int]:
    """Major and minor version of the package."""
    text: str = trt.__version__
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


class Messages:
    """Warnings and errors of TensorRT, kept for the exception that will quote them."""

    def __init__(self, trt: Any) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT)
        self.logger = _logger(trt, self._lines)

    def need(self, result: Any, what: str) -> Any:
        """`result`, unless it is TensorRT's sign of failure: then EngineError saying `what`."""
        if result is None or result is False:
            raise self.error(what)
        return result

    def error(self, what: str) -> EngineError:
        """An exception saying `what` and everything heard since the last one."""
        said = "\n  ".join(self._lines) or "TensorRT gave no reason"
        self._lines.clear()
        return EngineError(f"{what}\n  {said}")


def _logger(trt: Any, lines: deque[str]) -> Any:
    heard = {
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
            if severity in heard:
                lines.append(f"{heard[severity]}: {msg}")

    return Logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An input or output as TensorRT describes it."""

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int, ...]  # -1 where it varies


def dtype_names(trt: Any) -> dict[Any, DType]:
    """Our names of the types that engines take."""
    return {
        trt.DataType.FLOAT: "fp32",
        trt.DataType.HALF: "fp16",
        trt.DataType.BF16: "bf16",
        trt.DataType.INT64: "int64",
    }


def check_tensors(spec: EngineSpec, found: Iterable[Found], what: str) -> None:
    """Raise EngineError where the tensors of `what` are not those of the spec."""
    got = {one.name: one for one in found}
    faults = []
    for is_input, tensors in ((True, spec.inputs), (False, spec.outputs)):
        for wanted in tensors:
            fault = _mismatch(spec, wanted, is_input, got.pop(wanted.name, None))
            if fault:
                faults.append(f"{wanted.name}: {fault}")
    faults += [f"{name}: not in the spec" for name in got]
    if faults:
        raise EngineError(
            f"{what} is not one of {spec.segment}; export and build it again\n  "
            + "\n  ".join(faults)
        )


def match_by_order(spec: EngineSpec, found: Iterable[Found], what: str) -> tuple[str, ...]:
    """Names that `what` has for the tensors of the spec: inputs, then outputs, each in order.

    Raises EngineError where their number, a dtype or a shape is not that of the spec.
    """
    listed = tuple(found)
    names: list[str] = []
    faults = []
    for is_input, tensors in ((True, spec.inputs), (False, spec.outputs)):
        kind = "inputs" if is_input else "outputs"
        got = [one for one in listed if one.is_input == is_input]
        if len(got) != len(tensors):
            faults.append(f"wanted {len(tensors)} {kind}, got {len(got)}")
            continue
        for wanted, one in zip(tensors, got, strict=True):
            names.append(one.name)
            fault = _mismatch(spec, wanted, is_input, one)
            if fault:
                faults.append(f"{wanted.name}, there {one.name}: {fault}")
    if faults:
        raise EngineError(
            f"{what} has not the inputs and outputs of {spec.segment} in their order\n  "
            + "\n  ".join(faults)
        )
    return tuple(names)


def _mismatch(spec: EngineSpec, wanted: TensorSpec, is_input: bool, got: Found | None) -> str:
    """What is wrong with a tensor; empty if nothing is."""
    if got is None:
        return "missing"
    if got.is_input != is_input:
        kinds = ("output", "input")
        return f"wanted an {kinds[is_input]}, got an {kinds[got.is_input]}"
    if got.dtype != wanted.dtype:
        return f"wanted {wanted.dtype}, got {got.dtype}"
    sized = wanted.sized(dict(spec.limits))
    fits = len(got.shape) == len(sized) and all(
        size == limit or (size == -1 and isinstance(dim, str))
        for size, limit, dim in zip(got.shape, sized, wanted.shape, strict=True)
    )
    return "" if fits else f"wanted shape {sized}, got {got.shape}"
