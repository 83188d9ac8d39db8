# SPDX-License-Identifier: Apache-2.0
"""What TensorRT for RTX has beside TensorRT: targets, validity of plans, the runtime cache."""

from __future__ import annotations

import json
from typing import Any

from tests.engines.tensorrt import simulated_build, simulated_run
from tests.engines.tensorrt.simulated import MAGIC, Simulated, fault, read_plan


class IProgressMonitor:
    def __init__(self) -> None:
        self._initialised = True


class IBuilderConfig(simulated_build.IBuilderConfig):
    def __init__(self) -> None:
        super().__init__()
        self._targets: list[str] = []
        self._monitor: Any = None

    @property
    def progress_monitor(self) -> Any:
        return self._monitor

    @progress_monitor.setter
    def progress_monitor(self, value: Any) -> None:
        assert value._initialised, "IProgressMonitor.__init__ was not called"
        self._monitor = value

    @property
    def num_compute_capabilities(self) -> int:
        return len(self._targets)

    @num_compute_capabilities.setter
    def num_compute_capabilities(self, value: int) -> None:
        self._targets = ["NONE"] * value

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
        self._targets[index] = compute_capability.name
        return True

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag.name)


class IOptimizationProfile(simulated_build.IOptimizationProfile):
    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        assert all(low in (2, high) for low, high in zip(min, max, strict=True))
        assert tuple(opt) == tuple(max)
        super().set_shape(input, max, max, max)


class Builder(simulated_build.Builder):
    def build_serialized_network(self, network: Any, config: Any) -> Any:
        assert config._targets, "no target named: some would be dropped silently"
        config._monitor.phase_start("Building engine", None, 1)
        assert config._monitor.step_complete("Building engine", 0)
        config._monitor.phase_finish("Building engine")
        built = super().build_serialized_network(network, config)
        if built is None:
            return None
        plan = read_plan(built) | {"targets": config._targets}
        info = self._trt.ILogger.Severity.INFO
        self._logger.log(info, "[MemUsageStats] Max Scratch Memory: 4096 bytes")
        return self._trt.IHostMemory(MAGIC + json.dumps(plan).encode())


class Runtime(simulated_run.Runtime):
    def get_engine_validity(self, buffer: bytes | memoryview) -> tuple[Any, int]:
        validity = self._trt.EngineValidity
        try:
            plan = read_plan(buffer)
        except ValueError:
            return validity.INVALID, 32
        wrong_gpu = 2 * (fault() == "other gpu")
        bits = (plan["version"] != self._trt.__version__) + wrong_gpu
        return (validity.INVALID if bits else validity.VALID), bits


class IRuntimeCache(Simulated):
    def __init__(self) -> None:
        self._data = b""

    def deserialize(self, blob: bytes) -> bool:
        if not bytes(blob).startswith(b"kernels"):
            return False
        self._data = bytes(blob)
        return True

    def serialize(self) -> Any:
        return self._trt.IHostMemory(self._data)


class IRuntimeConfig(Simulated):
    def __init__(self) -> None:
        self._strategy: Any = None
        self._cache: Any = None
        self._specialization: Any = None
        self._graphs: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> Any:
        return self._trt.IRuntimeCache()

    def set_runtime_cache(self, cache: Any = None) -> bool:
        self._cache = cache
        return True

    @property
    def dynamic_shapes_kernel_specialization_strategy(self) -> Any:
        return self._specialization

    @dynamic_shapes_kernel_specialization_strategy.setter
    def dynamic_shapes_kernel_specialization_strategy(self, value: Any) -> None:
        self._specialization = value

    @property
    def cuda_graph_strategy(self) -> Any:
        return self._graphs

    @cuda_graph_strategy.setter
    def cuda_graph_strategy(self, value: Any) -> None:
        self._graphs = value


class IExecutionContext(simulated_run.IExecutionContext):
    def set_input_shape(self, name: str, shape: Any) -> bool:
        limits = self._engine._shapes.get(name)
        if limits is None:
            return super().set_input_shape(name, shape)
        if not all(2 <= size <= most for size, most in zip(shape, limits, strict=True)):
            self._say(f"{name}: outside the optimization profile")
            return False
        self._engine._shapes[name] = list(shape)
        try:
            return super().set_input_shape(name, shape)
        finally:
            self._engine._shapes[name] = limits


class ICudaEngine(simulated_run.ICudaEngine):
    def create_runtime_config(self) -> Any:
        return self._trt.IRuntimeConfig()

    def create_execution_context(self, runtime_config: Any = None) -> Any:
        assert runtime_config._specialization.name == "EAGER"
        assert runtime_config._graphs.name == "DISABLED"
        if not runtime_config._cache._data:
            runtime_config._cache._data = b"kernels of " + self._trt.__version__.encode()
        return super().create_execution_context(runtime_config._strategy)
