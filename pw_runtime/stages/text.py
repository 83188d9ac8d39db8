# SPDX-License-Identifier: Apache-2.0
"""Prompt -> text context."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

import ftfy
import torch
from torch import Tensor

from pw_runtime.models.finite import require_finite
from pw_runtime.models.text_encoder import TextNetwork, encode_tokens
from pw_runtime.models.tokenizer import TextTokenizer


def clean_text(text: str) -> str:
    """Repair encoding damage, resolve HTML entities twice, collapse white space.

    Source: the "whitespace" cleaning of wan/modules/tokenizers.py.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def tokenize(
    text: str,
    tokenizer: TextTokenizer,
    text_len: int,
    notice: Callable[[str], None],
) -> Tensor:
    """Token ids of a cleaned text, end token included.

    A text longer than `text_len` tokens is truncated as by the official code. `notice` is called
    with how much was lost, and with the words that the tokenizer does not know.

    Returns:
        [E] int64, E <= text_len.
    """
    cleaned = clean_text(text)
    tokens = tokenizer.encode(cleaned, text_len)
    if tokens.unknown:
        notice(f"words not in this model's vocabulary: {', '.join(tokens.unknown)}")
    if tokens.whole > len(tokens.ids):
        notice(
            f"text truncated from {tokens.whole} to {len(tokens.ids)} tokens, the limit of the "
            f"model: {text[:60]}..."
        )
    return torch.tensor(tokens.ids, dtype=torch.int64)


def encode_text(
    net: TextNetwork, text: str, text_len: int, notice: Callable[[str], None]
) -> Tensor:
    """Encode a prompt or a negative prompt.

    Args:
        net: tokenizer and encoder.
        text: as the user wrote it.
        text_len: most tokens that the transformers take.
        notice: called with a message when the text is truncated or has unknown words.

    Returns:
        [E, text_dim] in the encoder's dtype, E <= text_len: one row for each real token; on the
        host, where it waits for the transformers.

    Raises:
        BadWeights, BadResult: the result is not finite.
    """
    ids = tokenize(text, net.tokenizer, text_len, notice)
    context = encode_tokens(net.encoder, ids.to(net.encoder.shared.weight.device))
    return require_finite(context, net.encoder, "the text context").cpu()
