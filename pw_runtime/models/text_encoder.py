# SPDX-License-Identifier: Apache-2.0
"""The UMT5 text encoder: the class from transformers, built from our config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pw_runtime.types import TextEncoderConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

TIED_KEY = "encoder.embed_tokens.weight"  # the same tensor as shared.weight


@dataclass(frozen=True, slots=True)
class TextNetwork:
    """A text encoder and the tokenizer it was trained with."""

    tokenizer: PreTrainedTokenizerBase
    encoder: UMT5EncoderModel


def build_text_encoder(config: TextEncoderConfig) -> UMT5EncoderModel:
    """Build an UMT5EncoderModel on the meta device, without weights, in evaluation mode."""
    from transformers import UMT5Config, UMT5EncoderModel  # seconds to import

    umt5 = UMT5Config(
        vocab_size=config.vocab_size,
        d_model=config.dim,
        d_kv=config.attention_dim // config.num_heads,
        d_ff=config.ffn_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        relative_attention_num_buckets=config.num_buckets,
        relative_attention_max_distance=config.max_distance,
        layer_norm_epsilon=config.eps,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        use_cache=False,
    )
    with torch.device("meta"):
        return UMT5EncoderModel(umt5).eval()


def encode_tokens(encoder: UMT5EncoderModel, ids: Tensor) -> Tensor:
    """Encode one text without padding; equals the official padded run cut to length.

    Args:
        encoder: encoder with its weights.
        ids: [E] token ids, including the end token.

    Returns:
        [E, text_dim] in the encoder's dtype.
    """
    hidden: Tensor = encoder(input_ids=ids[None]).last_hidden_state[0]
    return hidden
