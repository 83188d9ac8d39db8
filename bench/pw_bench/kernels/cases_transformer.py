# SPDX-License-Identifier: Apache-2.0
"""The transformer's operations in the kernel benchmark, all but its matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pw_kernels
from pw_bench.choices import CaseSize
from pw_bench.kernels.cases import BF16, DIM, GRIDS, HEADS, Arguments, Case, CaseTensors, rows_of
from pw_kernels import Update
from pw_kernels.attention.sparse import choose_blocks, choose_orders, rows_with_means
from pw_kernels.attention.sparse_variants import BLOCK
from pw_kernels.guided_update import reference as step_reference
from pw_kernels.qk_norm_rope import angles_of_tokens

TEXT_KEYS = 82
KEPT_SHARE = 0.25  # of the blocks of keys in sparse attention
EPS = 1e-6
ANGLES = 128  # positions of the rotary tables: at least the longest side of a 4K grid


def transformer_cases(size: CaseSize, tensors: CaseTensors) -> Iterator[Case]:
    """Yield every operation of a block, and the solver's step, over all tokens of a clip."""
    yield _self_attention(size, tensors)
    yield _sparse_attention(size, tensors)
    yield _text_attention(size, tensors)
    yield _norm_modulate(size, tensors)
    yield _gate_residual(size, tensors)
    yield _gate_residual_norm(size, tensors, modulated=False)
    yield _gate_residual_norm(size, tensors, modulated=True)
    yield _qk_norm_rope(size, tensors)
    yield _guided_update(size, tensors)


def tokens_of(size: CaseSize) -> int:
    """Return the number of tokens of a clip."""
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


