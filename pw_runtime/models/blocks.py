# SPDX-License-Identifier: Apache-2.0
"""One transformer block: self-attention, cross-attention to the text, feed-forward."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pw_kernels import (
    attention,
    gate_residual,
    gate_residual_norm,
    norm_modulate,
    qk_norm_rope,
    rms_norm,
)
from pw_runtime.models.embeddings import Positions, project, run_mlp
from pw_runtime.types import DitConfig


@dataclass(frozen=True, slots=True)
class TextKeysValues:
    """Keys and values of the text for the cross-attention of one block.

    The zero rows that pad the text to `text_len` all have the same key and value, so the last few
    rows stand for all of them, weighted by their biases.
    """

    keys: Tensor  # [E', N, K]: the E text rows, then one row per entry of `pad_biases`
    values: Tensor  # [E', N, K]
    bias: Tensor  # [E'], added to the logits: zeros, then `pad_biases`


def pad_biases(num_pad: int, dtype: torch.dtype) -> tuple[float, ...]:
    """Return logit biases that make a few equal keys weigh as much as `num_pad` of them.

    In fp32 this is ln(num_pad). In bf16 a single bias is off by up to 1.6 %, so the remainder goes
    to a second key, and so on: sum(exp(bias)) = num_pad to 1e-4, from below.
    """
    biases: list[float] = []
    rest = float(num_pad)
    while rest > 1e-4 * num_pad:
        bias = torch.tensor(math.log(rest), dtype=torch.float64).to(dtype)
        if bias.double().exp() > rest:
            bias = torch.nextafter(bias, torch.tensor(-math.inf, dtype=dtype))
        biases.append(bias.item())
        rest -= math.exp(biases[-1])
    return tuple(biases)


class Attention(nn.Module):
    """Four projections, and RMS norms of queries and keys that span all heads."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads, self.eps = config.num_heads, config.eps
        self.q, self.k = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v, self.o = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_q = nn.RMSNorm(dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(dim, eps=config.eps)

    def heads(self, x: Tensor) -> Tensor:
        """Split into heads, [S, D] -> [S, N, K]."""
        return x.unflatten(-1, (self.num_heads, -1))

    def queries(self, x: Tensor) -> Tensor:
        """Compute normalised queries, [S, D] -> [S, N, K]."""
        return self.heads(rms_norm(project(self.q, x), self.norm_q.weight, self.eps))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute normalised keys and plain values, [S, D] -> [S, N, K] each."""
        keys = rms_norm(project(self.k, x), self.norm_k.weight, self.eps)
        return self.heads(keys), self.heads(project(self.v, x))

    def rotated(
        self, x: Tensor, cos: Tensor, sin: Tensor, origin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute normalised, rotated queries and keys, and values, [S, D] -> [S, N, K] each."""
        weights = (self.norm_q.weight, self.norm_k.weight)
        q, k = project(self.q, x), project(self.k, x)
        qk_norm_rope(q, k, *weights, cos, sin, origin, self.num_heads, self.eps)
        return self.heads(q), self.heads(k), self.heads(project(self.v, x))

    def output(self, heads: Tensor) -> Tensor:
        """Merge heads and project, [S, N, K] -> [S, D]."""
        return project(self.o, heads.flatten(1))


class Block(nn.Module):
    """A Wan block (official WanAttentionBlock) with the official parameter names.

    `norm3`, the only norm with parameters, precedes the cross-attention, as in the official code.
    """

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = Attention(config)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = Attention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))

    def forward(
        self, x: Tensor, rows: Tensor, positions: Positions, text: TextKeysValues
    ) -> Tensor:
        """Run the block on all tokens of a clip.

        Args:
            x: [S, D] residual stream; bf16, or fp32, which is overwritten.
            rows: [R, 6, D] fp32 shift, scale and gate of the attention, then of the feed-forward,
                with this block's table added.
            positions: rotary positions of the tokens.
            text: keys and values of this block's cross-attention.

        Returns:
            [S, D] fp32.
        """
        rotary = (positions.cos, positions.sin, positions.place)
        y = attention(*self.before_attention(x, rows, *rotary))
        # Only block 0 gets bf16. From here on the residual stream is updated in place.
        return self.after_attention(x.float(), y, rows, text.keys, text.values, text.bias)

    def before_attention(
        self, x: Tensor, rows: Tensor, cos: Tensor, sin: Tensor, origin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the inputs of self-attention for any slice of the tokens.

        Args:
            x: [S', D] residual stream.
            rows: [R, 6, D] fp32, R dividing S'.
            cos, sin, origin: rotary tables and the position of the first token, as in
                `pw_kernels.qk_norm_rope`.

        Returns:
            Queries, keys and values, [S', N, K] each.
        """
        shift, scale = rows[:, 0], rows[:, 1]
        h = norm_modulate(x, shift, scale, self.eps, self.self_attn.q.bias.dtype)
        return self.self_attn.rotated(h, cos, sin, origin)

    def after_attention(
        self, x: Tensor, y: Tensor, rows: Tensor, keys: Tensor, values: Tensor, bias: Tensor
    ) -> Tensor:
        """Run the rest of the block after self-attention, for any slice of the tokens.

        Args:
            x: [S', D] fp32 residual stream, overwritten.
            y: [S', N, K] result of self-attention.
            rows: [R, 6, D] fp32, R dividing S'.
            keys, values, bias: the fields of `TextKeysValues`.

        Returns:
            [S', D] fp32.
        """
        _, _, gate1, shift2, scale2, gate2 = rows.unbind(1)
        norm3, dtype = self.norm3, self.self_attn.q.bias.dtype
        y = self.self_attn.output(y)
        h = gate_residual_norm(x, y, gate1, norm3.weight, norm3.bias, self.eps, dtype)
        h = self.cross_attn.queries(h)
        y = self.cross_attn.output(attention(h, keys, values, bias))
        h = gate_residual_norm(x, y, None, scale2, shift2, self.eps, dtype, modulated=True)
        del y  # keep it out of the memory peak of the feed-forward
        return gate_residual(x, run_mlp(self.ffn, h), gate2)
