# SPDX-License-Identifier: Apache-2.0
"""Rounding of weights to bf16, and the dtype in which each is kept."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from pw_kernels.quantized_linear import GRIDS
from pw_runtime.types import Precision

# The official code creates the adapter after it has rounded the model. So only its matrix products
# and convolutions are bf16 (autocast), and its two norms keep unrounded fp32 weights.
ADAPTER = re.compile(r"^spatial_adapter\.")
ADAPTER_NORM = re.compile(r"^spatial_adapter\.(backbone\.1|feature_norm)\.")

# Rounded to bf16 like every other weight, then used in fp32 arithmetic.
FP32_ISLANDS = re.compile(
    r"^(time_embedding|time_projection|dt_embedding|head)\.|(^|\.)(modulation|norm3\.(weight|bias))$"
)

_QUANTIZED = frozenset(grid.dtype for grid in GRIDS.values()) | {torch.float8_e4m3fn}


def store_dit_weight(name: str, weight: Tensor, precision: Precision) -> Tensor:
    """Convert one transformer weight to the dtype that the network stores it in.

    Args:
        name: official parameter name.
        weight: any float dtype, or part of a quantized weight, which stays as it is.
        precision: "fp32" keeps every value; "bf16" follows the official single-GPU rules
            (convert_model_dtype and bf16 autocast, section 1.6 of the model specification).

    Returns:
        The weight in fp32 or bf16.
    """
    if weight.dtype in _QUANTIZED or name.endswith(".scale"):
        return weight
    if precision == "fp32" or ADAPTER_NORM.search(name):
        return weight.float()
    rounded = weight.to(torch.bfloat16)
    if FP32_ISLANDS.search(name) and not ADAPTER.search(name):
        return rounded.float()
    return rounded
