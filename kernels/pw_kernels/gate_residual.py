# SPDX-License-Identifier: Apache-2.0
"""The gated addition that closes a sub-layer."""

from __future__ import annotations

from torch import Tensor


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate in fp32.

    Args:
        x: [S, D] residual stream, any float dtype.
        y: [S, D] output of the sub-layer.
        gate: [R, D] fp32; row r serves tokens r*S/R .. (r+1)*S/R.

    Returns:
        [S, D] fp32: the residual stream is fp32 from the first gated addition on.
    """
    rows = y.float().unflatten(0, (gate.shape[0], -1)) * gate[:, None]  # [R, S/R, D]
    return x + rows.flatten(0, 1)