def _self_attention(size: CaseSize, tensors: CaseTensors) -> Case:
    """Return attention among all tokens of a clip; queries have a gain that sharpens softmax."""
    tokens, rows = tokens_of(size), rows_of(tokens_of(size), tensors.device)

    def arguments() -> Arguments:
        shape = (tokens, HEADS, DIM // HEADS)
        q, k, v = (tensors(*shape, dtype=BF16, seed=seed) for seed in range(3))
        return 2 * q, k, v, None

    return Case(
        op="attention",
        name="self-attention",
        size=size,
        arguments=arguments,
        call=pw_kernels.attention,
        result=lambda out, _: out,
        sample=lambda out: out[rows],
        exact=_exact_attention(rows),
        implementations=tensors.implementations("attention"),
    )


def _sparse_attention(size: CaseSize, tensors: CaseTensors) -> Case:
    """Return self-attention that keeps a quarter of the blocks, all that comes before included."""
    tokens, rows = tokens_of(size), rows_of(tokens_of(size), tensors.device)

    def arguments() -> Arguments:
        shape = (tokens, HEADS, DIM // HEADS)
        q, k, v = (tensors(*shape, dtype=BF16, seed=seed) for seed in range(3))
        return 2 * q, k, v, GRIDS[size], KEPT_SHARE

    def exact(arguments: Arguments) -> Tensor:
        q, k, v, grid, keep = arguments
        order = choose_orders(k, grid), torch.arange(HEADS, device=q.device)
        k_rows, v_rows = rows_with_means(k[order]), rows_with_means(v[order])
        kept = choose_blocks(q[order], k_rows, keep)
        blocks = kept.shape[1]
        heads = []
        for head in range(HEADS):
            place = order[0][:, head].argsort()[rows]  # [R], in the order of blocks
            is_kept = torch.zeros(len(rows), blocks, dtype=torch.bool, device=q.device)
            is_kept.scatter_(1, kept[head, place // BLOCK].long(), True)
            logits = q[rows, head].double() @ k_rows[:, head].double().T * q.shape[2] ** -0.5
            counted = torch.zeros_like(logits, dtype=torch.bool)
            counted[:, :tokens] = is_kept.repeat_interleave(BLOCK, 1)[:, :tokens]
            means = slice(blocks * BLOCK, blocks * BLOCK + blocks)
            counted[:, means] = ~is_kept
            logits[:, means] += math.log(BLOCK)
            logits.masked_fill_(~counted, -math.inf)
            heads.append(logits.softmax(-1) @ v_rows[:, head].double())
        return torch.stack(heads, dim=1)  # [R, N, K]

    return Case(
        op="sparse_attention",
        name=f"sparse self-attention, {KEPT_SHARE:.0%} kept",
        size=size,
        arguments=arguments,
        call=pw_kernels.sparse_attention,
        result=lambda out, _: out,
        sample=lambda out: out[rows],
        exact=exact,
        implementations=tensors.implementations("sparse_attention"),
    )


def _text_attention(size: CaseSize, tensors: CaseTensors) -> Case:
    """Return attention to the tokens of a prompt, whose last key stands for the padding."""
    tokens, rows = tokens_of(size), rows_of(tokens_of(size), tensors.device)

    def arguments() -> Arguments:
        heads = (HEADS, DIM // HEADS)
        q = tensors(tokens, *heads, dtype=BF16)
        k, v = (tensors(TEXT_KEYS, *heads, dtype=BF16, seed=seed) for seed in (1, 2))
        bias = torch.zeros(TEXT_KEYS, dtype=BF16, device=tensors.device)
        bias[-1] = 6.0625
        return q, k, v, bias

    return Case(
        op="attention",
        name="text attention",
        size=size,
        arguments=arguments,
        call=pw_kernels.attention,
        result=lambda out, _: out,
        sample=lambda out: out[rows],
        exact=_exact_attention(rows),
        implementations=tuple(
            name for name in tensors.implementations("attention") if name in ("reference", "triton")
        ),
    )


def _row_wise(
    op: str,
    size: CaseSize,
    tensors: CaseTensors,
    arguments: Callable[[], Arguments],
    exact: Callable[[Arguments, Tensor], Tensor],
    *,
    name: str | None = None,
    result: Callable[[Any, Arguments], Tensor] = lambda out, _: out,
) -> Case:
    """Return a case with independent rows; `exact` receives the rows to compute."""
    rows = rows_of(tokens_of(size), tensors.device)
    return Case(
        op=op,
        name=name or op,
        size=size,
        arguments=arguments,
        call=getattr(pw_kernels, op),
        result=result,
        sample=lambda out: out[rows],
        exact=lambda arguments: exact(arguments, rows),
        implementations=tensors.implementations(op),
    )


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def _norm_modulate(size: CaseSize, tensors: CaseTensors) -> Case:
    def arguments() -> Arguments:
        rows = tensors(1, 2, DIM, seed=1)
        return tensors(tokens_of(size), DIM), rows[:, 0], rows[:, 1], EPS, BF16

    def exact(arguments: Arguments, rows: Tensor) -> Tensor:
        x, shift, scale = (y.double() for y in (arguments[0][rows], *arguments[1:3]))
        return _normed(x) * (1 + scale) + shift

    return _row_wise("norm_modulate", size, tensors, arguments, exact)


def _gate_residual(size: CaseSize, tensors: CaseTensors) -> Case:
    def arguments() -> Arguments:
        shape = (tokens_of(size), DIM)
        return tensors(*shape), tensors(*shape, dtype=BF16, seed=1), tensors(1, DIM, seed=2)

    def exact(arguments: Arguments, rows: Tensor) -> Tensor:
        x, y, gate = arguments
        return x[rows].double() + y[rows].double() * gate.double()

    return _row_wise("gate_residual", size, tensors, arguments, exact)


def _gate_residual_norm(size: CaseSize, tensors: CaseTensors, *, modulated: bool) -> Case:
    """Return the case after text attention (modulated), or after self-attention (gated, affine)."""

    def arguments() -> Arguments:
        shape = (tokens_of(size), DIM)
        x, y = tensors(*shape), tensors(*shape, dtype=BF16, seed=1)
        gate, *rows = (tensors(1, DIM, seed=seed) for seed in (2, 3, 4))
        if not modulated:
            return x, y, gate, rows[0][0], rows[1][0], EPS, BF16
        return x, y, None, *rows, EPS, BF16

    def exact(arguments: Arguments, rows: Tensor) -> Tensor:
        x, y, gate, weight, bias = arguments[:5]
        y = y[rows].double() * (1 if gate is None else gate.double())
        normed = _normed(x[rows].double() + y)
        return normed * (weight.double() + (1 if modulated else 0)) + bias.double()

    def call(*arguments: Any) -> Tensor:
        return pw_kernels.gate_residual_norm(*arguments, modulated=modulated)

    case = _row_wise(
        "gate_residual_norm",
        size,
        tensors,
        arguments,
        exact,
        name=f"residual, {'modulated' if modulated else 'affine'} norm",
    )
    return replace(case, call=call)


def _qk_norm_rope(size: CaseSize, tensors: CaseTensors) -> Case:
    """Return the case in place on a packed projection."""

    def arguments() -> Arguments:
        packed = tensors(tokens_of(size), 3 * DIM, dtype=BF16)
        weights = [1 + tensors(DIM, dtype=BF16, seed=seed) / 4 for seed in (1, 2)]
        angle = tensors(ANGLES, DIM // HEADS // 2, seed=3)
        origin = torch.tensor([0, *GRIDS[size][1:]], device=tensors.device)
        return *packed.split(DIM, dim=1)[:2], *weights, angle.cos(), angle.sin(), origin, HEADS, EPS

    def exact(arguments: Arguments, rows: Tensor) -> Tensor:
        q, _, weight, _, cos, sin, origin = arguments[:7]
        x = q[rows].double()
        x = x / (x.square().mean(-1, True) + EPS).sqrt() * weight.double()
        cos, sin = (angles_of_tokens(x, origin, len(q))[rows].double() for x in (cos, sin))
        pairs = torch.view_as_complex(x.unflatten(-1, (HEADS, -1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)[:, None]).flatten(1)

    return _row_wise(
        "qk_norm_rope", size, tensors, arguments, exact, result=lambda _, arguments: arguments[0]
    )


def _guided_update(size: CaseSize, tensors: CaseTensors) -> Case:
    """Return the case of a second-order step with its corrector."""
    frames, rows, columns = GRIDS[size]
    corrector, predictor = Update(0.4, 0.6, 0.6, 0.3, 0.2, -0.7), Update(0.5, 0.5, 0.5, 0, 0.5, -1)

    def arguments() -> Arguments:
        latents = (tensors(48, frames, 2 * rows, 2 * columns, seed=seed) for seed in range(6))
        return *latents, 5.0, 0.8, corrector, predictor

    def exact(arguments: Arguments, rows: Tensor) -> Tensor:
        last_rows = [x[:, :, -1:].double() for x in arguments[:6]]
        return step_reference(*last_rows, *arguments[6:])[0]

    case = _row_wise("guided_update", size, tensors, arguments, exact, result=lambda out, _: out[0])
    return replace(case, sample=lambda out: out[:, :, -1:])
