# SPDX-License-Identifier: Apache-2.0
"""TensorRT and CUDA as the tests have them: a simulator of each, in this process and below."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pw_engines.tensorrt.engine import lane
from pw_engines.tensorrt.library import RTX
from tests.engines.tensorrt.names import manifest, rtx_manifest
from tests.engines.tensorrt.simulator import VERSION, make
from tests.engines.tensorrt.streams import Cuda

SITE = Path(__file__).with_name("site")
NEWEST = list(manifest())[-1]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    """torch.cuda on the CPU; no engine of an earlier test shares anything."""
    simulated = Cuda()
    simulated.install(monkeypatch)
    lane.cache_clear()
    yield simulated
    lane.cache_clear()


@pytest.fixture
def simulate(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Makes `import tensorrt` give the simulator of a version, here and in child processes."""

    def use(version: str) -> Any:
        trt = make(version)
        monkeypatch.setenv(VERSION, version)
        monkeypatch.syspath_prepend(SITE)
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        return trt

    return use


@pytest.fixture
def rtx_trt(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> Any:
    """TensorRT for RTX, simulated, in this process."""
    (version,) = rtx_manifest()
    module = make(version)
    monkeypatch.setitem(sys.modules, RTX.modules[0], module)
    return module


@pytest.fixture
def trt(simulate: Callable[[str], Any]) -> Any:
    """The newest version."""
    return simulate(NEWEST)
