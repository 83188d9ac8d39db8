# SPDX-License-Identifier: Apache-2.0
"""Attention by other people's kernels: cuDNN and flash attention in PyTorch, flash-attn."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pw_kernels.op import Implementation


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[S, N, K] of `pw_kernels.attention` by cuDNN and nothing else. Raises RuntimeError."""
    return _sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[S, N, K] of `pw_kernels.attention` by PyTorch's flash attention. Raises RuntimeError."""
    return _sdpa(SDPBackend.FLASH_ATTENTION, q, k, v)


def flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[S, N, K] of `pw_kernels.attention` by the flash-attn package. Raises RuntimeError."""
    try:
        package = importlib.import_module("flash_attn")
    except ImportError as error:
        raise RuntimeError(
            f"pw::attention as flash-attn cannot import it ({error}): pip install flash-attn"
        ) from error
    out: Tensor = package.flash_attn_func(q[None], k[None], v[None])
    return out[0]


LIBRARIES: Mapping[Implementation, Callable[[Tensor, Tensor, Tensor], Tensor]] = MappingProxyType(
    {"cudnn": cudnn, "flash": flash, "flash-attn": flash_attn}
)


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]  # [1, N, S|E, K]
    try:
        with sdpa_kernel(backend):  # this one or an error: PyTorch's own choice may be slower
            out = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
    except RuntimeError as error:
        shape, dtype = tuple(q.shape), q.dtype
        raise RuntimeError(
            f"pw::attention as {backend.name} refused q {shape} {dtype} with {k.shape[0]} keys "
            f"({str(error).splitlines()[0]}): choose another --attention"
        ) from error
    return out[0].transpose(0, 1)


def available(implementation: Implementation) -> bool:
    """Whether what `implementation` needs beyond PyTorch can be imported."""
    return implementation != "flash-attn" or importlib.util.find_spec("flash_attn") is not None
