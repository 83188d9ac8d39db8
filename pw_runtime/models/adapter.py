# SPDX-License-Identifier: Apache-2.0
"""The spatial adapter, through which the draft latent controls the high-res transformer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pw_runtime.models.embeddings import mlp, project, run_mlp
from pw_runtime.types import DitConfig

GROUPS = 16
FEATURE_EPS = 1e-6


def conv(layer: nn.Conv3d, x: Tensor) -> Tensor:
    """Apply a convolution in the dtype its weight is stored in."""
    return F.conv3d(x.to(layer.weight.dtype), layer.weight, layer.bias, padding=layer.padding)


class SpatialAdapter(nn.Module):
    """PixelWizard's adapter (official hr_model.py), split where its inputs change.

    `control_features` depends on the draft alone and runs once per clip. `control` depends on the
    timestep too, runs once per step, and works on any slice of the tokens.
    """

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, config.adapter_dim
        self.freq_dim = config.freq_dim
        self.backbone = nn.ModuleDict(
            {
                "0": nn.Conv3d(config.in_dim, hidden, 1),
                "1": nn.GroupNorm(GROUPS, hidden, eps=1e-5),
                "3": nn.Conv3d(hidden, dim, 3, padding=1),
            }
        )
        self.feature_norm = nn.LayerNorm(dim, eps=FEATURE_EPS)
        self.adapter_time_proj = mlp(config.freq_dim, dim, nn.SiLU())
        self.adapter_dt_proj = mlp(config.freq_dim, dim, nn.SiLU())
        self.zero_layers = nn.ModuleDict(
            {str(block): nn.Linear(dim, dim) for block in config.control_blocks}
        )

    def control_features(self, draft: Tensor) -> Tensor:
        """Compute the features of a draft.

        The group norm takes its statistics over the whole clip, so this part cannot be tiled. The
        rest can. It starts with the fp32 norm of each token, so that the features can be kept in
        the dtype of the convolution, at half the size.

        Args:
            draft: [C, T, H/2, W/2] fp32 draft latent, resized to the token grid.

        Returns:
            [S, D] in the dtype of the weights.
        """
        first, norm, second = (self.backbone[i] for i in "013")
        assert isinstance(first, nn.Conv3d)
        assert isinstance(second, nn.Conv3d)
        x = F.silu(norm(conv(first, draft[None]).float()))
        x = F.silu(conv(second, x))  # [1, D, T, H/2, W/2]
        return x[0].flatten(1).T.contiguous()

    def control(self, features: Tensor, t: Tensor, dt: Tensor) -> tuple[Tensor, ...]:
        """Compute what one step adds to the input of each controlled block.

        Args:
            features: [S', D], rows of the result of `control_features`.
            t: [1, freq_dim] sinusoid of the timestep.
            dt: [1, freq_dim] sinusoid of the step size.

        Returns:
            [S', D] for each of the config's `control_blocks`, in order.
        """
        weight, bias = self.feature_norm.weight, self.feature_norm.bias
        normed = F.layer_norm(features.float(), features.shape[-1:], weight, bias, FEATURE_EPS)
        gain = run_mlp(self.adapter_time_proj, t) + run_mlp(self.adapter_dt_proj, dt)
        scaled = normed * (1 + gain.tanh())
        control = []
        for layer in self.zero_layers.values():
            assert isinstance(layer, nn.Linear)
            control.append(project(layer, scaled))
        return tuple(control)
