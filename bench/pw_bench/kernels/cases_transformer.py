# SPDX-License-Identifier: Apache-2.0
"""The transformer's operations of the kernel bench: attention and what stands between products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pw_kernels
from pw_bench.kernels.cases import BF16, DIM, GRIDS, HEADS, Arguments, Case, Maker, rows_of
from pw_kernels import Update
from pw_kernels.guided_update import reference as step_reference
from pw_kernels.qk_norm_rope import angles_of_tokens

TEXT_KEYS = 82
EPS = 1e-6
ANGLES = 128  # positions of the rotary tables, the longest side of a 4K grid and more


def transformer_cases(size: str, make: Maker) -> Iterator[Case]:
    """Every operation of a block, and the solver's step, over all tokens of a clip."""
    yield _self_attention(size, make)
    yield _text_attention(size, make)
    yield _norm_modulate(size, make)
    yield _gate_residual(size, make)
    yield _gate_residual_norm(size, make, modulated=False)
    yield _gate_residual_norm(size, make, modulated=True)
    yield _qk_norm_rope(size, make)
    yield _guided_update(size, make)


def tokens_of(size: str) -> int:
    """Tokens of a clip."""
    return GRIDS[size][0] * GRIDS[size][1] * GRIDS[size][2]


def _exact_attention(rows: Tensor) -> Callable[[Arguments], Tensor]:
    def exact(arguments: Arguments) -> Tensor:
        q, k, v, bias = arguments
        heads = []
        for head in range(q.shape[1]):  # one at a time: its keys in fp64 are 0.25 GB at 4K
            logits = q[rows, head].double() @ k[:, head].double().T * q.shape[2] ** -0.5
            logits += 0 if bias is None else bias.double()
            heads.append(logits.softmax(-1) @ v[:, head].double())
        return torch.stack(heads, dim=1)  # [R, N, K]

    return exact


