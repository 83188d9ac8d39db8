# SPDX-License-Identifier: Apache-2.0
"""One line about what a run's networks run on."""

from __future__ import annotations

from collections.abc import Mapping

from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.execution.decoder_lookup import (
    DRAFT_DECODED,
    ONLY_FP32,
)
from pw_runtime.execution.engine_lookup import ASKED_FOR, NONE_BUILT, EngineSet, build_command
from pw_runtime.presets import preset_name
from pw_runtime.types import Network, Preset, RunOptions


def describe_engines(
    engines: Mapping[Network, EngineSet], bundle: Bundle, preset: Preset, options: RunOptions
) -> str:
    """Say in one line on which device and in which form the networks of a run run."""
    groups: dict[str, list[str]] = {}
    for network, engine_set in engines.items():
        name = "decoder" if network == "vae" else f"{network} network"
        groups.setdefault(_form(engine_set), []).append(name)
    parts = [
        form if len(groups) == 1 else f"{' and '.join(names)} {form}"
        for form, names in groups.items()
    ]
    device = "the CPU" if options.torch_device.type == "cpu" else str(options.torch_device)
    text = f"running on {device} in {options.compute_precision}: {'; '.join(parts)}"
    missing = [
        network
        for network, one in engines.items()
        if one.reason == NONE_BUILT
        # On a CPU `pw build` makes none for the decoder, unless AOTInductor is asked for.
        and not (network == "vae" and options.torch_device.type == "cpu")
    ]
    if missing:
        command = build_command(options, bundle.root)
        with_decoder = f" --preset {preset_name(preset)}" if "vae" in missing else ""
        text += f" (to compile: `{command}{with_decoder}`)"
    return text


def _form(engine_set: EngineSet) -> str:
    text = _runs(engine_set)
    return ", ".join(filter(None, (text, engine_set.linear, engine_set.attention)))


def _runs(engine_set: EngineSet) -> str:
    if engine_set.backend != "eager":
        ratio = engine_set.ratio
        measured = "" if ratio is None else f", a step {ratio:.2f}x as fast but for attention"
        return f"on {engine_set.reason} ({engine_set.backend}{measured})"
    if engine_set.reason in (ASKED_FOR, NONE_BUILT, ONLY_FP32, DRAFT_DECODED):
        return "not compiled"
    return f"not compiled ({engine_set.reason})"
