# SPDX-License-Identifier: Apache-2.0
"""Values in weights with which no network can compute, found while the weights are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pw_runtime.checkpoint.bundle import some_names
from pw_runtime.errors import BadWeights

# Beyond it a value becomes infinite in bf16, one of the two precisions that networks run in.
_LARGEST_USABLE = torch.finfo(torch.bfloat16).max
# Every published network of this family is also distributed in fp16, so none of their weights is
# beyond its largest number.
_LARGEST_USUAL = torch.finfo(torch.float16).max


@dataclass(slots=True)
class WeightValues:
    """Findings about the values of one network's weights."""

    unusable: dict[str, str] = field(default_factory=dict)  # by tensor, as in "3 NaN"
    large: dict[str, str] = field(default_factory=dict)
    zero: list[str] = field(default_factory=list)

    def look(self, tensors: Mapping[str, Tensor]) -> None:
        """Look at tensors in memory: one pass over each, a second one over unusable ones."""
        for name, tensor in tensors.items():
            if tensor.numel() == 0:
                continue
            low, high = (float(value) for value in tensor.aminmax())  # NaN if any value is
            largest = max(-low, high)
            if not largest <= _LARGEST_USABLE or low != low:
                self.unusable[name] = _counted(tensor)
            elif largest > _LARGEST_USUAL:
                self.large[name] = f"up to {largest:.3g}"
            elif low == high == 0 and tensor.dim() > 1:
                self.zero.append(name)

    def require_usable(self, what: str) -> None:
        """Raise BadWeights where a value is NaN, infinite or infinite in bf16."""
        if self.unusable:
            raise BadWeights(
                f"{what} has weights that are not numbers, in {len(self.unusable)} tensor(s)",
                got=_listed(self.unusable),
                wanted=f"finite values, none beyond {_LARGEST_USABLE:.3g}",
                do="download it again; if that is no help, the checkpoint is broken, and "
                "every clip made with it would be too",
            )

    def warn(self, what: str, say: Callable[[str], None]) -> None:
        """Say which tensors hold values that no published network has."""
        if self.large:
            say(
                f"warning: {what}: {len(self.large)} tensor(s) hold values beyond "
                f"{_LARGEST_USUAL:,.0f}, the largest fp16 number, beyond any weight that is known: "
                f"{_listed(self.large)}; look at a clip before you rely on it"
            )
        if self.zero:
            say(
                f"warning: {what}: {len(self.zero)} tensor(s) are all zeros: "
                f"{some_names(self.zero)}; a download with holes looks like that"
            )


def _listed(found: Mapping[str, str]) -> str:
    return some_names([f"{name} ({count})" for name, count in found.items()])


def _counted(tensor: Tensor) -> str:
    nan = int(tensor.isnan().sum())
    infinite = int(tensor.isinf().sum())
    # why: fp16 would round the limit itself to infinity
    wide = tensor.float() if tensor.itemsize < 4 else tensor
    large = int((wide.abs() > _LARGEST_USABLE).sum()) - infinite
    parts = [(nan, "NaN"), (infinite, "infinite"), (large, "too large for bf16")]
    return f"{', '.join(f'{n:,} {name}' for n, name in parts if n)} of {tensor.numel():,}"
