# SPDX-License-Identifier: Apache-2.0
"""The simulator is as strict as TensorRT: what it lets pass, the real bindings would take."""

from __future__ import annotations

from typing import Any

import pytest

from pw_engines.tensorrt.library import Messages
from tests.engines.tensorrt.contract import parameters
from tests.engines.tensorrt.names import manifest
from tests.engines.tensorrt.simulator import make
from tests.engines.tensorrt.streams import Stream


@pytest.fixture
def simulated() -> Any:
    return make("11.0.0.114")


@pytest.fixture
def config(simulated: Any) -> Any:
    return simulated.Builder(Messages(simulated).logger).create_builder_config()


def test_signatures_are_read_whole() -> None:
    (line,) = manifest()["10.8.0.43"]["ICudaEngine.create_execution_context"]
    assert parameters(line) == {"strategy": ("ExecutionContextAllocationStrategy", False)}
    (line,) = manifest()["11.0.0.114"]["IOptimizationProfile.set_shape"]
    assert list(parameters(line)) == ["input", "min", "opt", "max"]


def test_sizes_are_integers(simulated: Any, config: Any) -> None:
    with pytest.raises(TypeError, match="pool_size is float"):
        config.set_memory_pool_limit(simulated.MemoryPoolType.WORKSPACE, 1e9)


def test_enums_are_not_integers(simulated: Any, config: Any) -> None:
    with pytest.raises(TypeError, match="flag is int"):
        config.clear_flag(6)
    assert 1 << int(simulated.NetworkDefinitionCreationFlag.STRONGLY_TYPED) > 1


def test_arguments_have_the_names_and_number_of_the_bindings(config: Any) -> None:
    cache = config.create_timing_cache(b"")
    with pytest.raises(TypeError, match="argument ignore"):
        config.set_timing_cache(cache, ignore=False)
    with pytest.raises(TypeError, match="no ignore_mismatch"):
        config.set_timing_cache(cache)


def test_what_tensorrt_11_removed_is_not_there(simulated: Any) -> None:
    assert not hasattr(simulated.BuilderFlag, "FP16")
    assert not hasattr(simulated.ICudaEngine, "device_memory_size")
    assert not hasattr(simulated.IExecutionContext, "execute_async_v2")


def test_a_logger_must_be_initialised(simulated: Any) -> None:
    class Silent(simulated.ILogger):
        def __init__(self) -> None:
            pass

    with pytest.raises(AttributeError):
        simulated.Runtime(Silent())


def test_the_default_stream_is_refused() -> None:
    with pytest.raises(AssertionError, match="default stream"):
        Stream.of(0)


def test_a_stream_that_waited_for_nobody_takes_no_work() -> None:
    with pytest.raises(AssertionError, match="did not wait"):
        Stream().enqueue(lambda: None)
