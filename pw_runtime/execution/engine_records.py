# SPDX-License-Identifier: Apache-2.0
"""Facts in the manifests of stored engines: their speed, and what they were built for."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict

import torch

from pw_engines import EngineStore, Platform, Speed
from pw_engines.store import Lookup
from pw_runtime.execution.compilers import Compiler
from pw_runtime.execution.transformer_segments import BLOCK_PARTS, Segment, quantized_name
from pw_runtime.models.quantized_linear import quantized_blocks
from pw_runtime.types import DitConfig, LinearFormat

# Segments that run once per clip, and count for nothing in a step.
ONCE_PER_CLIP = ("text_embed", "text_keys_values")


def tokens_per_call(tokens: int, limit: int) -> int:
    """Return how many tokens of a clip the largest of equal calls takes, each up to `limit`."""
    return -(-tokens // -(-tokens // limit))


def step_ratio(
    segments: Mapping[str, Segment],
    files: Mapping[str, Lookup],
    config: DitConfig,
    linear: LinearFormat,
    tokens: int,
) -> float | None:
    """Return how many times as fast as uncompiled a network's engines compute one step.

    From the measurements of `pw build` on as many threads as PyTorch has here, each at the size
    nearest to a call's. Attention over all tokens, which is the same either way, is not in it.

    Args:
        segments: of the network.
        files: its engines in the store, all built.
        config: of the network.
        linear: format of its large linear layers.
        tokens: of the clip.

    Returns:
        The ratio, or None where an engine was not measured on as many threads.
    """
    threads, seconds, eager = torch.get_num_threads(), 0.0, 0.0
    counts = calls_of_step(segments, config, linear)
    for name, segment in segments.items():
        if not counts[name]:
            continue
        limit = dict(segment.spec.limits).get("tokens", 0)
        speeds = [speed for speed in files[name].speeds if speed.threads == threads]
        speed = nearest(speeds, tokens_per_call(tokens, limit) if limit else 0)
        if speed is None:
            return None
        seconds += counts[name] * speed.seconds
        eager += counts[name] * speed.eager
    return eager / seconds if seconds else None


def calls_of_step(names: Collection[str], config: DitConfig, linear: LinearFormat) -> Counter[str]:
    """Count how often a step runs each of a network's segments, which have these names."""
    no_other_part = (*BLOCK_PARTS, "control", *ONCE_PER_CLIP)
    calls = Counter(name for name in names if not name.startswith(no_other_part))
    quantized = quantized_blocks(config.num_layers, linear)
    for block in range(config.num_layers):
        controlled = block in config.control_blocks
        calls["control"] += controlled
        for part in BLOCK_PARTS:
            name = quantized_name(part, linear) if block in quantized else part
            if block == 0 and not controlled and f"{part}_first" in names:
                name = f"{part}_first"  # from the embedding in bf16; the control would make it fp32
            calls[name] += 1
    return calls


def nearest(speeds: Iterable[Speed], tokens: int) -> Speed | None:
    """Return the measurement of the nearest size, by ratio; None without any."""
    target = math.log(max(1, tokens))
    return min(speeds, key=lambda speed: abs(math.log(max(1, speed.tokens)) - target), default=None)


def built_elsewhere(
    store: EngineStore,
    segments: Mapping[str, Segment],
    compiler: Compiler,
    platforms: Iterable[Platform],
) -> str:
    """Say how stored engines of these segments differ from what runs here; empty without any.

    Args:
        store: the engines on disk.
        segments: that they would run.
        compiler: that they are of.
        platforms: what engines that run here were built for; none: they cannot run here.
    """
    specs = [json.loads(json.dumps(asdict(segment.spec))) for segment in segments.values()]
    options = [list(option) for option in compiler.options]
    here = [dict(platform) for platform in platforms][:1]
    for entry in store.entries(verify=False):
        built_by = (entry.backend, entry.key.get("options"))
        if built_by != (compiler.backend, options) or entry.key["spec"] not in specs:
            continue
        other = dict(entry.key["platform"])
        if not here:
            return "built"
        names = sorted(name for name in other.keys() | here[0].keys() if name not in _TOLD)
        parts = [
            f"with {name} {other.get(name, 'none')} where this is {here[0].get(name, 'none')}"
            for name in names
            if other.get(name) != here[0].get(name)
        ]
        parts += [text for name, text in _TOLD.items() if other.get(name) != here[0].get(name)]
        if parts:
            return f"built {' and '.join(parts)}"
    return ""


_TOLD = {  # facts that are digests
    "processor": "for another processor",
    "recipe": "by another version of this project",
}
