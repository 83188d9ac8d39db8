# SPDX-License-Identifier: Apache-2.0
"""Tensors on disk, known by name, shape and dtype, and read when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from pw_runtime.checkpoint.bundle import some_names
from pw_runtime.errors import BadWeights

FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor on disk; `read` maps it into memory."""

    shape: tuple[int, ...]
    dtype: str  # name in torch, without "torch."
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        itemsize: int = getattr(torch, self.dtype).itemsize
        return prod(self.shape) * itemsize


Refs = dict[str, Ref]


def shapes_of(refs: Refs) -> dict[str, tuple[int, ...]]:
    """Return the shapes by name."""
    return {name: ref.shape for name, ref in refs.items()}


def renamed(where: Path, refs: Refs, translate: Callable[[str], str | None]) -> Refs:
    """Rename tensors. Raises BadWeights for unknown names and for names that become equal."""
    result: Refs = {}
    unknown = []
    for old, ref in refs.items():
        new = translate(old)
        if new is None:
            unknown.append(old)
        elif new in result:
            raise BadWeights(
                f"{where} contains a tensor under two names",
                got=f"{old} and another name, both for {new}",
                wanted="every tensor once",
                do="save it again without the second name",
            )
        else:
            result[new] = ref
    if unknown:
        raise BadWeights(
            f"{where} has unknown tensors",
            got=some_names(unknown),
            wanted="the tensors of Wan2.2-TI2V-5B and nothing else",
            do="check that this is the checkpoint you meant",
        )
    return result


def require_floats(where: Path, refs: Refs) -> Refs:
    """Return `refs` unless some are not floating point. Raises BadWeights that names them."""
    if odd := [f"{name} ({ref.dtype})" for name, ref in refs.items() if ref.dtype not in FLOATS]:
        raise BadWeights(
            f"{where} contains integer or quantised tensors",
            got=some_names(odd),
            wanted=" or ".join(sorted(FLOATS)),
            do="convert the full-precision checkpoint",
        )
    return refs
