# SPDX-License-Identifier: Apache-2.0
"""The changes that a LoRA file makes to a network, or everything about it that does not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from pw_runtime.checkpoint.bundle import FLOATS, some_names
from pw_runtime.checkpoint.lora_alpha import MetadataAlpha, known_alpha
from pw_runtime.checkpoint.lora_keys import Part, target_of
from pw_runtime.errors import BadWeights
from pw_runtime.models import expected_shapes
from pw_runtime.system.input_files import UnreadableInput
from pw_runtime.system.tensor_file import TensorFile
from pw_runtime.types import DitConfig, StageName

_WIDTHS: Final = {5120: "a Wan model of 14B", 3072: "Wan2.2-TI2V-5B", 1536: "Wan2.1 of 1.3B"}
_ALPHAS: Final = (*FLOATS, "I64", "I32", "I16", "I8", "U8")


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """A change by factor * up @ down."""

    up: str  # key of [N, rank], or of [N, rank, 1, 1, 1]
    down: str  # key of [rank, K], or of [rank, C, kt, kh, kw]
    rank: int
    factor: float  # alpha / rank
    shape: tuple[int, ...]  # of the weight

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that are read."""
        return (self.up, self.down)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A change by a tensor of the weight's own shape."""

    key: str

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that are read."""
        return (self.key,)


Change = LowRank | Difference


class _Problems:
    """Keys that cannot be used, by the reason, in words that follow "N keys"."""

    def __init__(self) -> None:
        self._keys: dict[str, list[str]] = {}

    def add(self, reason: str, key: str) -> None:
        self._keys.setdefault(reason, []).append(key)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __str__(self) -> str:
        return "; ".join(
            f"{len(keys)} key{'s' * (len(keys) > 1)} {reason}: {some_names(keys)}"
            for reason, keys in self._keys.items()
        )


def checked_changes(
    path: Path, file: TensorFile, adapter: str | None, network: StageName, config: DitConfig
) -> Mapping[str, Change]:
    """Return the changes of a network's tensors, by official name; every key is part of one.

    Args:
        path: of the file.
        file: the LoRA.
        adapter: PEFT's config of it, where that is a file of its own.
        network: to be changed.
        config: of that network.

    Raises BadWeights that lists all keys that are not, and values that are no numbers.
    """
    problems, parts = _Problems(), dict[str, dict[Part, str]]()
    for key in file.shapes:
        target = target_of(key, config)
        if isinstance(target, str):
            problems.add(target, key)
        elif target.part in (known := parts.setdefault(target.tensor, {})):
            problems.add(f"for {target.tensor}, which {known[target.part]} is for too", key)
        else:
            known[target.part] = key
    try:
        alphas = known_alpha(file.metadata, adapter)
        changes: dict[str, Change] = {}
        shapes = expected_shapes(network, config)
        for tensor, keys in parts.items():
            if change := _change(file, tensor, shapes[tensor], keys, alphas, problems):
                changes[tensor] = change
        broken = _Problems()
        for change in changes.values():
            _check_values(file, change, broken)
    except UnreadableInput as error:
        raise _refused(path, network, str(error)) from error
    if problems and (other := _other_model(file, changes, parts, config)):
        raise BadWeights(
            f"{path} is a LoRA for {other}, not for the {network} network",
            got=problems,
            wanted=f"a LoRA for a network {config.dim} wide",
            do="use one that was trained on this model: LoRAs fit no other",
        )
    if problems:
        raise _refused(path, network, str(problems))
    if broken:
        raise BadWeights(
            f"{path} cannot be merged into the {network} network",
            got=broken,
            wanted="finite numbers",
            do="use another file: its training has diverged, or it is damaged",
        )
    if not changes:
        raise _refused(path, network, "a file without any change of a weight")
    return changes


def _change(
    file: TensorFile,
    tensor: str,
    shape: tuple[int, ...],
    keys: Mapping[Part, str],
    alphas: MetadataAlpha | None,
    problems: _Problems,
) -> Change | None:
    """Return the change of one tensor; None where its keys make none, with the reason noted."""
    allowed = {key: _ALPHAS if part == "alpha" else FLOATS for part, key in keys.items()}
    if bad := [key for key, dtypes in allowed.items() if file.dtypes[key] not in dtypes]:
        for key in bad:
            problems.add(f"of dtype {file.dtypes[key]}, which is not read", key)
        return None
    if "difference" in keys:
        key = keys["difference"]
        if len(keys) > 1:
            problems.add("with a difference where there are matrices too", key)
        elif file.shapes[key] != shape:
            problems.add(f"of the shape {list(file.shapes[key])}, wanted {list(shape)}", key)
        else:
            return Difference(key=key)
        return None
    if "up" not in keys or "down" not in keys:
        for part, key in keys.items():
            other = {"up": "down", "down": "up"}.get(part, "up and down")
            problems.add(f"without the matrix {other} that belongs to it", key)
        return None
    return _low_rank(file, tensor, shape, keys, alphas, problems)


def _low_rank(
    file: TensorFile,
    tensor: str,
    shape: tuple[int, ...],
    keys: Mapping[Part, str],
    alphas: MetadataAlpha | None,
    problems: _Problems,
) -> LowRank | None:
    """Return the change by two matrices, if their shapes are right."""
    up, down = file.shapes[keys["up"]], file.shapes[keys["down"]]
    rows, columns = shape[0], math.prod(shape[1:])
    matrices = len(shape) > 1 and len(up) > 1 and len(down) > 1
    if not matrices or (up[0], math.prod(down[1:])) != (rows, columns):
        found = f"{list(up)} and {list(down)}"
        problems.add(f"of the shapes {found}, for a weight {list(shape)}", keys["up"])
        return None
    rank = down[0]
    if math.prod(up[1:]) != rank or not 1 <= rank <= max(rows, columns):
        problems.add(f"of the ranks {math.prod(up[1:])} and {rank}, for {list(shape)}", keys["up"])
        return None
    factor = 1.0
    if "alpha" in keys:
        alpha = file.tensors((keys["alpha"],))[keys["alpha"]]
        if alpha.numel() != 1 or not math.isfinite(float(alpha)):
            problems.add("with an alpha that is no finite number", keys["alpha"])
            return None
        factor = float(alpha) / rank
    elif alphas is not None:
        factor = alphas.factor(tensor, rank)
    return LowRank(up=keys["up"], down=keys["down"], rank=rank, factor=factor, shape=shape)


def _check_values(file: TensorFile, change: Change, problems: _Problems) -> None:
    for key, x in file.tensors(change.keys).items():
        if key in change.keys and not _is_finite(x):
            problems.add("with NaN or infinity", key)


def _is_finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())


def _other_model(
    file: TensorFile,
    changes: Mapping[str, Change],
    parts: Mapping[str, Mapping[Part, str]],
    config: DitConfig,
) -> str | None:
    """Name the model that a file was made for, by the width of what does not fit."""
    sizes = {
        size
        for tensor, keys in parts.items()
        if tensor not in changes
        for part, key in keys.items()
        if part != "alpha"
        for size in file.shapes[key]
    }
    names = [f"{name} ({x} wide)" for x, name in _WIDTHS.items() if x in sizes and x != config.dim]
    return names[0] if names else None


def _refused(path: Path, network: StageName, got: str) -> BadWeights:
    return BadWeights(
        f"{path} cannot be merged into the {network} network",
        got=got,
        wanted="for its weights alone: pairs of matrices (lora_A and lora_B, or down and up) and "
        "differences (diff, diff_b)",
        do="use a LoRA that was trained on this model; for the high-res network name another one, "
        "or none, with --lora-highres",
    )
