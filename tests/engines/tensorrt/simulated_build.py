# SPDX-License-Identifier: Apache-2.0
"""The half of the simulator that builds: a plan is the ONNX model and the sizes of its profile."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import onnx

from tests.engines.tensorrt.simulated import MAGIC, Simulated, fault


class INetworkDefinition(Simulated):
    def __init__(self, strongly_typed: bool) -> None:
        self._strongly_typed = strongly_typed
        self._model = b""
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def get_output(self, index: int) -> Any:
        return self._outputs[index]


class ParserError(Simulated):
    def __init__(self, node: Any) -> None:
        self._node = node

    def node_name(self) -> str:
        return self._node.name

    def node_operator(self) -> str:
        return self._node.op_type

    def desc(self) -> str:
        return "No importer registered for op"


class OnnxParser(Simulated):
    def __init__(self, network: Any, logger: Any) -> None:
        self._use(logger)
        self._network = network
        self._faults: list[Any] = []

    @property
    def num_errors(self) -> int:
        return len(self._faults)

    def get_error(self, index: int) -> Any:
        return self._faults[index]

    def parse(self, model: bytes, path: str | None = None) -> bool:
        parsed = onnx.load_model_from_string(model)
        refused = fault().removeprefix("refuse ")
        nodes = [node for node in parsed.graph.node if node.op_type == refused]
        self._faults = [self._trt.ParserError(node) for node in nodes]
        if nodes:
            self._say("ModelImporter: parsing failed")
            return False
        self._network._model = model
        self._network._inputs = [self._trt.ITensor(value) for value in parsed.graph.input]
        self._network._outputs = [self._trt.ITensor(value) for value in parsed.graph.output]
        return True


class IOptimizationProfile(Simulated):
    def __init__(self) -> None:
        self._shapes: dict[str, list[int]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        assert tuple(min) == tuple(opt) == tuple(max), "this simulator knows one size only"
        self._shapes[input] = list(opt)


class ITimingCache(Simulated):
    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> Any:
        return self._trt.IHostMemory(self._data)


class IBuilderConfig(Simulated):
    def __init__(self) -> None:
        self._flags = {"TF32"}  # as in TensorRT
        self._workspace: int | None = None
        self._streams: int | None = None
        self._profiles: list[Any] = []
        self._cache: Any = None

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._workspace = pool_size

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag.name)

    @property
    def max_aux_streams(self) -> int | None:
        return self._streams

    @max_aux_streams.setter
    def max_aux_streams(self, value: int) -> None:
        self._streams = value

    def add_optimization_profile(self, profile: Any) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        return self._trt.ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if cache._data and cache._data != self._trt.__version__.encode():
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._trt.ITimingCache(self._trt.__version__.encode())


class Builder(Simulated):
    def __init__(self, logger: Any) -> None:
        self._use(logger)

    def create_network(self, flags: int = 0) -> Any:
        typed = 1 << int(self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        assert flags in (0, typed), "a flag that is not ours"
        return self._trt.INetworkDefinition(bool(flags))

    def create_builder_config(self) -> Any:
        return self._trt.IBuilderConfig()

    def create_optimization_profile(self) -> Any:
        return self._trt.IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        if fault() == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        shapes = config._profiles[0]._shapes if config._profiles else {}
        for tensor in network._inputs:
            if -1 in tensor._shape and tensor._name not in shapes:
                self._say(f"Network has dynamic inputs, but no profile: {tensor._name}")
                return None
        if fault() == "no plan":
            self._say("Could not find any implementation for node {ForeignNode[up]}")
            return None
        plan = {
            "version": self._trt.__version__,
            "model": network._model.hex(),
            "shapes": shapes,
            "strongly typed": network._strongly_typed,
            "flags": sorted(config._flags),
            "aux streams": config._streams,
            "workspace": config._workspace,
            "timing cache": None if config._cache is None else config._cache._data.decode(),
        }
        return self._trt.IHostMemory(MAGIC + json.dumps(plan).encode())
