# SPDX-License-Identifier: Apache-2.0
"""The transformer cut into segments, each of which is compiled once for every resolution.

Everything in a Wan network but self-attention works token by token, so a segment takes any part of
a clip's tokens, up to a limit. Weights are inputs: one engine of a segment serves all blocks, and
every checkpoint of these widths. A segment calls the very methods of the network. The adapter's
backbone is not among them: it is no work for tokens and runs once per clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

import pw_kernels
from pw_engines import DType, EngineSpec, TensorSpec, digest_of, dtype_name
from pw_runtime import models
from pw_runtime.models import WanDiT
from pw_runtime.models.precision import store_dit_weight
from pw_runtime.types import PATCH, DitConfig, Precision

POSITIONS = 1024  # rows of the rotary tables that engines take: the longest side of a token grid
TEXT_PADDING = 8  # keys beyond text_len, for those that stand for the padding
FIRST_BLOCK = "blocks.0."  # begins the names of the weights of whichever block


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the network: what an engine of it computes, and how it is computed without one."""

    spec: EngineSpec
    module: nn.Module  # called with the spec's inputs, gives a tuple of its outputs
    weights: tuple[str, ...]  # names in the network of the last inputs, a block's as FIRST_BLOCK

    @property
    def name(self) -> str:
        """As in the spec."""
        return self.spec.segment


