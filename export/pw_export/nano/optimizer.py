# SPDX-License-Identifier: Apache-2.0
"""Muon for the matrices and kernels of inner layers, AdamW for everything else."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

INNER = re.compile(r"(^|\.)blocks\.|\.residual\.|\.resample\.")


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates (Jordan et al. 2024).

    Unlike torch.optim.Muon it does not multiply in bf16, ten times slower than fp32 on most CPUs,
    and multiplies all matrices of one shape in a single batch.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every weight that has a gradient, with an rms of 0.2 lr, like AdamW.

        A kernel [C', C, ...] is treated as the matrix [C', C ...] that it applies at each position.
        """
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    shape = torch.Size((len(weight), weight[0].numel()))
                    by_shape.setdefault(shape, []).append(weight)
            for shape, weights in by_shape.items():
                gradients = [self._nesterov(weight, group).flatten(1) for weight in weights]
                updates = orthogonal(torch.stack(gradients))
                size = group["lr"] * 0.2 * max(shape) ** 0.5
                for weight, update in zip(weights, updates, strict=True):
                    weight.sub_(update.view(weight.shape), alpha=size)

    def _nesterov(self, weight: nn.Parameter, group: dict[str, float]) -> Tensor:
        state, gradient = self.state[weight], weight.grad
        assert gradient is not None
        mean = state.setdefault("mean", torch.zeros_like(gradient))
        mean.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(mean, group["momentum"])


def orthogonal(x: Tensor) -> Tensor:
    """Bring singular values of [n, rows, columns] near 1, by five Newton-Schulz steps."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def make_optimizers(
    modules: nn.Module, matrix_lr: float, other_lr: float
) -> list[torch.optim.Optimizer]:
    """Use Muon for the weights of INNER layers and AdamW for the rest."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weight in modules.named_parameters():
        inside = INNER.search(name) and name.endswith("weight") and weight.dim() > 1
        (matrices if inside else others).append(weight)
    adam = torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(matrices, matrix_lr), adam] if matrices else [adam]
