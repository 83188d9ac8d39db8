# SPDX-License-Identifier: Apache-2.0
"""The simulated TensorRT of tests/engines/tensorrt."""

from __future__ import annotations

from tests.engines.tensorrt.conftest import cuda, simulate, trt

__all__ = ["cuda", "simulate", "trt"]
