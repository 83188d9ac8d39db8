# SPDX-License-Identifier: Apache-2.0
"""Attention by third-party kernels: those in PyTorch, FlashAttention-2 and FlashAttention-4."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pw_kernels.op import Implementation, require


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute `pw_kernels.attention` with cuDNN and nothing else. Raises RuntimeError."""
    return _sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute `pw_kernels.attention` with PyTorch's flash attention. Raises RuntimeError."""
    return _sdpa(SDPBackend.FLASH_ATTENTION, q, k, v)


def flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute `pw_kernels.attention` with the package flash-attn. Raises RuntimeError."""
    function = _flash_attn_func("flash_attn", "flash-attn")
    out: Tensor = function(q[None], k[None], v[None])
    return out[0]


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute `pw_kernels.attention` with the package flash-attn-4, for Hopper and Blackwell.

    Raises ValueError for other inputs than bf16 or fp16 of width 64 or 128, RuntimeError where
    the package cannot be used.
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    require(half, "attention", "bf16 or fp16 for flash-attn-4", q.dtype)
    require(q.shape[2] in (64, 128), "attention", "head width 64 or 128 for flash-attn-4", q.shape)
    function = _flash_attn_func("flash_attn.cute", "flash-attn-4")
    out: Tensor = function(q[None], k[None], v[None])[0]  # and a log-sum-exp, None unless requested
    return out[0]


LIBRARIES: Mapping[Implementation, Callable[[Tensor, Tensor, Tensor], Tensor]] = MappingProxyType(
    {"cudnn": cudnn, "flash": flash, "flash-attn": flash_attn, "flash-attn-4": flash_attn_4}
)


def available(implementation: Implementation) -> bool:
    """Return whether the package that `implementation` needs beyond PyTorch is installed.

    flash-attn and flash-attn-4 share the name flash_attn: the latter installs flash_attn/cute and
    no flash_attn/__init__.py.
    """
    if implementation not in ("flash-attn", "flash-attn-4"):
        return True
    spec = importlib.util.find_spec("flash_attn")
    if spec is None:
        return False
    if implementation == "flash-attn":
        return spec.origin is not None
    folders = spec.submodule_search_locations or ()
    return any((Path(folder) / "cute" / "__init__.py").exists() for folder in folders)


def _flash_attn_func(module: str, package: str) -> Any:
    """Import flash_attn_func of a package. Raises RuntimeError saying what to install."""
    try:
        return importlib.import_module(module).flash_attn_func
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"pw::attention as {package} expects {module}.flash_attn_func, got {error} "
            f"(installed: {_installed()}): pip install {package}, or choose another --attention"
        ) from error


def _installed() -> str:
    """List the FlashAttention packages of this environment, with their versions."""
    found = []
    for package in ("flash-attn", "flash-attn-4"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found) or "neither flash-attn nor flash-attn-4"


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]  # [1, N, S|E, K]
    try:
        with sdpa_kernel(backend):  # this one or an error: PyTorch's own choice may be slower
            out = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
    except RuntimeError as error:
        shape, dtype = tuple(q.shape), q.dtype
        raise RuntimeError(
            f"pw::attention as {backend.name} does not take q {shape} {dtype} with {k.shape[0]} "
            f"keys ({str(error).splitlines()[0]}): choose another --attention"
        ) from error
    return out[0].transpose(0, 1)
