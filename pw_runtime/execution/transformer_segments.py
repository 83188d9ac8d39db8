# SPDX-License-Identifier: Apache-2.0
"""The transformer divided into segments, each of which is compiled once for all resolutions.

Everything in a Wan network but self-attention works token by token, so a segment takes any slice of
a clip's tokens, up to a limit. Two other divisions have engines for self-attention too, which take
all tokens at once: `attention`, between the same segments, and `block`, a whole block.

Weights are inputs: one engine of a segment serves all blocks, and every checkpoint of these widths.
A segment calls the methods of the network itself. The adapter's
backbone is not among them: it does not work by tokens, and runs once per clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import pw_kernels
from pw_engines import DTYPES, DType, EngineSpec, TensorSpec, digest_of, dtype_name
from pw_runtime import models
from pw_runtime.models import WanDiT
from pw_runtime.models.blocks import TextKeysValues
from pw_runtime.models.embeddings import Positions
from pw_runtime.models.precision import store_dit_weight
from pw_runtime.models.quantized_linear import prepare_block, quantized_blocks
from pw_runtime.types import PATCH, Blocks, DitConfig, LinearFormat, Precision

POSITIONS = 1024  # rows of the rotary tables that engines take: the longest side of a token grid
TEXT_PADDING = 8  # keys beyond text_len, for those that represent the padding
# Segments that every step runs once per block, as the block is divided.
BLOCK_PARTS = ("block_in", "block_out", "block")
FIRST_BLOCK = "blocks.0."  # prefix of the names of a block's weights, for any block
# Segments with the self-attention, whose limit is all tokens of a clip.
WITH_ATTENTION: Final = ("attention", "block", "block_first")
# Upper bound for the attention output buffer; above it, attention runs over groups of heads.
ATTENTION_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a network: what an engine of it computes, and how to compute it without one."""

    spec: EngineSpec
    module: nn.Module  # takes the spec's inputs, returns a tuple of its outputs
    weights: tuple[str, ...]  # names in the network of the last inputs, a block's as FIRST_BLOCK

    @property
    def name(self) -> str:
        """The name in the spec."""
        return self.spec.segment


@dataclass(frozen=True, slots=True, kw_only=True)
class _Definition:
    """A segment of a transformer, without its weights."""

    name: str
    compute: Callable[..., Tensor | tuple[Tensor, ...]]  # (network, *inputs) -> outputs
    weights: tuple[str, ...]  # prefixes of the names of the weights that it takes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def segments_of(
    config: DitConfig,
    precision: Precision,
    limit: int,
    linear: LinearFormat = "exact",
    *,
    blocks: Blocks = "segments",
    tokens: int = 0,
) -> dict[str, Segment]:
    """Return every segment of a network by name.

    With quantized linear layers, `block_in` and `block_out` of the first and the last block are
    joined by those of the other blocks.

    Args:
        config: of the network; the number of blocks does not matter.
        precision: of its weights.
        limit: most tokens per call.
        linear: format of the large linear layers.
        blocks: how a block is divided.
        tokens: all tokens of a clip, which WITH_ATTENTION take in one call.
    """
    net = _network_without_weights(config, precision)
    quantized = net
    if linear != "exact":
        quantized = _network_without_weights(config, precision)
        prepare_block(quantized.blocks[0], linear)
    segments = {}
    for definition in _divided(_definitions(config, precision), config, blocks, tokens):
        most = tokens if definition.name in WITH_ATTENTION else limit
        limits = (("tokens", most), ("text", config.text_len + TEXT_PADDING))
        segments[definition.name] = _segment(definition, net, limits)
        if linear != "exact" and definition.name in BLOCK_PARTS:
            named = replace(definition, name=quantized_name(definition.name, linear))
            segments[named.name] = _segment(named, quantized, limits)
    return segments


def segment_of_block(net: WanDiT, part: str, block: int) -> str:
    """Return the name of the segment that computes a part of a block; other names unchanged."""
    quantized = block in quantized_blocks(net.config.num_layers, net.linear)
    return quantized_name(part, net.linear) if quantized and part in BLOCK_PARTS else part


def quantized_name(part: str, linear: LinearFormat) -> str:
    """Return the name of a part of a block whose linear layers have a format."""
    return part if linear == "exact" else f"{part}_{linear.replace('-', '_')}"


