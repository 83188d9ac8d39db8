# SPDX-License-Identifier: Apache-2.0
"""alpha of LoRA files that have it in PEFT's config, which diffusers writes into their metadata.

PEFT itself writes it into a file beside them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pw_runtime.checkpoint.keymaps import dit_to_diffusers
from pw_runtime.system.input_files import MAX_JSON, UnreadableInput, parse_json, read_text

KEY: Final = "lora_adapter_metadata"
CONFIG: Final = "adapter_config.json"
_PEFT: Final = "base_model.model."
_PREFIX: Final = "transformer."
# Ways of PEFT's to begin a training that subtract the first matrices from the network's weights.
_OTHER_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PATTERN: Final = re.compile(r"(?!.*\)[*+?])[\w.^$|\\*+?()\[\]-]{1,300}")  # no repeated groups
_REPEATS: Final = 3


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


def adapter_config(path: Path, keys: Iterable[str]) -> str | None:
    """Return the config beside a LoRA of PEFT; None where there is none, or it is not PEFT's.

    Args:
        path: of the LoRA.
        keys: of its tensors.

    Raises UnreadableInput.
    """
    beside = path.with_name(CONFIG)
    if not any(key.startswith(_PEFT) for key in keys) or not beside.exists():
        return None
    try:
        return read_text(beside, MAX_JSON)
    except UnreadableInput as error:
        raise UnreadableInput(f"a file beside {CONFIG}, which is {error}") from error


def known_alpha(metadata: Mapping[str, str], config: str | None) -> MetadataAlpha | None:
    """Return alpha of a file's metadata, or else of its `adapter_config`; None where none has it.

    Raises UnreadableInput for a config of DoRA, and for one that is damaged.
    """
    if KEY in metadata:
        return _alpha(metadata[KEY], f"{KEY} in the metadata")
    return None if config is None else _alpha(config, CONFIG)


def _alpha(text: str, where: str) -> MetadataAlpha | None:
    try:
        content = parse_json(text)
    except UnreadableInput as error:
        raise UnreadableInput(f"{where} is {error}") from error
    if not isinstance(content, dict):
        raise UnreadableInput(f"{where} is no JSON object")
    found = {name.removeprefix(_PREFIX): value for name, value in content.items()}
    if found.get("use_dora"):
        raise UnreadableInput(f"weights of DoRA, by {where}; DoRA rescales weights")
    made = str(found.get("init_lora_weights")).lower()
    if made.startswith(_OTHER_BASE):
        raise UnreadableInput(
            f"changes of other weights than the published ones, by {where}: init_lora_weights is "
            f"{made[:40]!r}; PEFT saves it for these with path_initial_model_for_weight_conversion"
        )
    alpha, patterns = found.get("lora_alpha"), found.get("alpha_pattern") or {}
    if alpha is None:
        return None
    if not isinstance(patterns, dict) or not all(
        isinstance(x, int | float) and math.isfinite(x) for x in (alpha, *patterns.values())
    ):
        raise UnreadableInput(f"{where} has an alpha that is no number")
    try:
        for pattern in patterns:
            re.compile(pattern)
            if not _PATTERN.fullmatch(pattern) or sum(map(pattern.count, "*+?")) > _REPEATS:
                raise UnreadableInput(
                    f"{where} has the pattern {ascii(pattern)[:80]}, which may take for ever; "
                    f"wanted names, and at most {_REPEATS} of *, + and ?, none of a group"
                )
    except re.error as error:
        raise UnreadableInput(f"{where} has a broken pattern: {error}") from error
    return MetadataAlpha(float(alpha), patterns, bool(found.get("use_rslora")))
