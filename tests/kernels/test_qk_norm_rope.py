# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of qk_norm_rope, interpreted, against PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pw_kernels.qk_norm_rope import (
    angles_of_tokens,
    axis_pairs,
    reference,
    rms_norm,
    rope,
    run_kernel,
)
from tests.kernels.accuracy import assert_as_accurate, assert_same_roundings, normal

EPS = 1e-6


def oracle(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """From angles by token."""
    x = x.double()
    normed = x / (x.square().mean(-1, True) + EPS).sqrt() * gain.double()
    turned = torch.view_as_complex(normed.unflatten(-1, (heads, -1, 2)))
    turned = turned * torch.complex(cos.double(), sin.double())[:, None]
    return torch.view_as_real(turned).flatten(1)


def origin(first: int, grid: tuple[int, int, int]) -> Tensor:
    return torch.tensor([first, *grid[1:]])


def tables(length: int, pairs: int) -> tuple[Tensor, Tensor]:
    angle = 10 * normal(length, pairs, seed=5)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "first", "grid", "heads", "dim"),
    [
        # all but the first and the last cross from one frame into the next
        (1, 0, (1, 1, 1), 3, 192),
        (11, 0, (7, 3, 3), 6, 192),
        (19, 25, (4, 4, 8), 3, 48),
        (16, 56, (2, 8, 8), 1, 64),
        (17, 70, (5, 7, 11), 3, 192),
        (20, 30, (5, 4, 11), 4, 96),
        (2, 3, (2, 3, 5), 24, 3072),
    ],
)
def test_kernel(
    tokens: int,
    first: int,
    grid: tuple[int, int, int],
    heads: int,
    dim: int,
    dtype: torch.dtype,
) -> None:
    q, k = 3 * normal(tokens, dim, dtype=dtype), normal(tokens, dim, dtype=dtype, seed=1)
    gains = [1 + normal(dim, dtype=dtype, seed=seed) / 4 for seed in (2, 3)]
    cos, sin = tables(max(grid), dim // heads // 2)
    ours, theirs = ([q.clone(), k.clone()] for _ in range(2))
    run_kernel(*ours, *gains, cos, sin, origin(first, grid), heads, EPS)
    reference(*theirs, *gains, cos, sin, origin(first, grid), heads, EPS)
    by_token = [angles_of_tokens(table, origin(first, grid), tokens) for table in (cos, sin)]
    for x, gain, got, expected in zip((q, k), gains, ours, theirs, strict=True):
        assert_as_accurate(got, expected, oracle(x, gain, *by_token, heads))
        if dtype == torch.bfloat16:
            assert_same_roundings(got, expected)


@pytest.mark.parametrize("run", [run_kernel, reference])
def test_rows_of_a_packed_projection(run) -> None:
    """In place, and the values beside them stay as they are."""
    packed, (cos, sin) = normal(10, 3 * 64, dtype=torch.bfloat16), tables(5, 16)
    gain = torch.ones(64, dtype=torch.bfloat16)
    q, k, v = (x.contiguous() for x in packed.split(64, dim=1))
    run(*packed.split(64, dim=1)[:2], gain, gain, cos, sin, origin(0, (1, 2, 5)), 2, EPS)
    run(q, k, gain, gain, cos, sin, origin(0, (1, 2, 5)), 2, EPS)
    assert torch.equal(packed, torch.cat((q, k, v), dim=1))


@pytest.mark.parametrize("run", [run_kernel, reference])
def test_tokens_in_parts(run) -> None:
    grid, gain, (cos, sin) = (3, 4, 5), normal(48, seed=2), tables(5, 8)
    q, k = normal(60, 48), normal(60, 48, seed=1)
    parts = [x.clone().split([7, 33, 20]) for x in (q, k)]
    run(q, k, gain, gain, cos, sin, origin(0, grid), 3, EPS)
    for first, part_q, part_k in zip((0, 7, 40), *parts, strict=True):
        run(part_q, part_k, gain, gain, cos, sin, origin(first, grid), 3, EPS)
    assert torch.equal(torch.cat(parts[0]), q)
    assert torch.equal(torch.cat(parts[1]), k)


def test_reference_is_rms_norm_then_rope() -> None:
    q, k, gain = normal(4, 64), normal(4, 64, seed=1), normal(64, seed=2)
    cos, sin = tables(4, 16)
    expected = rms_norm(k, 2 * gain, EPS).unflatten(-1, (2, 32))
    # four frames of one token: rows and columns stay at their first position
    angles = [torch.cat((table[:, :6], table[:1, 6:].expand(4, -1)), dim=1) for table in (cos, sin)]
    reference(q, k, gain, 2 * gain, cos, sin, origin(0, (4, 1, 1)), 2, EPS)
    assert torch.equal(k, rope(expected, *angles).flatten(1))


@pytest.mark.parametrize("grid", [(2, 3, 5), (31, 8, 14), (1, 1, 4)])
def test_a_token_turns_by_its_frame_row_and_column(grid: tuple[int, int, int]) -> None:
    assert axis_pairs(64) == (22, 21, 21)
    position = torch.arange(max(grid), dtype=torch.float32)[:, None]
    tokens = grid[0] * grid[1] * grid[2]
    by_token = angles_of_tokens(position.expand(-1, 64), origin(0, grid), tokens)
    places = torch.cartesian_prod(*(torch.arange(float(side)) for side in grid))
    assert torch.equal(by_token, places.repeat_interleave(torch.tensor(axis_pairs(64)), dim=1))