def segments_of(config: DitConfig, precision: Precision, limit: int) -> dict[str, Segment]:
    """Every segment of a network by name.

    Args:
        config: of the network; how many blocks it has does not matter.
        precision: in which its weights are stored.
        limit: most tokens of a call.
    """
    low: DType = "fp32" if precision == "fp32" else "bf16"
    dim, heads = config.dim, (config.num_heads, config.head_dim)
    patch = PATCH * PATCH
    make = _Maker(config, precision, limit)

    def tensor(name: str, dtype: DType, *shape: int | str) -> TensorSpec:
        return TensorSpec(name=name, dtype=dtype, shape=shape)

    def tokens(name: str, dtype: DType, *shape: int) -> TensorSpec:
        return tensor(name, dtype, "tokens", *shape)

    x, rows = tokens("x", "fp32", dim), tensor("rows", "fp32", 1, 6, dim)
    table = (POSITIONS, config.head_dim // 2)
    at = (tensor("cos", "fp32", *table), tensor("sin", "fp32", *table), tensor("place", "int64", 3))
    qkv = tuple(tokens(name, low, *heads) for name in "qkv")
    keys = (tensor("keys", low, "text", *heads), tensor("values", low, "text", *heads))
    context, embedded = tensor("context", low, "text", config.text_dim), ("text", dim)
    steps = ("t", "dt") if config.has_dt else ("t",)
    time = tuple(tensor(name, "fp32", 1, config.freq_dim) for name in steps)
    first = tokens("x", low, dim)  # what the embedding leaves; block 0 alone norms it in bf16
    made = [
        make("embed", "embed", (tokens("patches", "fp32", config.in_dim * patch),), (first,)),
        make("block_in", "blocks.0.before_attention", (x, rows, *at), qkv),
        make(
            "block_out",
            "blocks.0.after_attention",
            (x, tokens("y", low, *heads), rows, *keys, tensor("bias", low, "text")),
            (tokens("out", "fp32", dim),),
        ),
        make(
            "head",
            "head.forward",
            (x, tensor("rows", "fp32", 1, 2, dim)),
            (tokens("out", "fp32", config.out_dim * patch),),
        ),
        make("text_embed", "embed_text", (context,), (tensor("out", low, *embedded),)),
        make(
            "text_keys_values",
            "blocks.0.cross_attn.keys_values",
            (tensor("x", low, *embedded),),
            keys,
        ),
        make(
            "modulation",
            "time_rows",
            time,
            (tensor("rows", "fp32", 1, 6, dim), tensor("e", "fp32", 1, dim)),
        ),
    ]
    if low != "fp32":
        made.append(make("block_in_first", "blocks.0.before_attention", (first, rows, *at), qkv))
    if config.adapter_dim:
        features = tokens("features", low, dim)
        controls = tuple(tokens(f"control{block}", low, dim) for block in config.control_blocks)
        made.append(make("control", "control", (features, *time), controls))
    return {segment.name: segment for segment in made}


class _Maker:
    """Makes segments of one network without weights."""

    def __init__(self, config: DitConfig, precision: Precision, limit: int) -> None:
        layers = 1 + max(config.control_blocks, default=0)  # as few as have all weights
        with torch.device("meta"):
            net = WanDiT(replace(config, num_layers=layers))
        stored = {k: store_dit_weight(k, w, precision) for k, w in net.state_dict().items()}
        net.load_state_dict(stored, assign=True)
        self._net = net.requires_grad_(False)
        self._limits = (("tokens", limit), ("text", config.text_len + TEXT_PADDING))

    def __call__(
        self,
        name: str,
        method: str,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
    ) -> Segment:
        """The segment that calls `method` of the network, or of one of its parts."""
        weights = _WEIGHTS[name]
        stored = self._net.state_dict()
        names = tuple(key for key in stored if key.startswith(weights))
        given = tuple(
            TensorSpec(
                name=key, dtype=dtype_name(stored[key].dtype), shape=tuple(stored[key].shape)
            )
            for key in names
        )
        varying = {dim for one in (*inputs, *outputs) for dim in one.shape if isinstance(dim, str)}
        spec = EngineSpec(
            segment=name,
            inputs=inputs + given,
            outputs=outputs,
            limits=tuple(pair for pair in self._limits if pair[0] in varying),
            sources=source_digest(),
            numbers=(("eps", self._net.config.eps),),
        )
        return Segment(spec, _Functional(self._net, method, names), names)


_SELF, _CROSS = "blocks.0.self_attn.", "blocks.0.cross_attn."
_INTO = tuple(_SELF + name for name in ("q.", "k.", "v.", "norm_q.", "norm_k."))
# Segment -> beginnings of the names of the weights that it takes.
_WEIGHTS = {
    "embed": ("patch_embedding.",),
    "block_in": _INTO,
    "block_in_first": _INTO,
    "block_out": (
        *(_SELF + "o.", "blocks.0.norm3.", "blocks.0.ffn."),
        *(_CROSS + name for name in ("q.", "norm_q.", "o.")),
    ),
    "head": ("head.head.",),
    "text_embed": ("text_embedding.",),
    "text_keys_values": tuple(_CROSS + name for name in ("k.", "v.", "norm_k.")),
    "modulation": ("time_embedding.", "time_projection.", "dt_embedding."),
    "control": tuple(
        f"spatial_adapter.{name}" for name in ("feature_norm.", "adapter_", "zero_layers.")
    ),
}


class _Functional(nn.Module):
    """Calls a method of a network with weights given as arguments."""

    def __init__(self, net: WanDiT, method: str, names: Sequence[str]) -> None:
        super().__init__()
        self._caller = [_Caller(net, method)]  # in a list: its weights are not this module's
        self._names = [f"net.{name}" for name in names]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Activations, then weights -> outputs."""
        count = len(inputs) - len(self._names)
        weights = dict(zip(self._names, inputs[count:], strict=True))
        results = functional_call(self._caller[0], weights, inputs[:count])
        return results if isinstance(results, tuple) else (results,)


class _Caller(nn.Module):
    def __init__(self, net: WanDiT, method: str) -> None:
        super().__init__()
        self.net, self._path = net, method.split(".")

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What the method gives."""
        method: object = self.net
        for name in self._path:
            method = method[int(name)] if name.isdigit() else getattr(method, name)  # type: ignore[index]
        if self._path[-1] == "after_attention":  # overwrites what an engine has to leave as it is
            inputs = (inputs[0].clone(), *inputs[1:])
        results: Tensor | tuple[Tensor, ...] = method(*inputs)  # type: ignore[operator]
        return results


# Files whose code a segment runs: of pw_kernels and of pw_runtime.models.
_KERNELS = (
    "attention/__init__",
    "gate_residual",
    "gate_residual_norm",
    "norm_modulate",
    "qk_norm_rope",
)
_MODELS = ("adapter", "blocks", "dit", "embeddings", "precision")


@cache
def source_digest() -> str:
    """SHA-256 of the code that defines the arithmetic of every segment."""
    return digest_of_files(_KERNELS, _MODELS, Path(__file__))


def digest_of_files(kernels: Sequence[str], networks: Sequence[str], *others: Path) -> str:
    """SHA-256 of files of pw_kernels and pw_runtime.models, by name, and of others."""
    below, beside = Path(pw_kernels.__file__).parent, Path(models.__file__).parent
    paths = [*(below / f"{name}.py" for name in kernels), *others]
    paths += [beside / f"{name}.py" for name in networks]
    return digest_of(part for at in paths for part in (at.name.encode(), at.read_bytes()))
