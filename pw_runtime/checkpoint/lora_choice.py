# SPDX-License-Identifier: Apache-2.0
"""LoRAs as users name them: FILE or FILE:SCALE, for both transformers or for each its own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from os.path import exists  # Path.exists raises for a folder that may not be searched
from pathlib import Path
from typing import Final

from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.checkpoint.lora import with_loras
from pw_runtime.errors import BadRequest
from pw_runtime.types import LoraFile, StageName

_SCALED: Final = re.compile(r"(?P<path>.+):(?P<scale>[^:/\\]*)", re.DOTALL)


def parse_lora(text: str) -> LoraFile:
    """Return a LoRA from FILE or FILE:SCALE; a file whose whole name is `text` comes first.

    Raises BadRequest for no file name, and for a scale that is no finite number.
    """
    path = Path(text)
    match = None if not text or exists(text) else _SCALED.fullmatch(text)
    if match is None:
        if not text:
            raise BadRequest("a LoRA has no file name", wanted="FILE or FILE:SCALE")
        return LoraFile(path)
    try:
        scale = float(match["scale"])
    except ValueError:
        return LoraFile(path)  # why silent: part of a name; a file that is missing is an error
    if not math.isfinite(scale):
        raise BadRequest(
            f"the scale of a LoRA is {match['scale']}", got=text, wanted="a number, such as 0.8"
        )
    return LoraFile(Path(match["path"]), scale)


def lora_choice(
    both: Sequence[LoraFile], highres: Sequence[LoraFile] | None, *, has_highres: bool
) -> Mapping[StageName, tuple[LoraFile, ...]]:
    """Return the LoRAs of each transformer.

    Args:
        both: of the draft network, and of the high-res network unless that has its own.
        highres: its own, which may be none; None: `both`.
        has_highres: the bundle has a high-res network.
    """
    found: dict[StageName, tuple[LoraFile, ...]] = {"draft": tuple(both)}
    if highres is not None or has_highres:
        found["highres"] = tuple(both if highres is None else highres)
    return {network: loras for network, loras in found.items() if loras}


def choose_loras(
    bundle: Bundle, both: Sequence[LoraFile], highres: Sequence[LoraFile] | None
) -> Bundle:
    """Return the bundle with the LoRAs of `lora_choice`. Raises BadWeights as `with_loras` does."""
    has_highres = bundle.networks.highres is not None
    return with_loras(bundle, lora_choice(both, highres, has_highres=has_highres))
