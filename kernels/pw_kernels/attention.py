# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over all keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, last_biases: tuple[float, ...] = ()) -> Tensor:
    """softmax(q kT / sqrt(K) + b) v, with b = `last_biases` on the last keys and 0 before them.

    A bias lets one key stand for n identical ones (b = ln n): the softmax of the zero-padded
    text is then exact without attending to every pad row.

    Args:
        q: [S, N, K] queries.
        k: [E, N, K] keys.
        v: [E, N, K] values.
        last_biases: added to the logits of the last keys, after the 1/sqrt(K) scale.

    Returns:
        [S, N, K] in q's dtype.
    """
    mask = None
    if last_biases:
        mask = torch.zeros(k.shape[0], dtype=q.dtype, device=q.device)
        mask[-len(last_biases) :] = torch.tensor(last_biases, dtype=q.dtype)
        mask = mask.expand(1, 1, q.shape[0], -1)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, N, S|E, K]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out[0].transpose(0, 1)
