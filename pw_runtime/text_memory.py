# SPDX-License-Identifier: Apache-2.0
"""What lives at the peak of the text stage, in closed form."""

from __future__ import annotations

import math

from pw_runtime.models import expected_shapes
from pw_runtime.types import MemoryItem, Precision, TextEncoderConfig


def text_memory(
    config: TextEncoderConfig, precision: Precision, tokens: int = 512
) -> tuple[MemoryItem, ...]:
    """Weights, and one layer's work on a text of `tokens` tokens."""
    low = 4 if precision == "fp32" else 2
    shapes = expected_shapes("text_encoder", config).values()
    pairs = tokens * tokens
    # The bias of every pair of positions, twice; or the whole numbers that it is looked up by.
    attention = max(2 * low * config.num_heads * pairs, 54 * pairs)
    return (
        MemoryItem(
            name="weights of the text encoder",
            bytes=low * sum(math.prod(shape) for shape in shapes),
            place="device",
        ),
        MemoryItem(name="biases of the attention", bytes=attention, place="device"),
        MemoryItem(name="hidden states", bytes=7 * low * tokens * config.dim, place="device"),
    )
