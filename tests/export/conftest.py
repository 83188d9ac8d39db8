# SPDX-License-Identifier: Apache-2.0
"""The simulated TensorRT of tests/engines/tensorrt, and a faster exporter."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from functools import cache

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry

from tests.engines.tensorrt.conftest import cuda, simulate, trt

__all__ = ["cuda", "simulate", "trt"]


@pytest.fixture(autouse=True, scope="session")
def _translations_parsed_once() -> Iterator[None]:
    """For each model, PyTorch parses the source of 500 translations: most of an export's time.

    They are shared here, in lists of their own: an export adds its own translations.
    """
    parse = cache(ONNXRegistry.from_torchlib)

    def from_torchlib(*opset: int, **options: int) -> ONNXRegistry:
        registry = copy(parse(*opset, **options))
        registry.functions = {name: [*metas] for name, metas in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        yield
