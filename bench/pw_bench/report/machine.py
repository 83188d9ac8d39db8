# SPDX-License-Identifier: Apache-2.0
"""Machine and settings of a result as text: every field, including those added later."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from pw_bench.report.units import quantity
from pw_bench.results import Identity
from pw_runtime.system.machine import Gpu
from pw_runtime.system.packages import Package

_LABELS = {
    "os": "system",
    "cpu": "CPU",
    "gpus": "GPUs",
    "gpu_start": "GPU before",
    "gpu_end": "GPU after",
    "nvml": "NVML",
}
_UNITS = {"_mhz": "MHz", "_w": "W", "_c": "°C"}


def machine_rows(identity: Identity) -> list[tuple[str, str]]:
    """Return label and value of every field."""
    return [row for field, value in _fields(identity) for row in _rows(field, value)]


def machine_name(identity: Identity) -> str:
    """Return the GPUs with their driver, or the CPU, in one line."""
    machine = identity.machine
    if not machine.gpus:
        return f"{machine.cpu}, {machine.cores} cores"
    names = [gpu.name for gpu in machine.gpus]
    unique = dict.fromkeys(names)
    gpus = ", ".join(f"{names.count(n)} x {n}" if names.count(n) > 1 else n for n in unique)
    return f"{gpus}, driver {machine.driver or 'unknown'}, {machine.cpu}"


def _fields(noun: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(noun):
        yield field.name, getattr(noun, field.name)


def _rows(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if name == "dirty":
        yield "dirty", "YES: files differed from the commit" if value else "no"
    elif name == "machine":
        for field, inner in _fields(value):
            yield from _rows(field, inner)
    elif dataclasses.is_dataclass(value):
        parts = [f"{_label(field)} {_text(field, inner)}" for field, inner in _fields(value)]
        yield _label(name), ", ".join(parts)
    else:
        yield _label(name), _text(name, value)


def _label(name: str) -> str:
    for ending in ("_bytes", *_UNITS):
        name = name.removesuffix(ending)
    return _LABELS.get(name, name.replace("_", " "))


def _text(name: str, value: Any) -> str:
    unit = next((unit for ending, unit in _UNITS.items() if name.endswith(ending)), None)
    if value is None:
        return "unknown"
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {inner}" for key, inner in value.items()) or "none"
    if isinstance(value, tuple):
        return ", ".join(_item(item) for item in value) or "none"
    if name.endswith("_bytes"):
        return quantity("B", value)
    if isinstance(value, float):
        value = f"{value:.4g}"
    return f"{value} {unit}" if unit else str(value) or "works or is not needed"


def _item(item: Any) -> str:
    if isinstance(item, Package):
        broken = f" BROKEN: {item.broken}" if item.broken else ""
        return f"{item.name} {item.version or '(not installed)'}{broken}"
    if isinstance(item, Gpu):
        return f"{item.name} ({quantity('B', item.memory_bytes)}, sm {item.capability})"
    return str(item)
