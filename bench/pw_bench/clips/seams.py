# SPDX-License-Identifier: Apache-2.0
"""How visible the borders between strips are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def seam_index(frames: Tensor, borders: Sequence[int], dim: int) -> float:
    """Mean gradient energy across borders over that everywhere else; 1 where none is visible.

    Args:
        frames: [..., H, W], at least one border and one line away from all of them.
        borders: index of the first row or column after each border.
        dim: along which the borders lie one after the other, -2 for rows, -1 for columns.

    Returns:
        A ratio; infinite where there is energy on the borders only.
    """
    wide = frames.double()
    energy = wide.diff(dim=dim).square().movedim(dim, -1).flatten(0, -2).mean(dim=0)
    on_border = torch.zeros(len(energy), dtype=torch.bool)
    on_border[[border - 1 for border in borders]] = True
    return (energy[on_border].mean() / energy[~on_border].mean()).item()
