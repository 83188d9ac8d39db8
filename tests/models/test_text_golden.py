# SPDX-License-Identifier: Apache-2.0
"""The text encoder against tensors of the official implementation; text cleaning."""

from __future__ import annotations

import pytest
import torch

from pw_runtime.checkpoint import keymaps
from pw_runtime.models import TextEncoder
from pw_runtime.models.text_encoder import encode_tokens
from pw_runtime.stages.text import clean_text
from tests.closeness import max_abs, relative_l2
from tests.networks import TINY_TEXT_ENCODER
from tests.oracle import golden


def load(dtype: torch.dtype) -> TextEncoder:
    encoder = TextEncoder(TINY_TEXT_ENCODER)
    weights = {
        keymaps.text_encoder_to_transformers(name): x.to(dtype)
        for name, x in golden.load("t5_tiny_weights").items()
    }
    encoder.load_state_dict(weights, assign=True)
    return encoder.requires_grad_(False)


@pytest.mark.parametrize("text", [0, 1])
def test_unpadded_encoding_equals_the_official_padded_one(text) -> None:
    io = golden.load("t5_tiny_io")
    length = int(io["mask"][text].sum())
    context = encode_tokens(load(torch.float32), io["ids"][text, :length])
    assert max_abs(context, io[f"context_{text}_fp32"]) <= 1e-5


@pytest.mark.parametrize("text", [0, 1])
def test_bf16_encoding_is_as_close_as_official_bf16(text) -> None:
    io = golden.load("t5_tiny_io")
    length = int(io["mask"][text].sum())
    context = encode_tokens(load(torch.bfloat16), io["ids"][text, :length]).float()
    official, exact = io[f"context_{text}_bf16"].float(), io[f"context_{text}_fp32"]
    assert relative_l2(context, exact) <= 2 * relative_l2(official, exact)


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  a \t red\n\n ball ", "a red ball"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("schÃ¶n", "schön"),
        ("", ""),
    ],
)
def test_text_is_cleaned_as_the_official_tokenizer_does(raw, cleaned) -> None:
    assert clean_text(raw) == cleaned
