# SPDX-License-Identifier: Apache-2.0
from pw_runtime.types import DecodePlan, MemoryItem, VaeConfig


def decode_memory(
    config: VaeConfig, shape: tuple[int, ...], plan: DecodePlan
) -> tuple[MemoryItem, ...]:
    return (MemoryItem(name="stub", bytes=10**9, place="device"),)
