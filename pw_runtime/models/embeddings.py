# SPDX-License-Identifier: Apache-2.0
"""Latents to tokens and back; embeddings of timesteps and positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pw_kernels import axis_pairs
from pw_runtime.models.quantized_linear import QuantizedLinear
from pw_runtime.types import PATCH


def project(layer: nn.Linear | QuantizedLinear, x: Tensor) -> Tensor:
    """Apply a linear layer in the dtype its weight is stored in, or quantized."""
    if isinstance(layer, QuantizedLinear):
        result: Tensor = layer(x)
        return result
    return F.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)


def patchify(latent: Tensor) -> Tensor:
    """Cut a latent into 1x2x2 patches.

    Args:
        latent: [C, T, H, W].

    Returns:
        [S, 4C]; tokens run (t, h, w) row-major, features (channel, row, column).
    """
    c, t, h, w = latent.shape
    x = latent.reshape(c, t, h // PATCH, PATCH, w // PATCH, PATCH)
    return x.permute(1, 2, 4, 0, 3, 5).reshape(-1, c * PATCH * PATCH)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Put tokens back on the latent grid; channels run fastest here, unlike in `patchify`.

    Args:
        tokens: [S, 4C], features (row, column, channel).
        grid: tokens per clip as (T, H/2, W/2).

    Returns:
        [C, T, H, W].
    """
    t, h, w = grid
    x = tokens.reshape(t, h, w, PATCH, PATCH, -1)
    return x.permute(5, 0, 1, 3, 2, 4).reshape(-1, t, h * PATCH, w * PATCH)


def sinusoid(position: Tensor, dim: int) -> Tensor:
    """Compute [cos | sin] of position * 10000^(-j / (dim/2)), in fp64.

    Args:
        position: [R] timesteps or step sizes, in thousandths.
        dim: width of the embedding, even.

    Returns:
        [R, dim] fp32.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=position.device) / half
    angle = torch.outer(position.double(), torch.pow(10000.0, -exponent))
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()


@dataclass(frozen=True, slots=True)
class Positions:
    """The token grid of a clip and the rotations along its axes."""

    grid: tuple[int, int, int]  # tokens as (T, H/2, W/2)
    cos: Tensor  # [L, K/2] fp32, from `rope_tables`
    sin: Tensor  # [L, K/2] fp32
    place: Tensor  # [3] int64: index of the first token, H/2, W/2


def rope_tables(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute the rotation of every channel pair at every position along its axis.

    Of c = K/2 pairs, c - 2 (c // 3) belong to time and c // 3 each to rows and columns; pair j of
    the n pairs of an axis is rotated by position * 10000^(-j/n).

    Args:
        length: L, number of positions.
        head_dim: K.
        device: device of the tables.

    Returns:
        (cos, sin), each [L, K/2] fp32, computed in fp64.
    """
    frequencies = [
        torch.pow(10000.0, -torch.arange(n, dtype=torch.float64, device=device) / n)
        for n in axis_pairs(head_dim // 2)
    ]
    position = torch.arange(length, dtype=torch.float64, device=device)
    angle = torch.outer(position, torch.cat(frequencies))  # [L, K/2]
    return angle.cos().float(), angle.sin().float()


def mlp(d_in: int, d_out: int, activation: nn.Module) -> nn.Sequential:
    """Build linear, activation, linear, the form of all small embedding networks here."""
    return nn.Sequential(nn.Linear(d_in, d_out), activation, nn.Linear(d_out, d_out))


def run_mlp(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Apply linear, activation, linear, each linear in its own weight dtype."""
    first, activation, last = layers
    assert isinstance(first, nn.Linear | QuantizedLinear)
    assert isinstance(last, nn.Linear | QuantizedLinear)
    return project(last, activation(project(first, x)))
