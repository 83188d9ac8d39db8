# SPDX-License-Identifier: Apache-2.0
"""alpha of LoRA files that have it in their metadata, as diffusers writes it from PEFT's config."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from pw_runtime.checkpoint.keymaps import dit_to_diffusers
from pw_runtime.system.input_files import UnreadableInput, parse_json

KEY: Final = "lora_adapter_metadata"
_PREFIX: Final = "transformer."


@dataclass(frozen=True, slots=True)
class MetadataAlpha:
    """PEFT's `lora_alpha` and what changes its meaning."""

    alpha: float
    patterns: Mapping[str, float] = field(default_factory=dict)  # of modules with another one
    root: bool = False  # rank-stabilised: divided by the square root of the rank

    def factor(self, tensor: str, rank: int) -> float:
        """Return what a product of matrices is multiplied by.

        Args:
            tensor: official name of the weight.
            rank: of the matrices.
        """
        module = tensor.removesuffix(".weight")
        names = (dit_to_diffusers(module) or module, module)
        alpha = next(
            (
                value
                for pattern, value in self.patterns.items()
                for name in names
                if re.match(rf"(.*\.)?({pattern})$", name)  # as PEFT looks it up
            ),
            self.alpha,
        )
        return alpha / (math.sqrt(rank) if self.root else rank)


def metadata_alpha(metadata: Mapping[str, str]) -> MetadataAlpha | None:
    """Return alpha of a file's metadata; None where it has none.

    Raises UnreadableInput for metadata of DoRA, and for such that is damaged.
    """
    if KEY not in metadata:
        return None
    content = parse_json(metadata[KEY])
    if not isinstance(content, dict):
        raise UnreadableInput(f"{KEY} in the metadata is no JSON object")
    found = {name.removeprefix(_PREFIX): value for name, value in content.items()}
    if found.get("use_dora"):
        raise UnreadableInput("weights of DoRA, by the metadata; DoRA rescales weights")
    alpha, patterns = found.get("lora_alpha"), found.get("alpha_pattern") or {}
    if alpha is None:
        return None
    if not isinstance(patterns, dict) or not all(
        isinstance(x, int | float) and math.isfinite(x) for x in (alpha, *patterns.values())
    ):
        raise UnreadableInput(f"{KEY} in the metadata has an alpha that is no number")
    try:
        for pattern in patterns:
            re.compile(pattern)
    except re.error as error:
        raise UnreadableInput(f"{KEY} in the metadata has a broken pattern: {error}") from error
    return MetadataAlpha(float(alpha), patterns, bool(found.get("use_rslora")))
