# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over all keys."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from pw_kernels.attention.libraries import LIBRARIES
from pw_kernels.attention.variants import run, variant_for
from pw_kernels.launcher import capability
from pw_kernels.op import Cost, Op, chosen, register, require

HEAD_WIDTHS = (64, 128)  # of the Triton kernels
_NAME = "attention"
_ELSE = "pw_kernels.attention.reference takes others"


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q kT / sqrt(K) + bias) v.

    A bias lets one key stand for n identical ones (ln n): the softmax of the zero-padded text is
    then exact without attending to every pad row.

    Other people's kernels (cudnn, flash, flash-attn) know neither a bias nor the log-sum-exp: what
    asks for those, the short attention to the text, runs the reference beside them.

    Args:
        q: [S, N, K] queries.
        k: [E, N, K] keys.
        v: [E, N, K] values.
        bias: [E] in q's dtype, added to the logits of each key after the 1/sqrt(K) scale.
        return_lse: give ln(sum(exp(logits))) too, by which `merge_attention` joins results over
            parts of the keys.

    Returns:
        [S, N, K] in q's dtype; with `return_lse` also [S, N] fp32.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together, no token; and where a
            Triton kernel was asked for, what it does not take.
    """
    _check(q, k, v, bias)
    implementation = chosen(_NAME, q.device).implementation
    if implementation in LIBRARIES and bias is None and not return_lse:
        return LIBRARIES[implementation](q, k, v)
    if implementation in ("triton", "gluon"):
        _check_for_triton(q, k, v, bias)
        out, lse = torch.ops.pw.attention(q, k, v, bias, implementation == "gluon")
        return (out, lse) if return_lse else out
    return reference(q, k, v, bias, return_lse=return_lse)


@overload
def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The oracle of `attention`, for every head width and dtype."""
    mask = None if bias is None else bias.expand(1, 1, q.shape[0], -1)
    heads_q, heads_k, heads_v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, N, S|E, K]
    out = F.scaled_dot_product_attention(heads_q, heads_k, heads_v, attn_mask=mask)
    out = out[0].transpose(0, 1)
    if not return_lse:
        return out
    logits = torch.einsum("snk,enk->sne", q.float(), k.float()) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias.float()
    return out, logits.logsumexp(-1)


def cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    return_lse: bool = False,
) -> Cost:
    """Two products of 2 S E K FLOPs a head; one read of q, k, v and one write of the result."""
    moved = (2 * q.numel() + k.numel() + v.numel()) * q.element_size()
    lse_bytes = 4 * q.shape[0] * q.shape[1] if return_lse else 0
    return Cost(flops=4 * q.numel() * k.shape[0], bytes=moved + lse_bytes)


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


def _check_for_triton(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError for what only the reference takes."""
    width = q.shape[2]
    require(width in HEAD_WIDTHS, _NAME, f"head width 64 or 128 ({_ELSE})", width)
    narrow = q.dtype in (torch.bfloat16, torch.float16)
    require(narrow, _NAME, f"bf16 or fp16 ({_ELSE})", q.dtype)
    if bias is not None:
        require(bias.is_contiguous(), _NAME, "a contiguous bias", bias.stride())
    for x in (q, k, v):
        packed = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == width)
        require(packed, _NAME, "the heads of a token side by side (call .contiguous())", x.stride())
        # TMA wants rows at multiples of 16 bytes, and the portable kernel spills registers where
        # the stride is no multiple of 16. A tile's own offsets, up to 128 rows, have 32 bits.
        step = x.stride(0) if x.shape[0] > 1 else 0
        aligned = step % 16 == 0 and x.storage_offset() % 8 == 0
        require(aligned, _NAME, "tokens at multiples of 16 elements (call .contiguous())", step)
        require(0 <= step < 2**24, _NAME, "a token stride of 0 to 2^24 (call .contiguous())", step)


@torch.library.custom_op("pw::attention", mutates_args=())
def _op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    gluon: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = reference(q, k, v, bias, return_lse=True)
    return out.contiguous(), lse


@_op.register_kernel("cuda")
def run_kernel(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, gluon: bool
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; the input was checked by the caller."""
    variant = variant_for(capability(q.device), q.shape[2], bias=bias is not None, gluon=gluon)
    return run(variant, q, k, v, bias)


@_op.register_fake
def _fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, gluon: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


OP = register(
    Op(
        "attention",
        reference,
        cost,
        run_kernel,
        libraries=("gluon", "cudnn", "flash", "flash-attn"),
    )
)