def _divided(
    definitions: list[_Definition], config: DitConfig, blocks: Blocks, tokens: int
) -> list[_Definition]:
    """Return the definitions for a division of the block, from those of its segments."""
    if blocks == "segments":
        return definitions
    by_name = {definition.name: definition for definition in definitions}
    before, after = by_name["block_in"], by_name["block_out"]
    if blocks == "attention":
        low = before.outputs[0].dtype
        heads = heads_at_once(tokens, config.num_heads, config.head_dim, DTYPES[low].itemsize)
        # Heads before tokens: the only order that TensorRT for RTX has kernels for.
        shape = (1, heads, "tokens", config.head_dim)
        attention = _Definition(
            name="attention",
            compute=lambda net, *qkv: F.scaled_dot_product_attention(*qkv),
            weights=(),
            inputs=tuple(_tensor(name, low, *shape) for name in "qkv"),
            outputs=(_tensor("y", low, *shape),),
        )
        return [*definitions, attention]
    block = _Definition(
        name="block",
        compute=_whole_block,
        weights=before.weights + after.weights,
        inputs=(*before.inputs, *after.inputs[3:]),
        outputs=after.outputs,
    )
    whole = [block]
    if first := by_name.get("block_in_first"):
        inputs = (first.inputs[0], *block.inputs[1:])
        whole.append(replace(block, name="block_first", inputs=inputs))
    parts = ("block_in", "block_in_first", "block_out")
    return [*(x for x in definitions if x.name not in parts), *whole]


def _whole_block(
    net: WanDiT,
    x: Tensor,
    rows: Tensor,
    cos: Tensor,
    sin: Tensor,
    origin: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
) -> Tensor:
    """Run a block; it overwrites x, which an engine must leave unchanged."""
    positions = Positions((0, 0, 0), cos, sin, origin)  # the grid is in the origin
    result: Tensor = net.blocks[0](x.clone(), rows, positions, TextKeysValues(keys, values, bias))
    return result


