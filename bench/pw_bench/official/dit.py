# SPDX-License-Identifier: Apache-2.0
"""The official DiT forward, plain and unoptimised, over official key names.

Every call does what the official forward does in every call: a modulation row per token, the text
embedded anew, rotary factors built for every query and key and multiplied in complex128.

Shapes: L tokens in (t, h, w) order, D model width, H heads, K = D / H. One sample per call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Grid = tuple[int, int, int]
ADAPTER = "spatial_adapter."


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Embed timesteps [L] as [L, dim] fp32: cosines, then sines, computed in fp64."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=t.device) / half
    angles = t.double()[:, None] * 10000.0**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def rope_frequencies(positions: Tensor, dim: int) -> Tensor:
    """Turn positions [P] into unit complex numbers [P, dim / 2] (complex128) of one axis."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angles = positions.double()[:, None] * 10000.0**-exponents
    return torch.polar(torch.ones_like(angles), angles)


def rope_axes(grid: Grid, head_dim: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return the factors of every position along time, height, width: [size, pairs] each."""
    third = head_dim // 2 // 3
    widths = (head_dim - 4 * third, 2 * third, 2 * third)
    return tuple(
        rope_frequencies(torch.arange(size, device=device), width)
        for size, width in zip(grid, widths, strict=True)
    )


def rope_table(axes: tuple[Tensor, ...]) -> Tensor:
    """Return K / 2 unit complex numbers per token of the grid: time | height | width."""
    t, h, w = (len(axis) for axis in axes)
    time, rows, columns = axes
    spread = [
        time.view(t, 1, 1, -1).expand(t, h, w, -1),
        rows.view(1, h, 1, -1).expand(t, h, w, -1),
        columns.view(1, 1, w, -1).expand(t, h, w, -1),
    ]
    return torch.cat(spread, dim=-1).reshape(t * h * w, -1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the interleaved pairs of x [L, H, K] in complex128; rows past the table stay. fp32."""
    tokens = table.shape[0]
    pairs = torch.view_as_complex(x[:tokens].double().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * table[:, None]).flatten(-2)
    return torch.cat([turned, x[tokens:].double()]).float()


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention of q [Lq, H, K] over k and v [Lk, H, K]: [Lq, H, K]; fp32 inside."""
    scores = torch.einsum("qhc,khc->hqk", q.float(), k.float()) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khc->qhc", scores.softmax(dim=-1), v.float()).to(q.dtype)


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute the same by PyTorch's own kernel, in place of flash-attn, which needs CUDA."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


@dataclass(frozen=True)
class Weights:
    """Official tensors under the rounding rules of the official run.

    Without `bf16`, everything is fp32. With it, the casts are those of CUDA's bf16 autocast:
    parameters are held in bf16 (the adapter in fp32), `linear` takes and gives bf16, `linear_fp32`
    works in fp32 on the held values. A state that has these dtypes already is used as it is.
    """

    state: State
    config: Mapping[str, Any]
    bf16: bool = False
    attention: Attention = softmax_attention

    @property
    def low(self) -> torch.dtype:
        """Dtype of the inputs and outputs of matrix products."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def held(self, name: str) -> Tensor:
        """Return a parameter in the dtype that the official run keeps it in."""
        return self.state[name].to(torch.float32 if name.startswith(ADAPTER) else self.low)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Map x [.., in] to [.., out], in the low dtype."""
        weight, bias = self.held(f"{name}.weight"), self.held(f"{name}.bias")
        return F.linear(x.to(self.low), weight.to(self.low), bias.to(self.low))

    def linear_fp32(self, name: str, x: Tensor) -> Tensor:
        """Map x [.., in] to [.., out], in fp32."""
        return F.linear(
            x.float(), self.held(f"{name}.weight").float(), self.held(f"{name}.bias").float()
        )

    def conv(self, name: str, x: Tensor, stride: tuple[int, int, int], padding: int = 0) -> Tensor:
        """Apply a 3-D convolution to x [1, C, T, H, W], in the low dtype."""
        weight, bias = self.held(f"{name}.weight"), self.held(f"{name}.bias")
        return F.conv3d(
            x.to(self.low), weight.to(self.low), bias.to(self.low), stride=stride, padding=padding
        )

    def rms_norm(self, name: str, x: Tensor) -> Tensor:
        """Normalise over all channels jointly, rounding before and after the gain."""
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.config["eps"])
        return normed.to(x.dtype) * self.held(f"{name}.weight")

    def layer_norm(self, x: Tensor, affine: str | None = None) -> Tensor:
        """Normalise in fp32, rounded to the dtype of x."""
        gain = self.held(f"{affine}.weight").float() if affine else None
        shift = self.held(f"{affine}.bias").float() if affine else None
        return F.layer_norm(x.float(), x.shape[-1:], gain, shift, self.config["eps"]).to(x.dtype)

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Normalise, scale and shift token by token: all [L, D], in fp32."""
        return self.layer_norm(x).float() * (1 + scale) + shift

    def project(self, name: str, which: str, x: Tensor) -> Tensor:
        """Return q, k or v as [L, H, K]; q and k are RMS-normed over all D channels first."""
        y = self.linear(f"{name}.{which}", x)
        if which != "v":
            y = self.rms_norm(f"{name}.norm_{which}", y)
        heads: int = self.config["num_heads"]
        return y.view(y.shape[0], heads, -1)


def time_vectors(w: Weights, t: Tensor, dt: Tensor | None) -> tuple[Tensor, Tensor]:
    """Embed per-token t [L] and dt [L] as e [L, D] (for the head) and e0 [L, 6, D] (blocks)."""

    def embed(name: str, value: Tensor) -> Tensor:
        hidden = F.silu(w.linear_fp32(f"{name}.0", sinusoid(value, w.config["freq_dim"])))
        return w.linear_fp32(f"{name}.2", hidden)

    e = embed("time_embedding", t)
    if dt is not None:
        e = e + embed("dt_embedding", dt)
    return e, w.linear_fp32("time_projection.1", F.silu(e)).unflatten(-1, (6, -1))


def text_keys(w: Weights, context: Tensor) -> Tensor:
    """Zero-pad text rows [n, text_dim] to text_len rows and embed them: [text_len, D]."""
    padded = F.pad(context, (0, 0, 0, w.config["text_len"] - context.shape[0]))
    return w.linear(
        "text_embedding.2", F.gelu(w.linear("text_embedding.0", padded), approximate="tanh")
    )


def controls(w: Weights, condition: Tensor, t: Tensor, dt: Tensor) -> dict[int, Tensor]:
    """Apply the spatial adapter.

    Maps condition [1, C, T, h, w], t and dt [1] to {block index: [T*h*w, D]}.
    """
    name = f"{ADAPTER}backbone"
    x = w.conv(f"{name}.0", condition, (1, 1, 1)).float()
    x = F.silu(F.group_norm(x, 16, w.held(f"{name}.1.weight"), w.held(f"{name}.1.bias"), 1e-5))
    features = F.silu(w.conv(f"{name}.3", x, (1, 1, 1), padding=1)).flatten(2)[0].T.float()

    def project(which: str, value: Tensor) -> Tensor:
        hidden = F.silu(w.linear(f"{ADAPTER}{which}.0", sinusoid(value, w.config["freq_dim"])))
        return w.linear(f"{ADAPTER}{which}.2", hidden)

    gate = torch.tanh(project("adapter_time_proj", t) + project("adapter_dt_proj", dt))
    norm = f"{ADAPTER}feature_norm"
    gain, shift = w.held(f"{norm}.weight"), w.held(f"{norm}.bias")
    mixed = F.layer_norm(features, features.shape[-1:], gain, shift, 1e-6) * (1 + gate)
    layers = f"{ADAPTER}zero_layers."
    indices = {int(key[len(layers) :].split(".")[0]) for key in w.state if key.startswith(layers)}
    return {index: w.linear(f"{layers}{index}", mixed) for index in sorted(indices)}


def block(
    w: Weights, index: int, x: Tensor, e0: Tensor, text: Tensor, axes: tuple[Tensor, ...]
) -> Tensor:
    """Apply one transformer block to x [L, D]; keys past the grid are padding, not attended."""
    name, tokens = f"blocks.{index}", math.prod(map(len, axes))
    m = (w.held(f"{name}.modulation").float() + e0).unbind(dim=1)

    a = w.modulated(x, m[0], m[1])
    attn = f"{name}.self_attn"
    q = rotate(w.project(attn, "q", a), rope_table(axes)).to(w.low)
    k = rotate(w.project(attn, "k", a), rope_table(axes)).to(w.low)
    y = w.attention(q, k[:tokens], w.project(attn, "v", a)[:tokens])
    x = x + w.linear(f"{attn}.o", y.flatten(1)) * m[2]

    attn = f"{name}.cross_attn"
    q = w.project(attn, "q", w.layer_norm(x, f"{name}.norm3"))
    y = w.attention(q, w.project(attn, "k", text), w.project(attn, "v", text))
    x = x + w.linear(f"{attn}.o", y.flatten(1))

    a = w.modulated(x, m[3], m[4])
    hidden = F.gelu(w.linear(f"{name}.ffn.0", a), approximate="tanh")
    return x + w.linear(f"{name}.ffn.2", hidden) * m[5]


def unpatchify(tokens: Tensor, grid: Grid) -> Tensor:
    """Turn rows [T*h*w, 4*C], whose channel runs fastest, into [C, T, 2h, 2w]."""
    t, h, w = grid
    return tokens.view(t, h, w, 2, 2, -1).permute(5, 0, 1, 3, 2, 4).reshape(-1, t, 2 * h, 2 * w)


def forward(
    state: State,
    config: Mapping[str, Any],
    x: Tensor,
    t: Tensor,
    context: Tensor,
    *,
    dt: Tensor | None = None,
    condition: Tensor | None = None,
    seq_len: int | None = None,
    bf16: bool = False,
    attention: Attention = softmax_attention,
    trace: dict[str, Tensor] | None = None,
) -> Tensor:
    """Predict the velocity of latent x [C, T, 2h, 2w]; same shape, fp32.

    t (and dt) is [1] or one value per token [seq_len]; context is the real text rows [n, text_dim];
    condition [1, C, T, h, w] switches the spatial adapter on. trace collects `control<i>` and
    `block<i>`, each [L, D].
    """
    w = Weights(state, config, bf16, attention)
    patches = w.conv("patch_embedding", x[None], (1, 2, 2))[0]
    grid = (patches.shape[1], patches.shape[2], patches.shape[3])
    rows = patches.flatten(1).T
    tokens = rows.shape[0]
    length = seq_len or tokens
    rows = torch.cat([rows, rows.new_zeros(length - tokens, rows.shape[1])])
    e, e0 = time_vectors(w, t.expand(length), None if dt is None else dt.expand(length))
    text = text_keys(w, context)
    added: dict[int, Tensor] = {}
    if condition is not None:
        if dt is None or tuple(condition.shape[2:]) != grid:
            raise ValueError(f"condition {tuple(condition.shape)} needs dt and the grid {grid}")
        added = controls(w, condition, t[:1], dt[:1])
    axes = rope_axes(grid, config["dim"] // config["num_heads"], x.device)
    for index in range(config["num_layers"]):
        if index in added:
            rows = rows + added[index]
            if trace is not None:
                trace[f"control{index}"] = added[index]
        rows = block(w, index, rows, e0, text, axes)
        if trace is not None:
            trace[f"block{index}"] = rows
    shift, scale = (w.held("head.modulation").float() + e[:, None]).unbind(dim=1)
    out = w.linear_fp32("head.head", w.modulated(rows, shift, scale))
    return unpatchify(out[:tokens], grid).float()
