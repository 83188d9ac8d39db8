# SPDX-License-Identifier: Apache-2.0
"""LoRAs baked into a checkpoint before it is written: its weights are then those of a merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import torch

from pw_export.checkpoints.parts import Part
from pw_export.checkpoints.published import Checkpoint
from pw_export.checkpoints.tensor_refs import Ref
from pw_runtime.checkpoint.lora import Lora, lora_texts, merged, read_loras
from pw_runtime.checkpoint.lora_choice import lora_choice
from pw_runtime.types import DitConfig, LoraFile, StageName

BAKED: Final = "loras."  # prefix of their entries among the sources of a bundle


def with_baked(
    checkpoint: Checkpoint,
    both: Sequence[LoraFile],
    highres: Sequence[LoraFile] | None,
    say: Callable[[str], None],
) -> Checkpoint:
    """Return a checkpoint whose weights have LoRAs merged into them when they are read.

    What a LoRA touches becomes fp32, so that a run with the bundle computes with the bits of one
    that merges as it loads. File, digest and scale of each are among the sources.

    Args:
        checkpoint: headers and configs.
        both: for both transformers.
        highres: for the high-res one in place of these; None: the same.
        say: called with a line for each.

    Raises BadRequest, BadWeights as `read_loras` does.
    """
    parts: dict[StageName, Part[DitConfig]] = {"draft": checkpoint.draft}
    if checkpoint.highres is not None:
        parts["highres"] = checkpoint.highres
    chosen = lora_choice(both, highres, has_highres=checkpoint.highres is not None)
    loras = read_loras(chosen, {network: part.config for network, part in parts.items()})
    source = dict(checkpoint.source)
    for text in lora_texts(loras, parts):
        say(text)
    for network, all_of_it in loras.items():
        parts[network] = _baked(parts[network], all_of_it)
        source[f"{BAKED}{network}"] = ", ".join(
            f"{x.source.file}:{x.source.scale!r} (SHA-256 {x.source.sha256})" for x in all_of_it
        )
    return replace(checkpoint, draft=parts["draft"], highres=parts.get("highres"), source=source)


def _baked(part: Part[DitConfig], loras: Sequence[Lora]) -> Part[DitConfig]:
    refs = {
        name: Ref(ref.shape, "float32", partial(_read, ref, loras, name))
        if any(lora.touches(name) for lora in loras)
        else ref
        for name, ref in part.refs.items()
    }
    return replace(part, refs=refs)


def _read(ref: Ref, loras: Sequence[Lora], name: str) -> torch.Tensor:
    return merged(loras, name, ref.read())
