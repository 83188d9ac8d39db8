# SPDX-License-Identifier: Apache-2.0
"""The base of both halves of the simulator: faults on request, plans, tensors, the logger."""

from __future__ import annotations

import json
import os
from typing import Any

FAULT = "PW_SIMULATED_FAULT"  # "killed", "no plan", "no context", "execution", "refuse Gelu"
KINDS = {1: "FLOAT", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF", 16: "BF16"}
MAGIC = b"simulated plan\n"


def fault() -> str:
    return os.environ.get(FAULT, "")


def read_plan(plan: bytes | memoryview) -> dict[str, Any]:
    """Read the content of a plan. Raises ValueError if it is not whole."""
    data = bytes(plan)
    if not data.startswith(MAGIC):
        raise ValueError("no plan")
    return json.loads(data.removeprefix(MAGIC))


class Simulated:
    """Knows its module and can speak to the logger."""

    _trt: Any

    def _use(self, logger: Any) -> None:
        assert logger._initialised, "ILogger.__init__ was not called"
        self._logger = logger

    def _say(self, text: str) -> None:
        self._logger.log(self._trt.ILogger.Severity.ERROR, text)


class ILogger:
    def __init__(self) -> None:
        self._initialised = True


class IHostMemory(bytes):
    pass


class Dims(tuple[int, ...]):
    __slots__ = ()


class ITensor(Simulated):
    def __init__(self, value: Any) -> None:
        tensor_type = value.type.tensor_type
        self._name = value.name
        self._kind = KINDS[tensor_type.elem_type]
        self._shape = Dims(dim.dim_value or -1 for dim in tensor_type.shape.dim)

    @property
    def name(self) -> str:
        return self._name

    @property
    def dtype(self) -> Any:
        return getattr(self._trt.DataType, self._kind)

    @property
    def shape(self) -> Dims:
        return self._shape
