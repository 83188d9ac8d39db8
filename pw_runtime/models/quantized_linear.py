# SPDX-License-Identifier: Apache-2.0
"""Blocks whose large linear layers have 8-bit or 4-bit weights: which, and how they are made.

An approximation: docs/numerics.md has the errors. The layers that see every token are quantized;
the keys and values of the text, which are computed once per prompt, and all norms and modulation
are not. Neither are the first and the last block, which is common practice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pw_kernels.quantized_linear import BLOCK, GRIDS, quantize_rows, quantized_linear
from pw_runtime.errors import BadRequest, BadWeights
from pw_runtime.types import DitConfig, LinearFormat, QuantizedFormat

# The quantized layers of a block.
QUANTIZED = (
    *(f"self_attn.{name}" for name in "qkvo"),
    *(f"cross_attn.{name}" for name in "qo"),
    "ffn.0",
    "ffn.2",
)


class QuantizedLinear(nn.Module):
    """A linear layer with a quantized weight, whose result has the dtype of its bias."""

    block_scale: nn.Parameter | None

    def __init__(self, layer: nn.Linear, linear: QuantizedFormat) -> None:
        """Prepare for the quantized weight of a layer, which `load_state_dict` will bring."""
        super().__init__()
        self.linear: QuantizedFormat = linear
        channels, width = layer.weight.shape
        shape = (channels, width // 2) if linear == "nvfp4" else (channels, width)
        self.weight = _parameter(torch.empty(shape, dtype=GRIDS[linear].dtype, device="meta"))
        self.scale = _parameter(torch.empty(channels, dtype=torch.float32, device="meta"))
        self.bias = layer.bias
        self.block_scale = None
        if linear == "nvfp4":
            scales = torch.empty(channels, width // BLOCK, dtype=torch.float8_e4m3fn, device="meta")
            self.block_scale = _parameter(scales)

    def forward(self, x: Tensor) -> Tensor:
        """[S, K] -> [S, N]."""
        return quantized_linear(
            x, self.weight, self.scale, self.bias, self.block_scale, self.linear
        )


def quantized_blocks(layers: int, linear: LinearFormat) -> range:
    """Return the blocks whose linear layers are quantized: all but the first and the last."""
    return range(0) if linear == "exact" else range(1, layers - 1)


def prepare_block(block: nn.Module, linear: QuantizedFormat) -> None:
    """Replace the large linear layers of a block by quantized ones, without weights."""
    for name in QUANTIZED:
        parent, _, child = name.rpartition(".")
        module = block.get_submodule(parent)
        layer = module.get_submodule(child)
        assert isinstance(layer, nn.Linear)
        module.register_module(child, QuantizedLinear(layer, linear))


def quantized_weights(
    name: str, weight: Tensor, linear: QuantizedFormat
) -> Iterator[tuple[str, Tensor]]:
    """Quantize the weight [N, K] of a layer; yield the names and tensors that replace it.

    Raises BadWeights for NaN and infinity, and where a channel's range is beyond fp32.
    """
    numbers, blocks, scale = quantize_rows(weight, linear)
    if not scale.isfinite().all():
        bad = int((~scale.isfinite()).nonzero()[0])
        raise BadWeights(
            f"{name} cannot be quantized to {linear}",
            got=f"NaN, infinity or numbers beyond fp32 in output channel {bad}",
            wanted="finite numbers",
            do="convert an intact checkpoint, or leave --linear out",
        )
    layer = name.removesuffix(".weight")
    yield name, numbers
    yield f"{layer}.scale", scale
    if blocks is not None:
        yield f"{layer}.block_scale", blocks


def is_quantized(name: str, layers: int, linear: LinearFormat) -> bool:
    """Tell whether a network's tensor of this name is a weight that is quantized."""
    parts = name.split(".", 2)
    return (
        len(parts) == 3
        and parts[0] == "blocks"
        and int(parts[1]) in quantized_blocks(layers, linear)
        and parts[2].removesuffix(".weight") in QUANTIZED
        and name.endswith(".weight")
    )


def require_quantizable(config: DitConfig, linear: LinearFormat) -> None:
    """Raise BadRequest for a network that has nothing to quantize, or not these widths."""
    if linear == "exact":
        return
    if not quantized_blocks(config.num_layers, linear):
        raise BadRequest(
            f"--linear {linear} would quantize nothing",
            got=f"a network of {config.num_layers} blocks, and the first and last stay as they are",
            do="leave --linear out",
        )
    if linear == "nvfp4" and (config.dim % BLOCK or config.ffn_dim % BLOCK):
        raise BadRequest(
            "--linear nvfp4 has blocks of 16 numbers",
            got=f"a network of width {config.dim}, feed-forward {config.ffn_dim}",
            wanted="multiples of 16",
            do="choose --linear int8, or leave it out",
        )


def approximation(layers: int, linear: QuantizedFormat) -> str:
    """Describe what is approximate, for receipts and messages."""
    blocks = quantized_blocks(layers, linear)
    return (
        f"approximate: {linear} linear layers in {len(blocks)} of {layers} blocks, "
        "not in the first and last"
    )


def _parameter(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)
