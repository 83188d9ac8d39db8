# SPDX-License-Identifier: Apache-2.0
"""Which kernels the networks launch, found by running them on meta tensors at the true sizes.

No list is kept by hand: what the runtime would launch is what gets compiled.
"""

from __future__ import annotations

import torch

from pw_kernels.launcher import Variant, recording


def variants_for(gpu: tuple[int, int]) -> dict[str, Variant]:
    """Variants by their keys that generating drafts, 2K and 4K clips takes on such a GPU.

    Args:
        gpu: compute capability.
    """
    from pw_kernels.attention import run_kernel as attention
    from pw_kernels.norm_modulate import run_kernel as norm_modulate

    with recording(gpu) as variants:
        x = torch.empty(111600, 3072, device="meta")
        rows = torch.empty(1, 6, 3072, device="meta")
        norm_modulate(x, rows[:, 0], rows[:, 1], 1e-6, torch.bfloat16)
        q = torch.empty(111600, 24, 128, device="meta", dtype=torch.bfloat16)
        attention(q, q, q, None, False)
        attention(q, q[:79], q[:79], q[:79, 0, 0].contiguous(), False)
    return variants
