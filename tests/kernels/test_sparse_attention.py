# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention: its definition, its kernels in the interpreter, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pw_kernels import sparse_attention
from pw_kernels.attention import reference as dense
from pw_kernels.attention.sparse import (
    LEAST_KEPT,
    OP,
    TILES,
    attend,
    choose_blocks,
    choose_orders,
    kept_of,
    orders_of,
    rows_with_means,
    run_kernel,
)
from pw_kernels.attention.sparse_variants import (
    BLOCK,
    HOPPER,
    LARGE,
    SMALL,
    Tiling,
    run,
    stand_ins,
)
from pw_kernels.dispatch_anywhere import dispatch_anywhere
from pw_kernels.launcher import recording
from pw_kernels.op import using
from tests.closeness import max_abs, relative_l2
from tests.kernels.accuracy import assert_as_accurate, normal

HEADS = 2
NAMES = ["64-portable", "64-hopper", "128-portable", "128-portable-small", "128-hopper"]
TILINGS = [
    (64, LARGE[64]),
    (64, HOPPER[64]),
    (128, LARGE[128]),
    (128, SMALL[128]),
    (128, HOPPER[128]),
]
each_tiling = pytest.mark.parametrize(("width", "tiling"), TILINGS, ids=NAMES)


def inputs(tokens: int, width: int = 64, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v whose logits have a standard deviation of 2."""
    q, k, v = (normal(tokens, HEADS, width, seed=seed) for seed in range(3))
    return [(2 * q).to(dtype), k.to(dtype), v.to(dtype)]


def prepared(q: Tensor, k: Tensor, v: Tensor, keep: float) -> tuple[Tensor, ...]:
    """Arguments of the operator, for tokens in the order of their blocks."""
    k_rows, v_rows = rows_with_means(k), rows_with_means(v)
    return q, k_rows, v_rows, choose_blocks(q, k_rows, keep)


def by_definition(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """Attention with one logit for every kept key and every mean, one head and block at a time."""
    out = torch.empty_like(q)
    parts = list(range(0, len(q), BLOCK))
    for head in range(q.shape[1]):
        for block, first in enumerate(parts):
            keys, values, biases = [], [], []
            for number, start in enumerate(parts):
                rows = slice(start, start + BLOCK)
                part_k, part_v = k[rows, head], v[rows, head]
                if number in kept[head, block]:
                    keys.append(part_k)
                    values.append(part_v)
                    biases += [0.0] * len(part_k)
                else:
                    keys.append(part_k.mean(0, keepdim=True))
                    values.append(part_v.mean(0, keepdim=True))
                    biases.append(math.log(len(part_k)))
            rows = slice(first, first + BLOCK)
            logits = q[rows, head] @ torch.cat(keys).T * q.shape[2] ** -0.5
            weights = (logits + torch.tensor(biases, dtype=q.dtype)).softmax(-1)
            out[rows, head] = weights @ torch.cat(values)
    return out


@pytest.mark.parametrize("tokens", [1, 130, 9 * BLOCK, 9 * BLOCK + 5])
@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
def test_reference_is_the_definition(tokens: int, keep: float) -> None:
    q, k, v = inputs(tokens)
    arguments = prepared(q, k, v, keep)
    expected = by_definition(q, k, v, arguments[3])
    assert max_abs(attend(*arguments), expected) < 1e-12


def test_keeping_all_blocks_is_exact() -> None:
    grid = (3, 17, 21)
    q, k, v = inputs(math.prod(grid))
    assert max_abs(sparse_attention(q, k, v, grid, 1.0), dense(q, k, v)) < 1e-12
    # few tokens: nothing is dropped
    q, k, v = inputs(LEAST_KEPT * BLOCK)
    assert max_abs(sparse_attention(q, k, v, (1, 16, 32), 0.01), dense(q, k, v)) < 1e-12


def test_blocks_of_equal_keys_lose_nothing() -> None:
    """A mean with a bias of ln 128 stands for 128 equal keys exactly, whatever their values."""
    grid = (2, 32, 64)
    q, k, v = inputs(math.prod(grid))
    lines, tiles = orders_of(grid, q.device)
    for head, order in enumerate((lines, tiles)):  # one head in each order
        blocks = k[order, head].unflatten(0, (-1, BLOCK))
        k[order, head] = blocks[:, :1].expand(-1, BLOCK, -1).flatten(0, 1)
    got = sparse_attention(q, k, v, grid, 0.1)
    assert kept_of(len(q), 0.1) == LEAST_KEPT
    assert max_abs(got, dense(q, k, v)) < 1e-12


def test_orders_are_permutations_by_tiles() -> None:
    grid = (3, 20, 40)
    lines, tiles = orders_of(grid, torch.device("cpu"))
    assert torch.equal(lines, torch.arange(math.prod(grid)))
    assert torch.equal(tiles.sort().values, lines)
    frames, rows, columns = torch.unravel_index(tiles[:BLOCK], grid)
    assert (frames.max() + 1, rows.max() + 1, columns.max() + 1) == TILES[1]


def test_a_head_has_the_order_in_which_its_keys_vary_least_within_blocks() -> None:
    grid = (2, 32, 64)
    lines, tiles = orders_of(grid, torch.device("cpu"))
    alike = normal(32, 64).repeat_interleave(BLOCK, 0) + 0.3 * normal(32 * BLOCK, 64, seed=1)
    k = torch.empty(32 * BLOCK, 2, 64)
    k[lines, 0] = alike
    k[tiles, 1] = alike
    assert torch.equal(choose_orders(k, grid), torch.stack((lines, tiles), dim=1))


def test_chosen_blocks_include_the_own_one_and_the_last() -> None:
    tokens = 20 * BLOCK + 3
    q, k, v = inputs(tokens, dtype=torch.float32)
    kept = prepared(q, k, v, 0.25)[3]
    assert kept.shape == (HEADS, 21, 6)
    assert (kept.diff(dim=-1) > 0).all()
    assert (kept[..., -1] == 20).all()
    assert (kept == torch.arange(21)[:, None]).any(-1).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_numbers_neither_drop_all_nor_stay_hidden(bad: float) -> None:
    """What is not finite in a key reaches every result, as in exact attention."""
    q, k, v = inputs(20 * BLOCK, dtype=torch.float32)
    k[5 * BLOCK + 1] = bad
    arguments = prepared(q, k, v, 0.25)
    kept = arguments[3]
    assert (kept[..., -1] == 19).all()
    assert (kept == torch.arange(20)[:, None]).any(-1).all()
    assert dense(q, k, v).isnan().all()
    assert attend(*arguments).isnan().all()


@each_tiling
@pytest.mark.parametrize(("tokens", "keep"), [(1, 0.5), (9 * BLOCK, 0.5), (9 * BLOCK + 70, 0.1)])
def test_kernels(width: int, tiling: Tiling, tokens: int, keep: float) -> None:
    q, k, v = inputs(tokens, width, torch.bfloat16)
    arguments = prepared(q, k, v, keep)
    wide = [x.double() for x in arguments[:3]]
    oracle = attend(*wide, arguments[3])
    got = run(tiling, *arguments)
    assert got.is_contiguous()
    assert_as_accurate(got, attend(*arguments), oracle)


@pytest.mark.slow
@pytest.mark.parametrize("tiling", [LARGE[64], HOPPER[64]], ids=NAMES[:2])
def test_kernels_with_more_means_than_a_block(tiling: Tiling) -> None:
    """130 blocks have two blocks of means, the second of which is nearly empty."""
    tokens = 129 * BLOCK + 1
    q, k, v = (x[:, :1] for x in inputs(tokens, 64, torch.float16))
    arguments = prepared(q.contiguous(), k, v, 0.03)
    kept = arguments[3]
    oracle = attend(*(x.double() for x in arguments[:3]), kept)
    assert_as_accurate(run(tiling, *arguments), attend(*arguments), oracle)


def test_stand_ins_are_the_blocks_not_kept() -> None:
    blocks = 130
    kept = torch.tensor([0, 63, 64, 100, 127, 128, 129], dtype=torch.int32).expand(1, blocks, -1)
    words = stand_ins(kept)
    assert words.shape == (1, blocks, 4)
    bits = [bool(int(words[0, 7, j // 64]) >> j % 64 & 1) for j in range(256)]
    assert bits == [j < blocks and j not in kept[0, 0] for j in range(256)]


def test_operator() -> None:
    arguments = prepared(*inputs(5 * BLOCK + 1, dtype=torch.bfloat16), 0.1)
    torch.library.opcheck(torch.ops.pw.sparse_attention.default, arguments)


def test_a_requested_kernel_gives_the_result() -> None:
    grid = (1, 26, 26)
    q, k, v = inputs(math.prod(grid), 64, torch.float16)
    order = choose_orders(k, grid), torch.arange(HEADS)
    expected = torch.empty_like(q)
    expected[order] = run(LARGE[64], *prepared(q[order], k[order], v[order], 0.5))
    with using("triton"), dispatch_anywhere():
        assert torch.equal(sparse_attention(q, k, v, grid, 0.5), expected)
    assert relative_l2(sparse_attention(q, k, v, grid, 0.5), expected) < 1e-3


def test_4k_self_attention_on_meta() -> None:
    """Eight heads of a 4K clip; the cost is that of a quarter of the blocks and of all means."""
    grid = (31, 67, 120)
    q = torch.empty(math.prod(grid), 3, 8, 128, dtype=torch.bfloat16, device="meta")
    with recording((9, 0)) as variants, using("triton"), dispatch_anywhere():
        out = sparse_attention(*q.unbind(1), grid, 0.25)
    assert [variant.kernel for variant in variants.values()] == ["sparse_attention_hopper"]
    assert out.shape == (249_240, 8, 128)
    cost = OP.cost(*q.unbind(1), grid, 0.25)
    assert cost.flops == 4 * 249_240 * 8 * 128 * (487 * 128 + 1948)


GOOD = torch.zeros(6, 2, 64, dtype=torch.bfloat16)
GRID = (1, 2, 3)
BAD: list[tuple[str, tuple[Any, ...], str]] = [
    ("two dimensions", (GOOD[0], GOOD, GOOD, GRID, 0.5), r"q \[S, N, K\], got \(2, 64\)"),
    ("no token", (GOOD[:0], GOOD[:0], GOOD[:0], (0, 2, 3), 0.5), "at least one token"),
    ("another grid", (GOOD, GOOD, GOOD, (1, 2, 4), 0.5), r"a grid of 6 tokens, got \(1, 2, 4\)"),
    ("fewer keys", (GOOD, GOOD[:5], GOOD, GRID, 0.5), r"of q's shape \(6, 2, 64\), got \(5"),
    ("mixed dtypes", (GOOD, GOOD, GOOD.half(), GRID, 0.5), "torch.bfloat16, got torch.float16"),
    ("mixed devices", (GOOD, GOOD, GOOD.to("meta"), GRID, 0.5), "tensors on cpu, got meta"),
    ("keep nothing", (GOOD, GOOD, GOOD, GRID, 0.0), "above 0 and at most 1, got 0.0"),
    ("keep too much", (GOOD, GOOD, GOOD, GRID, 1.5), "above 0 and at most 1, got 1.5"),
    ("keep NaN", (GOOD, GOOD, GOOD, GRID, math.nan), "above 0 and at most 1, got nan"),
]


@pytest.mark.parametrize(("args", "match"), [case[1:] for case in BAD], ids=[c[0] for c in BAD])
def test_bad_input(args: tuple[Any, ...], match: str) -> None:
    with pytest.raises(ValueError, match=f"pw::sparse_attention expects .*{match}"):
        sparse_attention(*args)


def test_input_only_the_reference_takes() -> None:
    q, k_rows, v_rows, kept = prepared(*inputs(2 * BLOCK, dtype=torch.bfloat16), 0.5)
    cases: list[tuple[tuple[Tensor, ...], str]] = [
        ((q.float(), k_rows, v_rows, kept), "bf16 or fp16, got torch.float32"),
        ((q[..., :32], k_rows, v_rows, kept), "head width 64 or 128, got 32"),
        ((q, k_rows[:-1], v_rows, kept), r"keys and values \(384, 2, 64\), got \(383"),
        ((q, k_rows, v_rows, kept[:, :1]), r"lists of blocks \[2, 2, n\], got \(2, 1, 2\)"),
        ((q, k_rows, v_rows, kept.long()), "int32 lists, got torch.int64"),
        ((q, k_rows, v_rows, kept.transpose(1, 2)), "contiguous tensors"),
    ]
    for arguments, match in cases:
        with pytest.raises(ValueError, match=f"pw::sparse_attention expects .*{match}"):
            run_kernel(*arguments)
