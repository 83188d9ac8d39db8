# SPDX-License-Identifier: Apache-2.0
"""`--fast`: the approximations that measurements recommend, expanded into single options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from pw_runtime.cli.launch import place_of_this_process
from pw_runtime.errors import BadRequest

if TYPE_CHECKING:
    import torch

    from pw_runtime.types import Preset


def fast_options(
    options: Mapping[str, Any], preset: Preset, device: torch.device
) -> dict[str, object]:
    """Return what --fast adds to the options of the command line; those given there stay.

    Raises BadRequest where the preset repeats the official rounding, and where nothing is added.
    """
    from pw_runtime.planning.fast import FAST, recommended

    quirks = [name for name, on in asdict(preset.compat).items() if on]
    if quirks:
        raise BadRequest(
            "--fast approximates, and the preset repeats the official rounding",
            got=f"compat.{', compat.'.join(quirks)}",
            do="leave --fast out, or choose a preset without them",
        )
    preset = replace(preset, highres=None) if options["draft_only"] else preset
    # Ranks may have divided the passes among them.
    counts = [options.get(name) or 1 for name in ("processes_per_worker", "gpus_per_worker")]
    divided = place_of_this_process() is not None or max(counts) > 1
    source = click.get_current_context().get_parameter_source
    chosen = {
        name: value
        for name, value in recommended(preset, device).items()
        if source(name) in (None, ParameterSource.DEFAULT)
        and not (name == "guidance_reuse" and divided)
    }
    given = [name for name in FAST if source(name) is ParameterSource.COMMANDLINE]
    if not chosen and not given:
        raise BadRequest(
            "--fast has nothing to approximate here",
            got=f"a draft of {preset.draft.steps} steps on {device}",
            do="leave --fast out, or choose options of `pw docs numerics` yourself",
        )
    return chosen
