# SPDX-License-Identifier: Apache-2.0
"""Approximations that measurements recommend for a preset on a device: what `--fast` stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch

from pw_kernels.quantized_linear import has_integer_products
from pw_runtime.sampling.step_cache import FEWEST_STEPS
from pw_runtime.types import Preset

STEP_CACHE: Final = 0.1  # docs/numerics.md has the errors


def _linear(preset: Preset, device: torch.device) -> str | None:
    """Return the format of linear layers that is faster here; on a GPU none was measured."""
    return "int8" if device.type == "cpu" and has_integer_products() else None


def _step_cache(preset: Preset, device: torch.device) -> float | None:
    """Return the threshold for a draft of many steps."""
    return STEP_CACHE if preset.draft.steps >= FEWEST_STEPS else None


def _guidance_reuse(preset: Preset, device: torch.device) -> int | None:
    """Return 1 for a high-res stage with a negative pass in a step between first and last."""
    highres = preset.highres
    return 1 if highres is not None and highres.steps > 2 and len(highres.passes) == 2 else None


# Option -> its value for a preset on a device; None: it would gain nothing. What is recommended
# stands here and nowhere else.
FAST: Final[Mapping[str, Callable[[Preset, torch.device], object]]] = MappingProxyType(
    {"linear": _linear, "step_cache": _step_cache, "guidance_reuse": _guidance_reuse}
)


def recommended(preset: Preset, device: torch.device) -> dict[str, object]:
    """Return the options of `RunOptions` that approximate and gain here, with their values."""
    values = {name: choose(preset, device) for name, choose in FAST.items()}
    return {name: value for name, value in values.items() if value is not None}
