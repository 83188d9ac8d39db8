# SPDX-License-Identifier: Apache-2.0
"""Visibility of the borders between strips."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def seam_index(frames: Tensor, borders: Sequence[int], dim: int) -> float:
    """Return the mean gradient energy across borders over that elsewhere; 1 for no visible seam.

    Args:
        frames: [..., H, W], with at least one row or column that is not next to a border.
        borders: index of the first row or column after each border; at least one.
        dim: axis that the borders cut, -2 for rows, -1 for columns.

    Returns:
        A ratio; infinite where there is energy on the borders only.
    """
    energy = frames.double().diff(dim=dim).square().movedim(dim, -1).flatten(0, -2).mean(dim=0)
    on_border = torch.zeros(len(energy), dtype=torch.bool)
    on_border[[border - 1 for border in borders]] = True
    return (energy[on_border].mean() / energy[~on_border].mean()).item()
