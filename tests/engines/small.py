# SPDX-License-Identifier: Apache-2.0
"""A small segment for tests of the engines, and keys that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pw_engines.spec import EngineKey, EngineSpec, TensorSpec
from pw_engines.store import EngineStore

LIMIT = 40
NAME = "engine.bin"
DATA = b"machine code" * 100


class Mix(nn.Module):
    """x [tokens, 8], weight [8, 8] -> tanh(x W^T) and the mean over features [tokens]."""

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(x @ weight.T), x.mean(dim=1)


def spec(**changes: Any) -> EngineSpec:
    parts: dict[str, Any] = {
        "segment": "mix",
        "inputs": (
            TensorSpec(name="x", dtype="fp32", shape=("tokens", 8)),
            TensorSpec(name="weight", dtype="fp32", shape=(8, 8)),
        ),
        "outputs": (
            TensorSpec(name="y", dtype="fp32", shape=("tokens", 8)),
            TensorSpec(name="mean", dtype="fp32", shape=("tokens",)),
        ),
        "limits": (("tokens", LIMIT),),
        "sources": "0",
        "numbers": (("eps", 1e-6),),
    }
    return EngineSpec(**(parts | changes))


def key(**changes: Any) -> EngineKey:
    parts: dict[str, Any] = {"spec": spec(), "backend": "aoti", "platform": (("torch", "2.13.0"),)}
    return EngineKey(**(parts | changes))


def tensors(tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs for a number of tokens, and outputs full of NaN."""
    generator = torch.Generator().manual_seed(tokens)
    inputs = [torch.randn(tokens, 8, generator=generator), torch.randn(8, 8, generator=generator)]
    nan = float("nan")
    return inputs, [torch.full((tokens, 8), nan), torch.full((tokens,), nan)]


def put(store: EngineStore, expected: EngineKey | None = None, data: bytes = DATA) -> Path:
    """Build and publish as the runtime does; gives the engine's folder."""
    expected = expected or key()
    with store.locked(expected) as mine, store.publishing(expected, NAME) as path:
        assert mine
        path.write_bytes(data)
    return store.root / expected.folder
