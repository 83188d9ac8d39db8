# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over all keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pw_kernels.attention.libraries import LIBRARIES
from pw_kernels.attention.variants import run, tiling_for
from pw_kernels.launcher import capability
from pw_kernels.op import Cost, Op, register, require, select

HEAD_WIDTHS = (64, 128)  # of the Triton kernels
_NAME = "attention"
_ALTERNATIVE = "pw_kernels.attention.reference takes others"


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute softmax(q kT / sqrt(K) + bias) v.

    A bias of ln n lets one key stand for n identical ones: the softmax over zero-padded text is
    then exact without attending to every pad row.

    Third-party kernels (cudnn, flash, flash-attn, flash-attn-4) take no bias: with one, as in the
    short attention to the text, the reference runs in their place.

    Args:
        q: [S, N, K] queries.
        k: [E, N, K] keys.
        v: [E, N, K] values.
        bias: [E] in q's dtype, added to the logits of each key after the 1/sqrt(K) scale.

    Returns:
        [S, N, K] in q's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, or no token; input that a Triton
            kernel does not take, where one was requested.
    """
    implementation = select(_NAME, q.device)
    if implementation in ("triton", "gluon"):
        return torch.ops.pw.attention(q, k, v, bias, implementation == "gluon")[0]
    _check(q, k, v, bias)
    if implementation in LIBRARIES and bias is None:
        return LIBRARIES[implementation](q, k, v)
    return reference(q, k, v, bias)


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `attention` and the log-sum-exp of its logits, ln(sum(exp(logits))).

    `merge_attention` needs the log-sum-exp to join results over disjoint sets of keys. Third-party
    kernels do not return it: the reference runs in their place.

    Returns:
        [S, N, K] in q's dtype, and [S, N] fp32.

    Raises:
        ValueError: as `attention`.
    """
    implementation = select(_NAME, q.device)
    if implementation in ("triton", "gluon"):
        return torch.ops.pw.attention(q, k, v, bias, implementation == "gluon")
    _check(q, k, v, bias)
    return reference_with_lse(q, k, v, bias)


def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Oracle of `attention`, for every head width and dtype."""
    mask = None if bias is None else bias.expand(1, 1, q.shape[0], -1)
    heads_q, heads_k, heads_v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, N, S|E, K]
    out = F.scaled_dot_product_attention(heads_q, heads_k, heads_v, attn_mask=mask)
    return out[0].transpose(0, 1)


def reference_with_lse(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Oracle of `attention_with_lse`."""
    logits = torch.einsum("snk,enk->sne", q.float(), k.float()) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias.float()
    return reference(q, k, v, bias), logits.logsumexp(-1)


def cost(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Cost:
    """Count two products of 2 S E K FLOPs per head, one read of q, k, v and one write."""
    moved = (2 * q.numel() + k.numel() + v.numel()) * q.element_size()
    return Cost(flops=4 * q.numel() * k.shape[0], bytes=moved)


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    require(q.dim() == 3, _NAME, "q [S, N, K]", tuple(q.shape))
    require(k.dim() == 3, _NAME, "k [E, N, K]", tuple(k.shape))
    require(k.shape == v.shape, _NAME, f"v of k's shape {tuple(k.shape)}", tuple(v.shape))
    heads = q.shape[1:]
    require(k.shape[1:] == heads, _NAME, f"keys [E, {heads[0]}, {heads[1]}]", tuple(k.shape))
    require(q.shape[0] > 0, _NAME, "at least one query", tuple(q.shape))
    require(k.shape[0] > 0, _NAME, "at least one key", tuple(k.shape))
    others = [k, v]
    if bias is not None:
        require(bias.shape == k.shape[:1], _NAME, f"a bias [{k.shape[0]}]", tuple(bias.shape))
        others.append(bias)
    for x in others:
        require(x.dtype == q.dtype, _NAME, f"all tensors of one dtype, {q.dtype}", x.dtype)
        require(x.device == q.device, _NAME, f"all tensors on {q.device}", x.device)


def check_for_triton(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError for input that the Triton kernels do not take."""
    _check(q, k, v, bias)
    width = q.shape[2]
    require(width in HEAD_WIDTHS, _NAME, f"head width 64 or 128 ({_ALTERNATIVE})", width)
    half = q.dtype in (torch.bfloat16, torch.float16)
    require(half, _NAME, f"bf16 or fp16 ({_ALTERNATIVE})", q.dtype)
    if bias is not None:
        require(bias.is_contiguous(), _NAME, "a contiguous bias", bias.stride())
    for x in (q, k, v):
        packed = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == width)
        require(packed, _NAME, "the heads of a token adjacent (call .contiguous())", x.stride())
        # TMA needs rows at multiples of 16 bytes, and the portable kernel spills registers where
        # the stride is no multiple of 16. Offsets within a tile, up to 128 rows, have 32 bits.
        step = x.stride(0) if x.shape[0] > 1 else 0
        aligned = step % 16 == 0 and x.storage_offset() % 8 == 0
        require(aligned, _NAME, "tokens at multiples of 16 elements (call .contiguous())", step)
        require(0 <= step < 2**24, _NAME, "a token stride of 0 to 2^24 (call .contiguous())", step)


@torch.library.custom_op("pw::attention", mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, gluon: bool) -> tuple[Tensor, Tensor]:
    out, lse = reference_with_lse(q, k, v, bias)
    return out.contiguous(), lse


@_op.register_kernel("cuda")
def run_kernel(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, gluon: bool
) -> tuple[Tensor, Tensor]:
    """Check the input and launch the kernel. Raises ValueError for what it does not take."""
    check_for_triton(q, k, v, bias)
    tiling = tiling_for(capability(q.device), q.shape[2], bias=bias is not None, gluon=gluon)
    return run(tiling, q, k, v, bias)


@_op.register_fake
def _fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, gluon: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


OP = register(
    Op(
        _NAME,
        reference,
        cost,
        run_kernel,
        libraries=("gluon", "cudnn", "flash", "flash-attn", "flash-attn-4"),
    )
)