def _self_attention(size: str, make: Maker) -> Case:
    """All tokens of a clip with one another. Queries have a gain that lets softmax choose."""
    tokens, rows = tokens_of(size), rows_of(tokens_of(size), make.device)

    def arguments() -> Arguments:
        shape = (tokens, HEADS, DIM // HEADS)
        q, k, v = (make(*shape, dtype=BF16, seed=seed) for seed in range(3))
        return 2 * q, k, v, None

    return Case(
        op="attention",
        name="self-attention",
        size=size,
        arguments=arguments,
        call=pw_kernels.attention,
        result=lambda given, _: given,
        sample=lambda out: out[rows],
        exact=_exact_attention(rows),
        implementations=make.implementations("attention"),
        bound="flops",
    )


def _text_attention(size: str, make: Maker) -> Case:
    """All tokens with those of a prompt, whose last key stands for the padding."""
    tokens, rows = tokens_of(size), rows_of(tokens_of(size), make.device)

    def arguments() -> Arguments:
        heads = (HEADS, DIM // HEADS)
        q = make(tokens, *heads, dtype=BF16)
        k, v = (make(TEXT_KEYS, *heads, dtype=BF16, seed=seed) for seed in (1, 2))
        bias = torch.zeros(TEXT_KEYS, dtype=BF16, device=make.device)
        bias[-1] = 6.0625
        return q, k, v, bias

    return Case(
        op="attention",
        name="text attention",
        size=size,
        arguments=arguments,
        call=pw_kernels.attention,
        result=lambda given, _: given,
        sample=lambda out: out[rows],
        exact=_exact_attention(rows),
        implementations=tuple(
            one for one in make.implementations("attention") if one in ("reference", "triton")
        ),
        bound="flops",
    )


def _row_wise(
    op: str,
    size: str,
    make: Maker,
    arguments: Callable[[], Arguments],
    exact: Callable[[Arguments, Tensor], Tensor],
    *,
    name: str | None = None,
    result: Callable[[Any, Arguments], Tensor] = lambda given, _: given,
) -> Case:
    """A case whose rows are computed each by itself; `exact` is given which ones to compute."""
    rows = rows_of(tokens_of(size), make.device)
    return Case(
        op=op,
        name=name or op,
        size=size,
        arguments=arguments,
        call=getattr(pw_kernels, op),
        result=result,
        sample=lambda out: out[rows],
        exact=lambda arguments: exact(arguments, rows),
        implementations=make.implementations(op),
    )


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def _norm_modulate(size: str, make: Maker) -> Case:
    def arguments() -> Arguments:
        rows = make(1, 2, DIM, seed=1)
        return make(tokens_of(size), DIM), rows[:, 0], rows[:, 1], EPS, BF16

    def exact(arguments: Arguments, rows: Tensor) -> Tensor:
        x, shift, scale = (one.double() for one in (arguments[0][rows], *arguments[1:3]))
        return _normed(x) * (1 + scale) + shift

    return _row_wise("norm_modulate", size, make, arguments, exact)


def _gate_residual(size: str, make: Maker) -> Case:
    def arguments() -> Arguments:
        shape = (tokens_of(size), DIM)
        return make(*shape), make(*shape, dtype=BF16, seed=1), make(1, DIM, seed=2)

    def exact(arguments: Arguments, rows: Tensor) -> Tensor:
        x, y, gate = arguments
        return x[rows].double() + y[rows].double() * gate.double()

    return _row_wise("gate_residual", size, make, arguments, exact)


def _gate_residual_norm(size: str, make: Maker, *, modulated: bool) -> Case:
    """After self-attention: gated, then the norm with parameters; after that to the text: not."""

    def arguments() -> Arguments:
        shape = (tokens_of(size), DIM)
        x, y = make(*shape), make(*shape, dtype=BF16, seed=1)
        gate, *rows = (make(1, DIM, seed=seed) for seed in (2, 3, 4))
        if not modulated:
            return x, y, gate, rows[0][0], rows[1][0], EPS, BF16
        return x, y, None, *rows, EPS, BF16

    def exact(arguments: Arguments, rows: Tensor) -> Tensor:
        x, y, gate, weight, bias = arguments[:5]
        y = y[rows].double() * (1 if gate is None else gate.double())
        normed = _normed(x[rows].double() + y)
        return normed * (weight.double() + (1 if modulated else 0)) + bias.double()

    def call(*given: Any) -> Tensor:
        return pw_kernels.gate_residual_norm(*given, modulated=modulated)

    case = _row_wise(
        "gate_residual_norm",
        size,
        make,
        arguments,
        exact,
        name=f"residual, {'modulated' if modulated else 'affine'} norm",
    )
    return replace(case, call=call)


def _qk_norm_rope(size: str, make: Maker) -> Case:
    """In place on a packed projection."""

    def arguments() -> Arguments:
        packed = make(tokens_of(size), 3 * DIM, dtype=BF16)
        gains = [1 + make(DIM, dtype=BF16, seed=seed) / 4 for seed in (1, 2)]
        angle = make(ANGLES, DIM // HEADS // 2, seed=3)
        place = torch.tensor([0, *GRIDS[size][1:]], device=make.device)
        return *packed.split(DIM, dim=1)[:2], *gains, angle.cos(), angle.sin(), place, HEADS, EPS

    def exact(arguments: Arguments, rows: Tensor) -> Tensor:
        q, _, gain, _, cos, sin, place = arguments[:7]
        x = q[rows].double()
        x = x / (x.square().mean(-1, True) + EPS).sqrt() * gain.double()
        cos, sin = (angles_of_tokens(one, place, len(q))[rows].double() for one in (cos, sin))
        pairs = torch.view_as_complex(x.unflatten(-1, (HEADS, -1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)[:, None]).flatten(1)

    return _row_wise(
        "qk_norm_rope", size, make, arguments, exact, result=lambda _, arguments: arguments[0]
    )


def _guided_update(size: str, make: Maker) -> Case:
    """A step of the second order with its corrector."""
    frames, rows, columns = GRIDS[size]
    corrector, predictor = Update(0.4, 0.6, 0.6, 0.3, 0.2, -0.7), Update(0.5, 0.5, 0.5, 0, 0.5, -1)

    def arguments() -> Arguments:
        latents = (make(48, frames, 2 * rows, 2 * columns, seed=seed) for seed in range(6))
        return *latents, 5.0, 0.8, corrector, predictor

    def exact(arguments: Arguments, rows: Tensor) -> Tensor:
        some = [one[:, :, -1:].double() for one in arguments[:6]]
        return step_reference(*some, *arguments[6:])[0]

    case = _row_wise(
        "guided_update", size, make, arguments, exact, result=lambda given, _: given[0]
    )
    return replace(case, sample=lambda out: out[:, :, -1:])
