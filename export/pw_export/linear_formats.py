# SPDX-License-Identifier: Apache-2.0
"""The GPUs and compilers that have products of quantized operands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from pw_engines import Platform
from pw_engines.tensorrt.library import RTX
from pw_runtime.errors import BadRequest
from pw_runtime.execution.compilers import CompilerName
from pw_runtime.types import LinearFormat

# The first architecture whose matrix units have the format: 89 is compute capability 8.9.
LEAST_ARCHITECTURE: Final[Mapping[LinearFormat, int]] = MappingProxyType(
    {"exact": 0, "int8": 80, "int8-weight": 80, "fp8": 89, "nvfp4": 100}
)
_COMPILED: Final[Mapping[CompilerName, tuple[LinearFormat, ...]]] = MappingProxyType(
    {
        "aoti": ("exact", "int8", "int8-weight"),  # Inductor has no conversion to the others
        "torch-tensorrt": ("exact",),
        "openvino": ("exact",),
    }
)


def able(linear: LinearFormat, targets: Iterable[str]) -> tuple[str, ...]:
    """Return those of some targets, such as sm_89, that have a format."""
    least = LEAST_ARCHITECTURE[linear]
    return tuple(target for target in targets if int(target.removeprefix("sm_")) >= least)


def has_format(name: CompilerName, linear: LinearFormat) -> bool:
    """Tell whether a compiler builds engines with a format, on hardware that has it."""
    return name not in _COMPILED or linear in _COMPILED[name]


def require_buildable(linear: LinearFormat, name: CompilerName, platform: Platform) -> None:
    """Raise BadRequest where a compiler, or a GPU that it builds for, does not have the format."""
    compiled = _COMPILED.get(name)
    if not has_format(name, linear):
        raise BadRequest(
            f"{name} builds no engines with {linear} linear layers",
            wanted=f"--linear {' or '.join(_COMPILED[name])}",
            do="add --backend tensorrt-rtx, or generate without engines",
        )
    if compiled is not None:
        return
    facts = dict(platform)
    gpus = facts["targets"].split() if name == "tensorrt-rtx" else [_architecture(facts)]
    unable = [gpu for gpu in gpus if gpu not in able(linear, gpus)]
    if unable:
        raise BadRequest(
            f"{', '.join(unable)} has no products of {linear} numbers",
            wanted=f"sm_{LEAST_ARCHITECTURE[linear]} or later",
            do=f"build for --target {' --target '.join(able(linear, RTX.targets))}; --linear int8 "
            "works on all GPUs",
        )


def _architecture(facts: Mapping[str, str]) -> str:
    """Return sm_89 for the capability 8.9."""
    return f"sm_{facts['capability'].replace('.', '')}"
