# SPDX-License-Identifier: Apache-2.0
"""The official text path: cleaning, tokenising and the UMT5 encoder over official keys."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import ftfy
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

State = Mapping[str, Tensor]
MAX_DISTANCE = 128
EPS = 1e-6


def clean(text: str) -> str:
    """Repair mojibake, resolve HTML entities twice, collapse white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def load_tokenizer(ckpt_dir: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of an official directory."""
    from transformers import AutoTokenizer  # seconds to import

    return AutoTokenizer.from_pretrained(ckpt_dir / "google" / "umt5-xxl", local_files_only=True)


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str, text_len: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, [text_len] int64 each, right-padded, with the end token."""
    out = tokenizer(
        [clean(text)],
        padding="max_length",
        truncation=True,
        max_length=text_len,
        add_special_tokens=True,
        return_tensors="pt",
    )
    return out["input_ids"][0], out["attention_mask"][0]


def buckets(relative: Tensor, count: int) -> Tensor:
    """Return the bidirectional T5 bucket of (key - query); int64, same shape."""
    half = count // 2
    exact = half // 2
    distance = relative.abs()
    ratio = torch.log(distance.clamp_min(1).float() / exact) / math.log(MAX_DISTANCE / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp_max(half - 1)
    return torch.where(distance < exact, distance, far) + half * (relative > 0)


def position_bias(table: Tensor, length: int) -> Tensor:
    """Expand the bias table [buckets, H] to [H, length, length], query by key."""
    positions = torch.arange(length, device=table.device)
    relative = positions[None, :] - positions[:, None]
    return table[buckets(relative, table.shape[0])].permute(2, 0, 1)


def _rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * gain


def _attention(state: State, name: str, x: Tensor, mask: Tensor) -> Tensor:
    """Apply unscaled self-attention with a relative bias; x [L, D], mask [L]."""
    table = state[f"{name}.pos_embedding.embedding.weight"]
    heads = table.shape[1]
    q, k, v = (
        F.linear(x, state[f"{name}.attn.{which}.weight"]).unflatten(-1, (heads, -1)).transpose(0, 1)
        for which in "qkv"
    )
    scores = q @ k.transpose(1, 2) + position_bias(table, x.shape[0])
    scores = scores.masked_fill(mask == 0, torch.finfo(x.dtype).min)
    y = scores.float().softmax(dim=-1).to(x.dtype) @ v
    return F.linear(y.transpose(0, 1).flatten(1), state[f"{name}.attn.o.weight"])


def hidden_states(state: State, ids: Tensor, mask: Tensor) -> Tensor:
    """Map ids and mask [L] to the encoder's output [L, D], in the dtype of the weights."""
    x = state["token_embedding.weight"][ids]
    layers = {int(key.split(".")[1]) for key in state if key.startswith("blocks.")}
    for index in sorted(layers):
        name = f"blocks.{index}"
        x = x + _attention(state, name, _rms_norm(x, state[f"{name}.norm1.weight"]), mask)
        h = _rms_norm(x, state[f"{name}.norm2.weight"])
        gate = F.gelu(F.linear(h, state[f"{name}.ffn.gate.0.weight"]), approximate="tanh")
        h = F.linear(h, state[f"{name}.ffn.fc1.weight"]) * gate
        x = x + F.linear(h, state[f"{name}.ffn.fc2.weight"])
    return _rms_norm(x, state["norm.weight"])


def encode(state: State, ids: Tensor, mask: Tensor) -> Tensor:
    """Encode the padded ids [L] and cut to the real length: [n, D]."""
    return hidden_states(state, ids, mask)[: int(mask.sum())]
