# SPDX-License-Identifier: Apache-2.0
"""How a program that holds one whole row of channels is cut."""

from __future__ import annotations


def row_block(dim: int) -> tuple[int, int]:
    """(channels of the block: a power of two, as Triton wants; warps) for rows of `dim` channels.

    512 channels a warp: 16 a thread, two loads of 16 bytes of a bf16 row.
    """
    block = 1 << (dim - 1).bit_length()
    return block, min(16, max(1, block // 512))
