# SPDX-License-Identifier: Apache-2.0
"""The transformer's pointwise operations, each with arguments that it takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pw_kernels import Update
from tests.kernels.accuracy import normal

DIM, HEADS = 3072, 24
GRIDS = {"2k": (31, 45, 80), "4k": (31, 67, 120)}  # tokens as (T, H/2, W/2)
LEAST = {  # bytes per element that a case at its true size has to move
    **{"norm_modulate": 6, "gate_residual": 10, "gated, affine": 12, "modulated": 12},
    **{"qk_norm_rope": 8, "guided_update": 36},
}


@dataclass(frozen=True)
class Case:
    """An operation and arguments that it takes, in the order of its operator."""

    name: str
    arguments: tuple[Any, ...]
    keyword: str = ""  # the last argument, where the function takes it by this name only

    @property
    def module(self) -> Any:
        return importlib.import_module(f"pw_kernels.{self.name}")

    @property
    def operator(self) -> Any:
        return getattr(torch.ops.pw, self.name)

    @property
    def function(self) -> Callable[..., Any]:
        """The public function."""
        function, keyword = getattr(self.module, self.name), self.keyword
        if not keyword:
            return function
        return lambda *arguments: function(*arguments[:-1], **{keyword: arguments[-1]})

    def with_argument(self, index: int, value: Any) -> tuple[Any, ...]:
        return (*self.arguments[:index], value, *self.arguments[index + 1 :])


def copies(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy the tensors among the arguments, for operations that write into them."""
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)


def results(called: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return what the call returns, then copies of its tensors after the call."""
    own = copies(arguments)
    out = called(*own)
    returned = out if isinstance(out, tuple) else () if out is None else (out,)
    return (*returned, *(a for a in own if isinstance(a, Tensor)))


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Return True if both are equal to the last bit."""
    return all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def cases(tokens: int, dim: int, heads: int) -> dict[str, Case]:
    x, bf16, rows = normal(tokens, dim), torch.bfloat16, normal(2, 6, dim, seed=1)
    q, k, gain = (normal(*shape).to(bf16) for shape in ((tokens, dim), (tokens, dim), (dim,)))
    angle = normal(tokens, dim // heads // 2)
    y, weight, bias = x.to(bf16), rows[0, 0], rows[0, 1]
    norm = (1e-6, bf16)
    residual = "gate_residual_norm"
    latents = [normal(2, 3, 4, seed=seed) for seed in range(6)]
    corrector, predictor = Update(0.4, 0.6, 0.6, 0.3, 0.2, -0.7), Update(0.5, 0.5, 0.5, 0, 0.5, -1)
    return {
        "norm_modulate": Case("norm_modulate", (x, rows[:, 0], rows[:, 1], *norm)),
        "gate_residual": Case("gate_residual", (x, y, rows[:, 2])),
        "gated, affine": Case(
            residual, (x, y, rows[:, 2], weight, bias, *norm, False), "modulated"
        ),
        "modulated": Case(residual, (x, y, None, rows[:, 0], rows[:, 1], *norm, True), "modulated"),
        "qk_norm_rope": Case(
            "qk_norm_rope",
            (q, k, gain, gain, angle.cos(), angle.sin(), torch.tensor([1, 2, 2]), heads, 1e-6),
        ),
        "first step": Case(
            "guided_update", (*latents[:4], None, None, 5.0, 0.9, None, Update(0.5, 0.5))
        ),
        "guided_update": Case("guided_update", (*latents, 5.0, 0.8, corrector, predictor)),
    }


CASES = cases(6, 48, 3)


def meta_case(name: str, size: str) -> tuple[Case, int]:
    """Return a case of LEAST at its true size on meta, and the elements of its largest tensor."""
    grid, bf16 = GRIDS[size], torch.bfloat16
    tokens = grid[0] * grid[1] * grid[2]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    x, y = empty(tokens, DIM), empty(tokens, DIM, dtype=bf16)
    rows, weight = empty(1, 6, DIM), empty(DIM)
    q, k, _ = empty(tokens, 3 * DIM, dtype=bf16).split(DIM, dim=1)
    gain, angle = empty(DIM, dtype=bf16), empty(max(grid), DIM // HEADS // 2)
    latent = empty(48, grid[0], 2 * grid[1], 2 * grid[2])
    update = Update(0.5, 0.5, 0.5, 0.5, 0.5, 0.5)
    arguments: dict[str, tuple[Any, ...]] = {
        "norm_modulate": (x, rows[:, 0], rows[:, 1], 1e-6, bf16),
        "gate_residual": (x, y, rows[:, 2]),
        "gated, affine": (x, y, rows[:, 2], weight, weight, 1e-6, bf16, False),
        "modulated": (x, y, None, rows[:, 0], rows[:, 1], 1e-6, bf16, True),
        "qk_norm_rope": (q, k, gain, gain, angle, angle, empty(3, dtype=torch.int64), HEADS, 1e-6),
        "guided_update": (*[latent] * 6, 5.0, 0.5, update, Update(0.5, 0.5)),
    }
    case = Case(CASES[name].name, arguments[name])
    return case, (latent if name == "guided_update" else x).numel()
