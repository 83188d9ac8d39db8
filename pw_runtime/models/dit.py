# SPDX-License-Identifier: Apache-2.0
"""The Wan2.2-TI2V-5B transformer, as the draft network and as PixelWizard's high-res network.

What costs something and does not change inside the sampling loop is a method of its own, so that
the caller computes it once: text keys and values per prompt, modulation rows per step, positions
and adapter features per clip. Source: wan/modules/model.py and hr_model.py; docs/numerics.md has
the dtypes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pw_kernels import norm_modulate
from pw_runtime.models.adapter import SpatialAdapter
from pw_runtime.models.blocks import Block, TextKeysValues, pad_biases
from pw_runtime.models.embeddings import (
    Positions,
    mlp,
    patchify,
    project,
    rope_tables,
    run_mlp,
    sinusoid,
    unpatchify,
)
from pw_runtime.types import PATCH, DitConfig


@dataclass(frozen=True, slots=True)
class Modulation:
    """Scale, shift and gate rows of one step, block tables included."""

    blocks: Tensor  # [layers, R, 6, D] fp32
    head: Tensor  # [R, 2, D] fp32


class Head(nn.Module):
    """Final norm, modulation and projection to latent patches, all fp32."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, config.out_dim * PATCH * PATCH)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """[S, D] and [R, 2, D] -> [S, 4 C]."""
        shift, scale = rows.unbind(1)
        return project(self.head, norm_modulate(x, shift, scale, self.eps, torch.float32))


class WanDiT(nn.Module):
    """Velocity prediction. Parameter names are those of the official checkpoint."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        patch = (1, PATCH, PATCH)
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, kernel_size=patch, stride=patch)
        self.text_embedding = mlp(config.text_dim, dim, nn.GELU(approximate="tanh"))
        self.time_embedding = mlp(config.freq_dim, dim, nn.SiLU())
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        if config.has_dt:
            self.dt_embedding = mlp(config.freq_dim, dim, nn.SiLU())
        if config.adapter_dim:
            self.spatial_adapter = SpatialAdapter(config)

    def text_keys_values(self, context: Tensor) -> tuple[TextKeysValues, ...]:
        """Keys and values of every block's cross-attention for one prompt.

        Args:
            context: [E, text_dim] text-encoder output, 0 < E <= text_len.

        Returns:
            One entry per block.
        """
        context, bias = self.padded_text(context)
        embedded = self.embed_text(context)
        return tuple(
            TextKeysValues(*block.cross_attn.keys_values(embedded), bias)
            for block in self._blocks()
        )

    def padded_text(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """[E, text_dim] -> [E', text_dim] with a few zero rows for all padding, [E'] logit biases.

        Both in the dtype of the network's weights.
        """
        dtype = self.patch_embedding.weight.dtype
        biases = pad_biases(self.config.text_len - context.shape[0], dtype)
        bias = context.new_zeros(len(context) + len(biases), dtype=dtype)
        if biases:
            bias[-len(biases) :] = bias.new_tensor(biases)
        return F.pad(context.to(dtype), (0, 0, 0, len(biases))), bias

    def embed_text(self, context: Tensor) -> Tensor:
        """[E', text_dim] -> [E', D]."""
        return run_mlp(self.text_embedding, context)

    def modulation(self, t: Tensor, dt: Tensor | None = None) -> Modulation:
        """All rows of one step: one for text-to-video, one per latent frame where t differs.

        Args:
            t: [R] timestep, in thousandths.
            dt: [R] step size, wanted by the high-res network and by no other.

        Returns:
            Rows with every block's own table added.

        Raises:
            ValueError: dt is there and not wanted, or the other way round.
        """
        if (dt is not None) != self.config.has_dt:
            raise ValueError(f"has_dt is {self.config.has_dt} but dt is {dt}")
        freq_dim = self.config.freq_dim
        steps = (sinusoid(x, freq_dim) for x in (t, dt) if x is not None)
        return self.block_rows(*self.time_rows(*steps))

    def time_rows(self, t: Tensor, dt: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[R, freq_dim] sinusoids of timestep and step size -> [R, 6, D] and [R, D], fp32."""
        e = run_mlp(self.time_embedding, t)  # [R, D]
        if dt is not None:
            e = e + run_mlp(self.dt_embedding, dt)
        activation, projection = self.time_projection
        assert isinstance(projection, nn.Linear)
        return project(projection, activation(e)).unflatten(1, (6, -1)), e

    def block_rows(self, rows: Tensor, e: Tensor) -> Modulation:
        """Add the table of every block, and the head's, to what `time_rows` gives."""
        tables = torch.stack([block.modulation for block in self._blocks()])  # [layers, 1, 6, D]
        return Modulation(blocks=tables + rows, head=self.head.modulation + e[:, None])

    def positions(self, latent: Tensor) -> Positions:
        """Rotary positions of the tokens of latents of this one's shape, on its device.

        Args:
            latent: [C, T, H, W], H and W even.
        """
        grid = _token_grid(latent)
        tables = rope_tables(max(grid), self.config.head_dim, latent.device)
        return Positions(grid, *tables, torch.tensor([0, *grid[1:]], device=latent.device))

    def draft_features(self, draft: Tensor) -> Tensor:
        """Adapter features of a clip: [C, T, H/2, W/2] resized draft latent -> [S, D]."""
        return self.spatial_adapter.features(draft)

    def controls(self, features: Tensor, t: Tensor, dt: Tensor) -> dict[int, Tensor]:
        """Adapter controls of one step: {block: [S, D]}, from `draft_features`, t [1], dt [1]."""
        freq_dim = self.config.freq_dim
        return self.spatial_adapter.controls(
            features, sinusoid(t, freq_dim), sinusoid(dt, freq_dim)
        )

    def control(self, features: Tensor, t: Tensor, dt: Tensor) -> tuple[Tensor, ...]:
        """The adapter's controls of one step in the order of its blocks, for part of the tokens.

        Args:
            features: [S', D] of `draft_features`.
            t: [1, freq_dim] sinusoid of the timestep.
            dt: [1, freq_dim] sinusoid of the step size.

        Returns:
            [S', D] each.
        """
        return (*self.spatial_adapter.controls(features, t, dt).values(),)

    def forward(
        self,
        latent: Tensor,
        text: tuple[TextKeysValues, ...],
        modulation: Modulation,
        positions: Positions,
        controls: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Predict the velocity of a noisy latent.

        Args:
            latent: [C, T, H, W] fp32, H and W even.
            text: from `text_keys_values`.
            modulation: from `modulation`; R is 1 or T.
            positions: from `positions`, of a latent of this shape.
            controls: from `controls`, for the high-res network.

        Returns:
            [C, T, H, W] fp32.

        Raises:
            ValueError: controls are there and not wanted, or the other way round; positions are
                of another grid.
        """
        if (controls is not None) != bool(self.config.adapter_dim):
            raise ValueError("the high-res network needs controls, the draft network none")
        grid = _token_grid(latent)
        if positions.grid != grid:
            raise ValueError(f"the latent has the token grid {grid}, positions {positions.grid}")
        x = self.embed(patchify(latent))  # [S, D]
        for index, block in enumerate(self.blocks):
            if controls is not None and index in controls:
                x = x + controls[index]
            x = block(x, modulation.blocks[index], positions, text[index])
        return unpatchify(self.head(x, modulation.head), grid).float()

    def embed(self, patches: Tensor) -> Tensor:
        """[S, 4C] patches -> [S, D]: a kernel equal to its stride is a matrix product."""
        weight = self.patch_embedding.weight
        return F.linear(patches.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]


def _token_grid(latent: Tensor) -> tuple[int, int, int]:
    """[C, T, H, W] -> (T, H/2, W/2)."""
    _, t, h, w = latent.shape
    return t, h // PATCH, w // PATCH
