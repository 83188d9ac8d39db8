# SPDX-License-Identifier: Apache-2.0
"""The runtime cache of TensorRT for RTX: kernels that were finished for one GPU, kept on the disk.

The file lies beside the plan, and its name says for which GPU and driver it is. It may be lost at
any time: the next first run then takes longer.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pw_engines.tensorrt.driver import driver_version


class RuntimeCache:
    """The cache of one engine in use."""

    def __init__(self, trt: Any, runtime_config: Any, plan: Path, device: torch.device) -> None:
        """Load the cache of a plan into the configuration of its execution context."""
        self.path = cache_path(plan, device)
        # why not lazy: kernels would change during a run, and with them the last bits
        runtime_config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        runtime_config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        self._runtime_cache = runtime_config.create_runtime_cache()
        self.loaded = False
        with suppress(OSError):
            self.loaded = bool(self._runtime_cache.deserialize(self.path.read_bytes()))
        runtime_config.set_runtime_cache(self._runtime_cache)

    def save(self) -> None:
        """Write the cache, whole or not at all; a disk that refuses it costs time, no result."""
        partial = self.path.with_name(f".{self.path.name}-{os.getpid()}")
        with suppress(OSError):
            try:
                partial.write_bytes(self._runtime_cache.serialize())
                partial.replace(self.path)
            finally:
                partial.unlink(missing_ok=True)


def cache_path(plan: Path, device: torch.device) -> Path:
    """Return the file of a plan's runtime cache for this GPU and driver."""
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_properties(device).name)
    return plan.with_name(f"runtime-{gpu}-{driver_version() or 'unknown'}.cache")
