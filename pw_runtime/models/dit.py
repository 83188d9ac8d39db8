# SPDX-License-Identifier: Apache-2.0
"""The Wan2.2-TI2V-5B transformer, as the draft network and as PixelWizard's high-res network.

Everything costly that stays constant in part of the sampling loop has a method of its own, so that
the caller computes it once: text keys and values per prompt, positions and adapter features per
clip, modulation rows and the adapter's control per step. Source: wan/modules/model.py and
hr_model.py; docs/numerics.md lists the dtypes.
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
from pw_runtime.models.quantized_linear import prepare_block, quantized_blocks
from pw_runtime.types import PATCH, DitConfig, LinearFormat, QuantizedFormat


@dataclass(frozen=True, slots=True)
class Modulation:
    """Shift, scale and gate rows of one step, with the tables of the blocks added."""

    blocks: Tensor  # [layers, R, 6, D] fp32
    head: Tensor  # [R, 2, D] fp32


class Head(nn.Module):
    """Final norm, modulation and projection to latent patches, all in fp32."""

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
        self.linear: LinearFormat = "exact"

    def prepare_quantized(self, linear: QuantizedFormat) -> None:
        """Replace the large linear layers by quantized ones, whose weights must then be loaded."""
        for index in quantized_blocks(self.config.num_layers, linear):
            prepare_block(self.blocks[index], linear)
        self.linear = linear

    def text_keys_values(self, context: Tensor) -> tuple[TextKeysValues, ...]:
        """Compute the keys and values of every block's cross-attention for one prompt.

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
        """Pad a text with the few zero rows that stand for all padding.

        Args:
            context: [E, text_dim].

        Returns:
            [E', text_dim] and the logit biases [E'], both in the dtype of the network's weights.
        """
        dtype = self.patch_embedding.weight.dtype
        biases = pad_biases(self.config.text_len - context.shape[0], dtype)
        bias = context.new_zeros(len(context) + len(biases), dtype=dtype)
        if biases:
            bias[-len(biases) :] = bias.new_tensor(biases)
        return F.pad(context.to(dtype), (0, 0, 0, len(biases))), bias

    def embed_text(self, context: Tensor) -> Tensor:
        """Project text rows, [E', text_dim] -> [E', D]."""
        return run_mlp(self.text_embedding, context)

    def modulation(self, t: Tensor, dt: Tensor | None = None) -> Modulation:
        """Compute all rows of one step.

        Args:
            t: [R] timestep, in thousandths; R is 1 for text-to-video, or the number of latent
                frames where each has its own.
            dt: [R] step size in thousandths, for the high-res network only.

        Returns:
            Rows with the table of every block added.

        Raises:
            ValueError: dt is given to a network without dt, or missing for one with it.
        """
        if (dt is not None) != self.config.has_dt:
            raise ValueError(f"has_dt is {self.config.has_dt} but dt is {dt}")
        freq_dim = self.config.freq_dim
        steps = (sinusoid(x, freq_dim) for x in (t, dt) if x is not None)
        return self.block_rows(*self.time_rows(*steps))

    def time_rows(self, t: Tensor, dt: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed [R, freq_dim] sinusoids of timestep and step size: [R, 6, D] and [R, D], fp32."""
        e = run_mlp(self.time_embedding, t)  # [R, D]
        if dt is not None:
            e = e + run_mlp(self.dt_embedding, dt)
        activation, projection = self.time_projection
        assert isinstance(projection, nn.Linear)
        return project(projection, activation(e)).unflatten(1, (6, -1)), e

    def block_rows(self, rows: Tensor, e: Tensor) -> Modulation:
        """Add the tables of every block and of the head to the results of `time_rows`."""
        tables = torch.stack([block.modulation for block in self._blocks()])  # [layers, 1, 6, D]
        return Modulation(blocks=tables + rows, head=self.head.modulation + e[:, None])

    def positions(self, latent: Tensor) -> Positions:
        """Compute the rotary positions for latents of this shape, on this latent's device.

        Args:
            latent: [C, T, H, W], H and W even.
        """
        grid = _token_grid(latent)
        tables = rope_tables(max(grid), self.config.head_dim, latent.device)
        return Positions(grid, *tables, torch.tensor([0, *grid[1:]], device=latent.device))

    def draft_features(self, draft: Tensor) -> Tensor:
        """Compute a clip's control features: [C, T, H/2, W/2] resized draft latent -> [S, D]."""
        return self.spatial_adapter.control_features(draft)

    def control(self, features: Tensor, t: Tensor, dt: Tensor) -> tuple[Tensor, ...]:
        """Compute the control of one step; see `SpatialAdapter.control`."""
        return self.spatial_adapter.control(features, t, dt)

    def forward(
        self,
        latent: Tensor,
        text: tuple[TextKeysValues, ...],
        modulation: Modulation,
        positions: Positions,
        control: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """Predict the velocity of a noisy latent.

        Args:
            latent: [C, T, H, W] fp32, H and W even.
            text: from `text_keys_values`.
            modulation: from `modulation`; R is 1 or T.
            positions: from `positions`, of a latent of this shape.
            control: from `control`, for the high-res network only.

        Returns:
            [C, T, H, W] fp32.

        Raises:
            ValueError: the control is missing for the high-res network or given to the draft
                network; the positions are those of another token grid.
        """
        if (control is not None) != bool(self.config.adapter_dim):
            raise ValueError("the high-res network needs a control, the draft network takes none")
        blocks = self.config.control_blocks
        added = {} if control is None else dict(zip(blocks, control, strict=True))
        grid = _token_grid(latent)
        if positions.grid != grid:
            raise ValueError(
                f"the latent has the token grid {grid}, the positions {positions.grid}"
            )
        x = self.embed(patchify(latent))  # [S, D]
        for index, block in enumerate(self.blocks):
            if index in added:
                x = x + added[index]
            x = block(x, modulation.blocks[index], positions, text[index])
        return unpatchify(self.head(x, modulation.head), grid).float()

    def embed(self, patches: Tensor) -> Tensor:
        """Embed [S, 4C] patches -> [S, D]; kernel equals stride, so it is a matrix product."""
        weight = self.patch_embedding.weight
        return F.linear(patches.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]


def _token_grid(latent: Tensor) -> tuple[int, int, int]:
    """Return the token grid (T, H/2, W/2) of a latent [C, T, H, W]."""
    _, t, h, w = latent.shape
    return t, h // PATCH, w // PATCH
