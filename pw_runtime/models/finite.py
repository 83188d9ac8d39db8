# SPDX-License-Identifier: Apache-2.0
"""Values that are not finite: found, and traced to the weights that are their cause."""

from __future__ import annotations

from torch import Tensor, nn

from pw_runtime.errors import BadResult, BadWeights

_NAMED = 3  # tensors that a message names


def require_finite_weights(net: nn.Module) -> None:
    """Raise BadWeights naming the weights of a network that hold NaN or infinity."""
    bad = [name for name, x in net.named_parameters() if not is_finite(x)]
    if bad:
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise BadWeights(
            "the model's weights contain NaN or infinity",
            got=", ".join(bad[:_NAMED]) + more,
            wanted="finite numbers",
            do="convert an intact checkpoint: no prompt can work with this one",
        )


def is_finite(x: Tensor) -> bool:
    """Tell whether no value is NaN or infinite; of a tensor on the meta device, none is."""
    if x.is_meta or x.dtype.itemsize == 1:  # quantized weights: what made them had checked them
        return True
    # The sum needs no mask of every value, and reads any memory layout once. It can overflow.
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def require_finite(result: Tensor, net: nn.Module, name: str) -> Tensor:
    """Return the result of a network.

    Raises BadWeights where it is not finite because of weights, and BadResult where their values
    are finite, but too large for the arithmetic.
    """
    if not is_finite(result):
        require_finite_weights(net)
        raise overflow(name)
    return result


def overflow(name: str) -> BadResult:
    """Return the error for a result that is not finite although inputs and weights are."""
    return BadResult(
        f"{name} contains NaN or infinity",
        wanted="finite numbers",
        do="check guidance and shift of the preset, and the checkpoint: its values are finite, but "
        "larger than the arithmetic can hold; or try --precision fp32",
    )
