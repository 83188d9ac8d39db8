# SPDX-License-Identifier: Apache-2.0
"""The spatial adapter: how the draft latent steers the high-res transformer."""

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

    `features` depends on the draft alone: once per clip. `controls` depends on the timestep
    too, and takes any part of the tokens.
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

    def features(self, draft: Tensor) -> Tensor:
        """Features of the draft.

        The group norm takes its statistics over the whole clip, so this cannot be tiled. What
        follows can, and is in fp32, which is why `controls` begins with the norm of each token:
        features are kept in the dtype of the convolution, at half the size.

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

    def controls(self, features: Tensor, t: Tensor, dt: Tensor) -> dict[int, Tensor]:
        """What is added to the input of each controlled block at one step.

        Args:
            features: [S', D], all or some of what `features` gives.
            t: [1, freq_dim] sinusoid of the timestep.
            dt: [1, freq_dim] sinusoid of the step size.

        Returns:
            {block index: [S', D]}.
        """
        weight, bias = self.feature_norm.weight, self.feature_norm.bias
        normed = F.layer_norm(features.float(), features.shape[-1:], weight, bias, FEATURE_EPS)
        gain = run_mlp(self.adapter_time_proj, t) + run_mlp(self.adapter_dt_proj, dt)
        scaled = normed * (1 + gain.tanh())
        controls = {}
        for block, layer in self.zero_layers.items():
            assert isinstance(layer, nn.Linear)
            controls[int(block)] = project(layer, scaled)
        return controls
