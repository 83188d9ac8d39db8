# SPDX-License-Identifier: Apache-2.0
"""Compiled engines behind one protocol: specification, store, and backends that run them."""

from pw_engines.engine import Engine, EngineError, Parity, check_parity, require_parity
from pw_engines.spec import (
    DTYPES,
    SMALLEST,
    Backend,
    DType,
    EngineKey,
    EngineSpec,
    FrontEnd,
    Platform,
    TensorSpec,
    digest_of,
    dtype_name,
)
from pw_engines.speed import Speed, measure_speed
from pw_engines.store import EngineStore, StoreError

__all__ = [
    "DTYPES",
    "SMALLEST",
    "Backend",
    "DType",
    "Engine",
    "EngineError",
    "EngineKey",
    "EngineSpec",
    "EngineStore",
    "FrontEnd",
    "Parity",
    "Platform",
    "Speed",
    "StoreError",
    "TensorSpec",
    "check_parity",
    "digest_of",
    "dtype_name",
    "measure_speed",
    "require_parity",
]
