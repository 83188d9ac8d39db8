# SPDX-License-Identifier: Apache-2.0
"""The half of the simulator that runs: onnx.reference on the memory behind the addresses.

Work is queued on the stream that is given and done when the caller's stream waits for it
(streams.py), with all of the scratch memory overwritten: who does not wait, or gives memory that
is not theirs, is found out.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from tests.engines.tensorrt.simulated import Dims, Simulated, fault, read_plan
from tests.engines.tensorrt.streams import Stream

NUMPY = {
    "FLOAT": np.float32,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
}


class Runtime(Simulated):
    def __init__(self, logger: Any) -> None:
        self._use(logger)

    def deserialize_cuda_engine(self, serialized_engine: bytes | memoryview) -> Any:
        try:
            plan = read_plan(serialized_engine)
        except ValueError:
            self._say("Serialization assertion safeVersionRead failed")
            return None
        if plan["version"] != self._trt.__version__:
            self._say(f"The engine plan file is of version {plan['version']}")
            return None
        return self._trt.ICudaEngine(plan, self._logger)


class ICudaEngine(Simulated):
    def __init__(self, plan: dict[str, Any], logger: Any) -> None:
        self._use(logger)
        self._model = onnx.load_model_from_string(bytes.fromhex(plan["model"]))
        self._shapes = plan["shapes"]
        graph = self._model.graph
        self._inputs = [value.name for value in graph.input]
        self._io = {value.name: self._trt.ITensor(value) for value in (*graph.output, *graph.input)}

    @property
    def num_io_tensors(self) -> int:
        return len(self._io)

    def get_tensor_name(self, index: int) -> str:
        return list(self._io)[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._trt.TensorIOMode
        return modes.INPUT if name in self._inputs else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self._trt.DataType, self._io[name]._kind)

    def get_tensor_shape(self, name: str) -> Dims:
        return self._io[name]._shape

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return 1000 * sum(len(value._shape) for value in self._io.values())

    def create_execution_context(self, strategy: Any = None) -> Any:
        if fault() == "no context":
            self._say("Error Code 2: OutOfMemory")
            return None
        assert strategy == self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return self._trt.IExecutionContext(self)


class IExecutionContext(Simulated):
    def __init__(self, engine: Any) -> None:
        self._use(engine._logger)
        self._engine = engine
        self._sizes: dict[str, int] = {}
        self._set: set[str] = set()
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None

    def set_input_shape(self, name: str, shape: Any) -> bool:
        expected = self._engine._shapes.get(name, self._engine._io[name]._shape)
        if tuple(shape) != tuple(expected):
            self._say(f"{name}: static dimension mismatch")
            return False
        (value,) = [item for item in self._engine._model.graph.input if item.name == name]
        for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
            self._sizes[dim.dim_param] = size
        self._set.add(name)
        return True

    def get_tensor_shape(self, name: str) -> Dims:
        graph = self._engine._model.graph
        (value,) = [item for item in (*graph.input, *graph.output) if item.name == name]
        dims = value.type.tensor_type.shape.dim
        return Dims(dim.dim_value or self._sizes.get(dim.dim_param, -1) for dim in dims)

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0, "scratch is not aligned"
        self._memory = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory % 256 == 0, f"{name} is not aligned"
        self._addresses[name] = memory
        return name in self._engine._io

    def execute_async_v3(self, stream_handle: int) -> bool:
        needed = self._engine.get_device_memory_size_for_profile_v2(0)
        reasons = [f"no address of {name}" for name in self._engine._io.keys() - self._addresses]
        if self._memory is None or self._memory[1] < needed:
            reasons.append(f"{needed} bytes of scratch memory needed, got {self._memory}")
        if self._set != set(self._engine._inputs):
            reasons.append("not every input has a shape")
        if fault() == "execution":
            reasons.append("Cuda Runtime (an illegal memory access was encountered)")
        for reason in reasons:
            self._say(reason)
        if not reasons:
            addresses, memory = dict(self._addresses), self._memory
            assert memory is not None
            Stream.of(stream_handle).enqueue(lambda: self._compute(addresses, memory))
        return not reasons

    def _compute(self, addresses: dict[str, int], memory: tuple[int, int]) -> None:
        ctypes.memset(memory[0], 0xA5, memory[1])
        model = self._engine._model
        inputs = {name: self._array(name, addresses[name]).copy() for name in self._engine._inputs}
        outputs = [value.name for value in model.graph.output]
        results = ReferenceEvaluator(model).run(outputs, inputs)
        for name, result in zip(outputs, results, strict=True):
            target = self._array(name, addresses[name])
            target[...] = np.asarray(result).astype(target.dtype)

    def _array(self, name: str, address: int) -> np.ndarray:
        dtype = np.dtype(NUMPY[self._engine._io[name]._kind])
        shape = tuple(self.get_tensor_shape(name))
        memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
        return np.frombuffer(memory, dtype=dtype).reshape(shape)
