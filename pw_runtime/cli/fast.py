# SPDX-License-Identifier: Apache-2.0
"""`--fast`: the approximations that measurements recommend, expanded into single options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from pw_runtime.cli.launch import place_of_this_process
from pw_runtime.errors import BadRequest

if TYPE_CHECKING:
    import torch

    from pw_runtime.types import Preset

STEP_CACHE: Final = 0.1  # docs/numerics.md has the errors


def _linear(preset: Preset, device: torch.device) -> str | None:
    """Return the format of linear layers that is faster here; on a GPU none was measured."""
    from pw_kernels.quantized_linear import has_integer_products

    return "int8" if device.type == "cpu" and has_integer_products() else None


def _step_cache(preset: Preset, device: torch.device) -> float | None:
    """Return the threshold for a draft of many steps."""
    from pw_runtime.sampling.step_cache import FEWEST_STEPS

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


def fast_options(
    options: Mapping[str, Any], preset: Preset, device: torch.device
) -> dict[str, object]:
    """Return what --fast adds to the options of the command line; those given there stay.

    Raises BadRequest where the preset repeats the official rounding, and where nothing is added.
    """
    quirks = [name for name, on in asdict(preset.compat).items() if on]
    if quirks:
        raise BadRequest(
            "--fast approximates, and the preset repeats the official rounding",
            got=f"compat.{', compat.'.join(quirks)}",
            do="leave --fast out, or choose a preset without them",
        )
    preset = replace(preset, highres=None) if options["draft_only"] else preset
    # Ranks may have divided the passes among them.
    divided = place_of_this_process() is not None or (options.get("processes_per_worker") or 1) > 1
    source = click.get_current_context().get_parameter_source
    chosen = {
        name: value
        for name, choose in FAST.items()
        if source(name) in (None, ParameterSource.DEFAULT)
        and not (name == "guidance_reuse" and divided)
        and (value := choose(preset, device)) is not None
    }
    given = [name for name in FAST if source(name) is ParameterSource.COMMANDLINE]
    if not chosen and not given:
        raise BadRequest(
            "--fast has nothing to approximate here",
            got=f"a draft of {preset.draft.steps} steps on {device}",
            do="leave --fast out, or choose options of docs/numerics.md yourself",
        )
    return chosen
