# SPDX-License-Identifier: Apache-2.0
"""Attention: both Triton kernels, in the interpreter, against fp64; the operator; bad input."""

from __future__ import annotations

import math
import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

from pw_kernels.attention import (
    OP,
    attention,
    attention_with_lse,
    check_for_triton,
    reference,
    reference_with_lse,
)
from pw_kernels.attention.variants import HOPPER, LARGE, SMALL, Tiling, run
from pw_kernels.dispatch_anywhere import dispatch_anywhere
from pw_kernels.op import using
from tests.closeness import max_abs
from tests.kernels.accuracy import assert_as_accurate, normal
from tests.tolerance import ulp

HEADS = 2
SIZES = (1, 63, 64, 127, 128, 129, 200)
NAMES = ["64-portable", "64-hopper", "128-portable", "128-portable-small", "128-hopper"]
TILINGS = [
    (64, LARGE[64]),
    (64, HOPPER[64]),
    (128, LARGE[128]),
    (128, SMALL[128]),
    (128, HOPPER[128]),
]
RAGGED = [(129, size) for size in SIZES] + [(size, 63) for size in SIZES]
each_tiling = pytest.mark.parametrize(("width", "tiling"), TILINGS, ids=NAMES)
each_kernel = pytest.mark.parametrize("tiling", [LARGE[64], HOPPER[64]], ids=NAMES[:2])
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def inputs(queries: int, keys: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as views of wider rows, NaN before, between and behind them."""
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    views = []
    for tokens in (queries, keys, keys):
        rows = torch.full((tokens + 130, 3 * HEADS * width), math.nan, dtype=dtype)
        view = rows[1 : tokens + 1, HEADS * width : 2 * HEADS * width].unflatten(1, (HEADS, width))
        view.copy_(torch.randn(view.shape, generator=generator))
        views.append(view)
    return views


def check_kernel(
    tiling: Tiling, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None
) -> None:
    """Check the result to be as accurate as SDPA, and the log-sum-exp to fp32 precision."""
    oracle = reference(q.double(), k.double(), v.double(), None if bias is None else bias.double())
    expected, expected_lse = reference_with_lse(q, k, v, bias)
    out, lse = run(tiling, q, k, v, bias)
    assert out.is_contiguous()
    assert_as_accurate(out, expected, oracle)
    assert lse.dtype == torch.float32
    assert max_abs(lse, expected_lse) <= 4e-6 * max(1.0, expected_lse.abs().max().item())


@each_tiling
@each_dtype
def test_ragged_lengths(width: int, tiling: Tiling, dtype: torch.dtype) -> None:
    # the masks do not depend on the dtype
    for queries, keys in RAGGED if dtype == torch.bfloat16 else RAGGED[::4]:
        check_kernel(tiling, *inputs(queries, keys, width, dtype))


@pytest.mark.parametrize(("width", "tiling"), [(w, t[w]) for t in (LARGE, SMALL) for w in t])
@pytest.mark.parametrize("keys", [4, 64, 66, 129, 130])
def test_bias(width: int, tiling: Tiling, keys: int) -> None:
    q, k, v = inputs(70, keys, width, torch.bfloat16)
    bias = 3 * normal(keys, dtype=torch.bfloat16)
    bias[keys // 2 :: 3] = -math.inf  # keys that are not there
    check_kernel(tiling, q, k, v, bias)


def test_one_biased_key_stands_for_many() -> None:
    tiling = LARGE[64]
    q, k, v = inputs(40, 60, 64, torch.float16)
    many = [torch.cat([x, x[-1:].expand(449, -1, -1)]) for x in (k, v)]
    bias = torch.zeros(60)
    bias[-1] = math.log(450)  # fp32: the kernel takes any, the reference that of q
    out, lse = run(tiling, q, k, v, bias)
    expected, expected_lse = reference_with_lse(q.double(), *(x.double() for x in many))
    assert max_abs(out, expected) <= ulp(expected, torch.float16)
    assert max_abs(lse, expected_lse) < 1e-5


@each_kernel
@pytest.mark.parametrize("keys", [63, 129])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(tiling: Tiling, keys: int, sign: int) -> None:
    """Logits near 1000 or -1000: beside these, a key past the end with logit 0 would be all."""
    q, k, v = inputs(33, keys, 64, torch.bfloat16)
    q = q * 0.25 + 11
    k = sign * (k * 0.25 + 11)
    check_kernel(tiling, q, k, v)


@each_kernel
def test_one_head_of_one_token(tiling: Tiling) -> None:
    """Such tensors may have any stride in PyTorch."""
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).half()
    x = x.as_strided((1, 1, 64), (7, 3, 1))
    check_for_triton(x, x, x, None)
    out, _ = run(tiling, x, x, x)
    assert torch.equal(out, x)


@each_kernel
def test_offsets_past_32_bits(tiling: Tiling) -> None:
    """Tokens as far apart as allowed, so that the third tile of 128 starts past 2^31 elements."""
    tokens, stride, width = 260, 2**24 - 16, 64
    assert 256 * stride > 2**31
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # 8.7 GB of which 3 MB are touched
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    with mmap.mmap(-1, 2 * tokens * stride, flags=flags) as memory:
        rows = torch.frombuffer(memory, dtype=torch.bfloat16).view(tokens, stride)
        views = [rows[:, i * width : (i + 1) * width].unflatten(1, (1, width)) for i in range(3)]
        generator = torch.Generator().manual_seed(0)
        for view in views:
            view.copy_(torch.randn(view.shape, generator=generator))
        check_for_triton(*views, None)
        out, _ = run(tiling, *views)
        expected, _ = run(tiling, *(view.contiguous() for view in views))
        del rows, views, view
    assert torch.equal(out, expected)


def test_4k_self_attention_on_meta() -> None:
    """The packed projections of a 4K clip need 64-bit offsets, and are within what is checked."""
    tokens, heads, width = 249_240, 24, 128
    packed = torch.empty(tokens, 3, heads, width, dtype=torch.bfloat16, device="meta")
    assert packed.numel() > 2**31
    q, k, v = packed.unbind(1)
    check_for_triton(q, k, v, None)
    out, lse = torch.ops.pw.attention(q, k, v, None, False)
    assert out.shape == (tokens, heads, width)
    assert out.is_contiguous()
    assert lse.shape == (tokens, heads)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("tokens", "tflop"), [(111_600, 153.04), (249_240, 763.33)])
def test_cost_of_self_attention(tokens: int, tflop: float) -> None:
    """4 S^2 D: 4 * 111600^2 * 3072 = 1.5304e14 and 4 * 249240^2 * 3072 = 7.6333e14."""
    x = torch.empty(tokens, 24, 128, dtype=torch.bfloat16, device="meta")
    cost = OP.cost(x, x, x)
    assert cost.flops == 4 * tokens**2 * 3072
    assert cost.flops / 1e12 == pytest.approx(tflop, abs=0.01)
    assert cost.bytes == 4 * tokens * 3072 * 2


def test_operator() -> None:
    q, k, v = (x.contiguous() for x in inputs(9, 12, 64, torch.bfloat16))
    bias = normal(12, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.pw.attention.default, (q, k, v, bias, False))
    torch.library.opcheck(torch.ops.pw.attention.default, (q, k, v, None, False))


def test_reference_lse() -> None:
    q, k, v = inputs(9, 12, 128, torch.float16)
    bias = normal(12, dtype=torch.float16)
    out, lse = attention_with_lse(q, k, v, bias)
    assert torch.equal(out, attention(q, k, v, bias))
    assert torch.equal(out, reference(q, k, v, bias))
    logits = torch.einsum("snk,enk->nse", q.double(), k.double()) / math.sqrt(128)
    logits += bias
    assert max_abs(lse.T, logits.exp().sum(-1).log()) < 1e-5


GOOD = torch.zeros(5, 2, 64, dtype=torch.bfloat16)
BAD: list[tuple[str, tuple[Any, ...], str]] = [
    ("two dimensions", (GOOD[0], GOOD, GOOD), r"q \[S, N, K\], got \(2, 64\)"),
    ("keys of other heads", (GOOD, GOOD[:, :1], GOOD[:, :1]), r"keys \[E, 2, 64\]"),
    ("values of other length", (GOOD, GOOD, GOOD[:4]), r"v of k's shape \(5, 2, 64\), got \(4, "),
    ("no query", (GOOD[:0], GOOD, GOOD), "at least one query"),
    ("no key", (GOOD, GOOD[:0], GOOD[:0]), "at least one key"),
    ("mixed dtypes", (GOOD, GOOD, GOOD.half()), "of one dtype, torch.bfloat16, got torch.float16"),
    ("mixed devices", (GOOD, GOOD.to("meta"), GOOD), "all tensors on cpu, got meta"),
    ("more biases than keys", (GOOD, GOOD, GOOD, GOOD[0, 0]), r"a bias \[5\], got \(64,\)"),
    (
        "bias of another dtype",
        (GOOD, GOOD, GOOD, torch.zeros(5)),
        "of one dtype.*got torch.float32",
    ),
]
FAR = torch.empty(2, 2**24, dtype=torch.bfloat16, device="meta")[:, :128].unflatten(1, (2, 64))
WIDE = torch.zeros(5, 1, 1024, dtype=torch.bfloat16)
BAD_FOR_TRITON: list[tuple[str, tuple[Any, ...], str]] = [
    ("head width", (WIDE, WIDE, WIDE, None), "64 or 128 .pw_kernels.attention.reference.*got 1024"),
    ("fp32", (GOOD.float(),) * 3 + (None,), "bf16 or fp16 .*got torch.float32"),
    ("strided bias", (GOOD, GOOD, GOOD, GOOD[:, 0, 0]), "a contiguous bias, got"),
    ("head-major", (GOOD.transpose(0, 1).contiguous().transpose(0, 1),) * 3 + (None,), "adjacent"),
    ("odd rows", (GOOD.new_zeros(5, 129)[:, :128].unflatten(1, (2, 64)),) * 3 + (None,), "got 129"),
    ("far tokens", (FAR, FAR, FAR, None), "token stride of 0 to 2.24.*got 16777216"),
]


@pytest.mark.parametrize(("args", "match"), [case[1:] for case in BAD], ids=[c[0] for c in BAD])
def test_bad_input(args: tuple[Any, ...], match: str) -> None:
    with pytest.raises(ValueError, match=f"pw::attention expects .*{match}"):
        attention(*args)


@pytest.mark.parametrize(
    ("args", "match"), [case[1:] for case in BAD_FOR_TRITON], ids=[c[0] for c in BAD_FOR_TRITON]
)
def test_input_only_the_reference_takes(args: tuple[Any, ...], match: str) -> None:
    with (
        using("triton"),
        dispatch_anywhere(),
        pytest.raises(ValueError, match=f"pw::attention expects .*{match}"),
    ):
        attention(*args)


def test_a_requested_kernel_gives_the_result_and_its_log_sum_exp() -> None:
    q, k, v = (x.contiguous() for x in inputs(9, 12, 64, torch.bfloat16))
    expected, expected_lse = run(LARGE[64], q, k, v)
    with using("triton"), dispatch_anywhere():
        assert torch.equal(attention(q, k, v), expected)
        out, lse = attention_with_lse(q, k, v)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


def test_triton_on_cpu_is_refused() -> None:
    with using("triton"), pytest.raises(ValueError, match="CUDA device, got cpu"):
        attention(GOOD, GOOD, GOOD)
