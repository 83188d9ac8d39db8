# SPDX-License-Identifier: Apache-2.0
"""TensorRT without TensorRT: its contract, on the CPU.

Every call is held to the signatures of the real bindings (contract.py), and failures are those of
TensorRT: None or False, and a message to the logger.
"""

from __future__ import annotations

import enum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from pw_engines.tensorrt.library import RTX
from tests.engines.tensorrt import simulated_rtx
from tests.engines.tensorrt.contract import bound_to_manifest
from tests.engines.tensorrt.names import manifest, rtx_manifest
from tests.engines.tensorrt.simulated import IHostMemory, ILogger, ITensor
from tests.engines.tensorrt.simulated_build import (
    Builder,
    IBuilderConfig,
    INetworkDefinition,
    IOptimizationProfile,
    ITimingCache,
    OnnxParser,
    ParserError,
)
from tests.engines.tensorrt.simulated_run import ICudaEngine, IExecutionContext, Runtime

VERSION = "PW_SIMULATED_TENSORRT"  # in the environment: the version that `import tensorrt` gives
CLASSES = (
    Builder, IBuilderConfig, ICudaEngine, IExecutionContext, INetworkDefinition,
    IOptimizationProfile, ITensor, ITimingCache, OnnxParser, ParserError, Runtime,
)  # fmt: skip
_OWN = (
    simulated_rtx.Builder, simulated_rtx.IBuilderConfig, simulated_rtx.ICudaEngine,
    simulated_rtx.IExecutionContext, simulated_rtx.IOptimizationProfile,
    simulated_rtx.IRuntimeCache, simulated_rtx.IRuntimeConfig, simulated_rtx.Runtime,
)  # fmt: skip
RTX_CLASSES = tuple({cls.__name__: cls for cls in (*CLASSES, *_OWN)}.values())


class _Member(enum.Enum):
    """A value of one of the enums: int() works, as in pybind11, and arithmetic does not."""

    def __int__(self) -> int:
        return self.value


def make(version: str) -> Any:
    """The package of a version; `seen` has the names that were used of it."""
    rtx = version in rtx_manifest()
    entries = (manifest() | rtx_manifest())[version]
    name = RTX.modules[0] if rtx else "tensorrt"
    trt: Any = ModuleType(name)
    trt.__spec__ = ModuleSpec(name, None)  # torch.export asks whether there is one
    trt.__version__ = version
    trt.seen = set()
    trt.ILogger = type("ILogger", (ILogger,), {})
    trt.IHostMemory = IHostMemory
    if rtx:
        trt.IProgressMonitor = type("IProgressMonitor", (simulated_rtx.IProgressMonitor,), {})
    for cls in RTX_CLASSES if rtx else CLASSES:
        members = {**bound_to_manifest(cls, entries, trt.seen), "_trt": trt}
        setattr(trt, cls.__name__, type(cls.__name__, (cls,), members))
    enums: dict[str, list[str]] = {}
    for name, what in entries.items():
        if what == "value" and "." in name:
            owner, _, member = name.rpartition(".")
            enums.setdefault(owner, []).append(member)
    for owner, names in enums.items():
        outer, _, name = owner.rpartition(".")
        setattr(getattr(trt, outer) if outer else trt, name, _Member(name, names, start=3))
    return trt