def heads_at_once(tokens: int, heads: int, width: int, itemsize: int) -> int:
    """Return how many heads attention runs over at a time: the largest equal groups that fit."""
    most = max(1, ATTENTION_BYTES // (tokens * width * itemsize))
    return max(size for size in range(1, heads + 1) if heads % size == 0 and size <= most)


def _definitions(config: DitConfig, precision: Precision) -> list[_Definition]:
    """List the segments of a network."""
    low: DType = "fp32" if precision == "fp32" else "bf16"
    dim, heads = config.dim, (config.num_heads, config.head_dim)
    patch = PATCH * PATCH
    x, rows = _tokens("x", "fp32", dim), _tensor("rows", "fp32", 1, 6, dim)
    first_x = _tokens("x", low, dim)  # from the embedding; block 0 alone norms it in bf16
    table = (POSITIONS, config.head_dim // 2)
    rope = (
        _tensor("cos", "fp32", *table),
        _tensor("sin", "fp32", *table),
        _tensor("origin", "int64", 3),
    )
    qkv = tuple(_tokens(name, low, *heads) for name in "qkv")
    keys = (_tensor("keys", low, "text", *heads), _tensor("values", low, "text", *heads))
    embedded = ("text", dim)
    steps = ("t", "dt") if config.has_dt else ("t",)
    time = tuple(_tensor(name, "fp32", 1, config.freq_dim) for name in steps)
    self_attn, cross_attn = FIRST_BLOCK + "self_attn.", FIRST_BLOCK + "cross_attn."
    block_in = _Definition(
        name="block_in",
        compute=lambda net, *inputs: net.blocks[0].before_attention(*inputs),
        weights=tuple(self_attn + name for name in ("q.", "k.", "v.", "norm_q.", "norm_k.")),
        inputs=(x, rows, *rope),
        outputs=qkv,
    )
    definitions = [
        _Definition(
            name="embed",
            compute=WanDiT.embed,
            weights=("patch_embedding.",),
            inputs=(_tokens("patches", "fp32", config.in_dim * patch),),
            outputs=(first_x,),
        ),
        block_in,
        _Definition(
            name="block_out",
            # It overwrites x, which an engine must leave unchanged.
            compute=lambda net, x, *rest: net.blocks[0].after_attention(x.clone(), *rest),
            weights=(
                *(self_attn + "o.", FIRST_BLOCK + "norm3.", FIRST_BLOCK + "ffn."),
                *(cross_attn + name for name in ("q.", "norm_q.", "o.")),
            ),
            inputs=(x, _tokens("y", low, *heads), rows, *keys, _tensor("bias", low, "text")),
            outputs=(_tokens("out", "fp32", dim),),
        ),
        _Definition(
            name="head",
            compute=lambda net, *inputs: net.head(*inputs),
            weights=("head.head.",),
            inputs=(x, _tensor("rows", "fp32", 1, 2, dim)),
            outputs=(_tokens("out", "fp32", config.out_dim * patch),),
        ),
        _Definition(
            name="text_embed",
            compute=WanDiT.embed_text,
            weights=("text_embedding.",),
            inputs=(_tensor("context", low, "text", config.text_dim),),
            outputs=(_tensor("out", low, *embedded),),
        ),
        _Definition(
            name="text_keys_values",
            compute=lambda net, context: net.blocks[0].cross_attn.keys_values(context),
            weights=tuple(cross_attn + name for name in ("k.", "v.", "norm_k.")),
            inputs=(_tensor("x", low, *embedded),),
            outputs=keys,
        ),
        _Definition(
            name="modulation",
            compute=WanDiT.time_rows,
            weights=("time_embedding.", "time_projection.", "dt_embedding."),
            inputs=time,
            outputs=(_tensor("rows", "fp32", 1, 6, dim), _tensor("e", "fp32", 1, dim)),
        ),
    ]
    if low != "fp32":
        first = replace(block_in, name="block_in_first", inputs=(first_x, rows, *rope))
        definitions.append(first)
    if config.adapter_dim:
        parts = ("feature_norm.", "adapter_", "zero_layers.")
        definitions.append(
            _Definition(
                name="control",
                compute=WanDiT.control,
                weights=tuple(f"spatial_adapter.{name}" for name in parts),
                inputs=(_tokens("features", low, dim), *time),
                outputs=tuple(
                    _tokens(f"control{block}", low, dim) for block in config.control_blocks
                ),
            )
        )
    return definitions


def _tensor(name: str, dtype: DType, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def _tokens(name: str, dtype: DType, *shape: int) -> TensorSpec:
    return _tensor(name, dtype, "tokens", *shape)


def _network_without_weights(config: DitConfig, precision: Precision) -> WanDiT:
    """Return a network on the meta device with as few blocks as have all kinds of weights."""
    layers = 1 + max(config.control_blocks, default=0)
    with torch.device("meta"):
        net = WanDiT(replace(config, num_layers=layers))
    stored = {
        name: store_dit_weight(name, weight, precision) for name, weight in net.state_dict().items()
    }
    net.load_state_dict(stored, assign=True)
    return net.requires_grad_(False)


def _segment(definition: _Definition, net: WanDiT, limits: Iterable[tuple[str, int]]) -> Segment:
    """Return the segment of a definition, with its weights as further inputs."""
    stored = net.state_dict()
    names = tuple(name for name in stored if name.startswith(definition.weights))
    weights = tuple(
        _tensor(name, dtype_name(stored[name].dtype), *stored[name].shape) for name in names
    )
    tensors = (*definition.inputs, *definition.outputs)
    varying = {dim for tensor in tensors for dim in tensor.shape if isinstance(dim, str)}
    spec = EngineSpec(
        segment=definition.name,
        inputs=definition.inputs + weights,
        outputs=definition.outputs,
        limits=tuple(limit for limit in limits if limit[0] in varying),
        sources=source_digest(),
        numbers=(("eps", net.config.eps),),
    )
    return Segment(spec, WithWeights(Computation(net, definition.compute), names), names)


class Computation(nn.Module):
    """Calls a function of a network and its inputs."""

    def __init__(self, net: nn.Module, compute: Callable[..., object]) -> None:
        super().__init__()
        self.net, self._compute = net, compute

    def forward(self, *inputs: Tensor) -> object:
        """Return what the function returns."""
        return self._compute(self.net, *inputs)


class WithWeights(nn.Module):
    """Calls a computation whose network has no weights: they are its last inputs, or baked in."""

    def __init__(
        self,
        computation: Computation,
        names: Sequence[str],
        restore: Callable[[str, Tensor], Tensor] = lambda name, weight: weight,
        baked: Sequence[Tensor] | None = None,
    ) -> None:
        """Call `computation` with weights.

        Args:
            computation: of a network on any device.
            names: of the weights in the network.
            restore: turns an input into the weight of a name.
            baked: the weights themselves, where they are part of this module and no inputs.
        """
        super().__init__()
        self._computation = [computation]  # in a list: its weights are not this module's
        self._names, self._restore, self._baked = tuple(names), restore, baked is not None
        for index, weight in enumerate(baked or ()):
            self.register_buffer(f"weight{index}", weight)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Map activations, then weights unless these are baked in, to outputs."""
        weights = list(self.buffers())
        if not self._baked:
            count = len(inputs) - len(self._names)
            given = zip(self._names, inputs[count:], strict=True)
            weights = [self._restore(name, weight) for name, weight in given]
            inputs = inputs[:count]
        named = {f"net.{name}": weight for name, weight in zip(self._names, weights, strict=True)}
        # No two names are one weight here; looking for such pairs would take longer than the call.
        results = functional_call(self._computation[0], named, inputs, tie_weights=False)
        return results if isinstance(results, tuple) else (results,)


# Files whose code a segment runs, in pw_kernels and in pw_runtime.models.
_KERNELS = (
    "attention/__init__",
    "gate_residual",
    "gate_residual_norm",
    "norm_modulate",
    "qk_norm_rope",
    "quantized_linear",
)
_MODELS = ("adapter", "blocks", "dit", "embeddings", "precision", "quantized_linear")


@cache
def source_digest() -> str:
    """Return the SHA-256 of the code that defines the arithmetic of every segment."""
    return digest_of_files(_KERNELS, _MODELS, Path(__file__))


def digest_of_files(kernels: Sequence[str], networks: Sequence[str], *others: Path) -> str:
    """Return the SHA-256 of files of pw_kernels and pw_runtime.models, by name, and of others."""
    kernel_folder, model_folder = Path(pw_kernels.__file__).parent, Path(models.__file__).parent
    paths = [*(kernel_folder / f"{name}.py" for name in kernels), *others]
    paths += [model_folder / f"{name}.py" for name in networks]
    return digest_of(part for path in paths for part in (path.name.encode(), path.read_bytes()))
