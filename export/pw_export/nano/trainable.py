# SPDX-License-Identifier: Apache-2.0
"""Differentiable forward passes of the runtime's transformers, on batches.

Modules and weights are those of pw_runtime.models. Only the order of the calls is repeated here,
because the runtime overwrites activations that a backward pass needs; tests compare the two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pw_kernels import norm_modulate
from pw_kernels.qk_norm_rope import angles_of_tokens
from pw_runtime.models.blocks import Block
from pw_runtime.models.dit import WanDiT
from pw_runtime.models.embeddings import (
    patchify,
    project,
    rope_tables,
    run_mlp,
    sinusoid,
    unpatchify,
)
from pw_runtime.models.text_encoder import TextEncoder
from pw_runtime.types import PATCH


def encode_texts(encoder: TextEncoder, ids: Tensor, mask: Tensor) -> Tensor:
    """Encode token ids [B, E] with a mask [B, E]: contexts [B, E, text_dim], 0 where masked."""
    return encoder(ids, mask.bool()) * mask[..., None]


def velocities(
    net: WanDiT,
    latents: Tensor,
    t: Tensor,
    contexts: Tensor,
    dt: Tensor | None = None,
    drafts: Tensor | None = None,
) -> Tensor:
    """Predict the velocities of noisy latents, each with its own text and time.

    Args:
        net: draft or high-res network, in fp32.
        latents: [B, C, T, H, W].
        t: [B] timesteps, in thousandths; or [B, T], for the draft network only: of each frame.
        contexts: [B, text_len, text_dim], zero rows after each text.
        dt: [B] step sizes, for the high-res network only.
        drafts: [B, C, T, H/2, W/2] resized draft latents, for the high-res network only.

    Returns:
        [B, C, T, H, W].
    """
    batch, _, frames, height, width = latents.shape
    grid = (frames, height // PATCH, width // PATCH)
    steps = [sinusoid(x.flatten(), net.config.freq_dim) for x in (t, dt) if x is not None]
    modulation = net.block_rows(*net.time_rows(*steps))
    x = net.embed(patchify(latents.transpose(0, 1).flatten(1, 2))).unflatten(0, (batch, -1))
    tables = rope_tables(max(grid), net.config.head_dim, x.device)
    origin = torch.tensor([0, *grid[1:]], device=x.device)
    cos, sin = (angles_of_tokens(table, origin, x.shape[1]) for table in tables)
    text = net.embed_text(contexts)
    control = () if drafts is None else _control(net, drafts, steps)
    added = dict(zip(net.config.control_blocks, control, strict=True))
    for index, block in enumerate(net.blocks):
        assert isinstance(block, Block)
        if index in added:
            x = x + added[index]
        x = run_block(block, x, modulation.blocks[index], cos, sin, text)
    out = unpatchify(net.head(x.flatten(0, 1), modulation.head), (batch * frames, *grid[1:]))
    return out.unflatten(1, (batch, frames)).transpose(0, 1)


def _control(net: WanDiT, drafts: Tensor, steps: list[Tensor]) -> tuple[Tensor, ...]:
    """Compute [B, S, D] for each controlled block; `steps` are sinusoids of t and dt."""
    adapter = net.spatial_adapter
    x = F.silu(adapter.backbone["1"](adapter.backbone["0"](drafts)))
    features = F.silu(adapter.backbone["3"](x)).flatten(2).mT  # [B, S, D]
    t, dt = (step[:, None] for step in steps)
    return adapter.control(features, t, dt)


def _block(block: Block, x: Tensor, rows: Tensor, cos: Tensor, sin: Tensor, text: Tensor) -> Tensor:
    """Run a block on tokens [B, S, D] with rows [B R, 6, D], R dividing S, and texts [B, E, D]."""
    shift1, scale1, gate1, shift2, scale2, gate2 = rows.unbind(1)
    attention, cross, norm3 = block.self_attn, block.cross_attn, block.norm3
    h = _modulated(x, shift1, scale1, block.eps)
    q = _rotated(attention.queries(h), cos, sin)
    k, v = attention.keys_values(h)
    y = _attend(q, _rotated(k, cos, sin), v)
    x = x + _gated(project(attention.o, y), gate1)
    h = F.layer_norm(x, x.shape[-1:], norm3.weight, norm3.bias, block.eps)
    y = _attend(cross.queries(h), *cross.keys_values(text))
    x = x + project(cross.o, y)
    h = _modulated(x, shift2, scale2, block.eps)
    return x + _gated(run_mlp(block.ffn, h), gate2)


run_block = _block


def compile_blocks() -> None:
    """Compile the blocks: a training takes a quarter less time. Needs a C++ compiler on a CPU."""
    global run_block
    torch._dynamo.config.recompile_limit = 64  # one graph a size of batch
    run_block = torch.compile(_block, dynamic=False)


def _gated(y: Tensor, gate: Tensor) -> Tensor:
    """Multiply tokens [B, S, D] with the gates [B R, D] of their frames."""
    return (y.flatten(0, 1).unflatten(0, (len(gate), -1)) * gate[:, None]).view_as(y)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return norm_modulate(x.flatten(0, 1), shift, scale, eps, x.dtype).view_as(x)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs of x [B, S, N, K] by the angles of the tokens, [S, K/2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with q [B, S, N, K] and k, v [B, S', N, K]; merge heads, [B, S, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
