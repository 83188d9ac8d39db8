# SPDX-License-Identifier: Apache-2.0
"""The UMT5 text encoder: transformer blocks with a relative position bias of their own each.

Source: wan/modules/t5.py, and UMT5EncoderModel of transformers, whose parameter names these are and
whose bits tests compare. All weights have one dtype, norms and biases too, as officially.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pw_kernels import rms_norm
from pw_runtime.types import TextEncoderConfig

if TYPE_CHECKING:
    from pw_runtime.models.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class TextNetwork:
    """A text encoder and the tokenizer it was trained with."""

    tokenizer: TextTokenizer
    encoder: TextEncoder


class SelfAttention(nn.Module):
    """Attention without a scale of the queries; the bias depends on distances between tokens."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        dim, inner = config.dim, config.attention_dim
        self.num_heads = config.num_heads
        self.q = nn.Linear(dim, inner, bias=False)
        self.k = nn.Linear(dim, inner, bias=False)
        self.v = nn.Linear(dim, inner, bias=False)
        self.o = nn.Linear(inner, dim, bias=False)
        self.relative_attention_bias = _table(config.num_buckets, config.num_heads)

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor | None) -> Tensor:
        """[B, E, D], [E, E] and a mask [B, E] of the real tokens -> [B, E, D]."""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, N, E, K]
            for layer in (self.q, self.k, self.v)
        )
        bias = self.relative_attention_bias(buckets).permute(2, 0, 1)[None]  # [1, N, E, E]
        if mask is not None:
            bias = torch.where(mask[:, None, None], bias, torch.finfo(bias.dtype).min)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.contiguous(), scale=1.0)
        return self.o(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two projections of which one gates the other, and one back."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.wi_1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.wo = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.wo(gelu(self.wi_0(x)) * self.wi_1(x))


class AttentionLayer(nn.Module):
    """RMS norm and attention, added to the residual stream."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(config)
        self.layer_norm = nn.RMSNorm(config.dim, eps=config.eps)
        self.eps = config.eps

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor | None) -> Tensor:
        """[B, E, D] -> [B, E, D]; buckets and mask as for `SelfAttention`."""
        normed = rms_norm(x, self.layer_norm.weight, self.eps)
        return x + self.SelfAttention(normed, buckets, mask)


class FeedForwardLayer(nn.Module):
    """RMS norm and feed-forward, added to the residual stream."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.DenseReluDense = FeedForward(config)
        self.layer_norm = nn.RMSNorm(config.dim, eps=config.eps)
        self.eps = config.eps

    def forward(self, x: Tensor) -> Tensor:
        """[B, E, D] -> [B, E, D]."""
        return x + self.DenseReluDense(rms_norm(x, self.layer_norm.weight, self.eps))


class Block(nn.Module):
    """Attention, then feed-forward."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList((AttentionLayer(config), FeedForwardLayer(config)))

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor | None) -> Tensor:
        """[B, E, D] -> [B, E, D]; buckets and mask as for `SelfAttention`."""
        attention, ffn = self.layer
        return ffn(attention(x, buckets, mask))


class Encoder(nn.Module):
    """The blocks and the last norm."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layer_norm = nn.RMSNorm(config.dim, eps=config.eps)


class TextEncoder(nn.Module):
    """Hidden states of texts."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.shared = _table(config.vocab_size, config.dim)
        self.encoder = Encoder(config)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode token ids.

        Args:
            ids: [B, E] int64, end tokens included.
            mask: [B, E], true for real tokens, if some are padding.

        Returns:
            [B, E, D] in the weights' dtype.
        """
        x = self.shared(ids)
        buckets = relative_buckets(
            ids.shape[1], self.config.num_buckets, self.config.max_distance, ids.device
        )
        for block in self.encoder.block:
            x = block(x, buckets, mask)
        return rms_norm(x, self.encoder.final_layer_norm.weight, self.config.eps)


def encode_tokens(encoder: TextEncoder, ids: Tensor) -> Tensor:
    """Encode one text without padding; equals the official padded run cut to length.

    Args:
        encoder: encoder with its weights.
        ids: [E] token ids, including the end token.

    Returns:
        [E, text_dim] in the encoder's dtype.
    """
    hidden: Tensor = encoder(ids[None])[0]
    return hidden


def _table(rows: int, width: int) -> nn.Embedding:
    """Return an embedding that is not initialised: on the meta device, drawing its values would
    import torch's compiler, which takes seconds."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def gelu(x: Tensor) -> Tensor:
    """Compute GELU by tanh one operation after the other: PyTorch's own rounds bf16 differently."""
    inner = x + 0.044715 * torch.pow(x, 3.0)
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * inner))


def relative_buckets(length: int, count: int, max_distance: int, device: torch.device) -> Tensor:
    """Return the bucket of every key's position relative to every query's.

    Half of the buckets are for keys behind the query. Of each half, half are for one distance each,
    the others grow logarithmically up to `max_distance`, and the last one has all that is beyond.

    Returns:
        [E, E] int64, query by key, from 0 to count - 1.
    """
    half = count // 2
    exact = half // 2
    relative = torch.arange(1 - length, length, device=device)  # [2E - 1]
    distance = relative.abs()
    # Distances below `exact` have buckets of their own; the 1 only avoids log(0).
    ratio = torch.log(distance.clamp_min(1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp_max(half - 1)
    buckets = (relative > 0).long() * half + torch.where(distance < exact, distance, far)
    # Row 0, of the first query, starts at relative position 0; every further row one before.
    return buckets.unfold(0, length, 1).flip(0)
