# SPDX-License-Identifier: Apache-2.0
"""The VAE decoder divided into segments: coarse and fine part, first frame and later ones.

Of the fine part, the last stage and the head are a segment that takes one frame at a time: these
layers have the largest activations, and do not double frames.

A segment fits one picture size. Past frames, the last input frames of every causal convolution, are
inputs and outputs: an engine has no state. Activations and past frames have their channels last, as
they are laid out in memory; so have weights, one row per output channel. Converting between these
shapes and the network's copies nothing.

Weights are inputs, like the transformer's: one engine serves every checkpoint. For TensorRT they
should be part of the plan (`baked`): it repacks convolution weights on every call when they are
inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from pw_engines import EngineSpec, TensorSpec, digest_of
from pw_runtime.execution.transformer_segments import (
    Computation,
    Segment,
    WithWeights,
    digest_of_files,
)
from pw_runtime.models import VaeDecoder
from pw_runtime.models.causal_cache import CausalCache
from pw_runtime.models.tiling import Strip, exact_halo, make_strips
from pw_runtime.models.vae_blocks import Upsample
from pw_runtime.types import TilingConfig, VaeConfig

Part = Literal["coarse", "fine", "frame"]
# Part -> the decoder's method.
PARTS: Mapping[Part, str] = MappingProxyType(
    {"coarse": "coarse_layers", "fine": "fine_layers", "frame": "frame_layers"}
)
PAST, LAST = ".past", ".last"  # suffixes of the names of past frames as inputs and outputs
TAPS = ".taps"  # suffix of the name of an upsampling convolution's taps, instead of its weight
# Scratch memory that the engines of a strip should stay within, and what those of TensorRT for RTX
# take for each cell of it: measured for strips of 2K and 4K of the published decoder, five targets.
SCRATCH, CELL_SCRATCH, PUBLISHED_WIDTH = 6 * 2**30, 1.01 * 2**20, 1024


def segments_of_decode(
    config: VaeConfig,
    plan: TilingConfig,
    rows: int,
    columns: int,
    *,
    baked: VaeDecoder | None = None,
    digest: str | None = None,
) -> dict[str, Segment]:
    """Return all segments for decoding a latent of `rows` x `columns`, by name and size.

    The strips are those of `engine_tiling`; `baked` and `digest` are those of `segments_of_vae`.
    """
    plan = engine_tiling(config, plan, rows, columns)
    strips = {strip.last - strip.first for strip in decode_strips(config, plan, columns)}
    coarse = {columns} if plan.tiling == "exact" else strips
    widths: dict[Part, set[int]] = {"coarse": coarse, "fine": strips, "frame": strips}
    return {
        f"{segment.name}_{rows}x{width}": segment
        for width in sorted(widths["coarse"] | strips)
        for segment in segments_of_vae(config, rows, width, baked=baked, digest=digest).values()
        if any(width in widths[part] and part in segment.name for part in PARTS)
    }


def engine_tiling(config: VaeConfig, plan: TilingConfig, rows: int, columns: int) -> TilingConfig:
    """Return the tiling with as many strips as keep engines within SCRATCH, if any number does.

    Strips of an official decode are blended, so their number decides the frames and stays.
    """
    if plan.tiling != "exact":
        return plan
    for count in range(plan.strips, columns + 1):
        tiling = replace(plan, strips=count)
        widest = max(strip.last - strip.first for strip in decode_strips(config, tiling, columns))
        share = config.decoder_dims[0] / PUBLISHED_WIDTH
        if rows * widest * CELL_SCRATCH * share <= SCRATCH:
            return tiling
    return plan


def decode_strips(config: VaeConfig, plan: TilingConfig, columns: int) -> tuple[Strip, ...]:
    """Divide a latent into the strips of columns that engines decode."""
    overlap = plan.overlap
    if plan.tiling == "exact":
        overlap = max(overlap, exact_halo(config))
    return make_strips(columns, plan.strips, overlap)


def segments_of_vae(
    config: VaeConfig,
    rows: int,
    columns: int,
    *,
    baked: VaeDecoder | None = None,
    digest: str | None = None,
) -> dict[str, Segment]:
    """Return the five segments by name, for one size.

    Args:
        config: of the decoder.
        rows: of the latent.
        columns: of the latent, or of the part of it that a strip is computed from.
        baked: a decoder whose weights become part of the segments; on the meta device where the
            segments are only looked up and not run.
        digest: of the weights to bake, if it is known; otherwise it is computed from them.
    """
    with torch.device("meta"):
        net = VaeDecoder(config).requires_grad_(False)
        frame = torch.empty(1, config.z_dim, 1, rows, columns)
    names = {module: name for name, module in net.named_modules()}
    caches = {part: CausalCache() for part in PARTS}
    segments = {}
    for first in (True, False):
        x = frame
        for part, method in PARTS.items():
            if part == "frame":
                x = x[:, :, :1]
            result = getattr(net, method)(x, caches[part])
            past = {names[conv]: frames for conv, frames in caches[part].past.items()}
            decoder_part = DecoderPart(net, part, first and part != "frame", tuple(past))
            segment = _segment(decoder_part, x, (result, past), baked, digest)
            segments[segment.name] = segment
            x = result
    return segments


def segment_name(part: Part, *, first: bool) -> str:
    """Return the name of the segment for a clip's first latent frame, or for later ones."""
    if part == "frame":  # without a past it is given zeros
        return "vae_frame"
    return f"vae_{part}_{'first' if first else 'next'}"


def stored_weights(net: VaeDecoder) -> dict[str, Tensor]:
    """Return a decoder's weights by name, with taps in place of upsampling weights."""
    weights: dict[str, Tensor] = dict(net.named_parameters())
    for name, module in net.named_modules():
        if isinstance(module, Upsample):
            del weights[f"{name}.resample.1.weight"]
            weights[name + TAPS] = module.made_taps()
    return weights


def as_rows(name: str, weight: Tensor) -> Tensor:
    """Return a weight as an engine takes it, [C', taps x C]; a view if its channels are last.

    A bias stays unchanged.
    """
    if weight.dim() < 3:
        return weight
    axis = _channels(name)
    return weight.movedim(axis, -1).flatten(axis).flatten(0, -2)


def from_rows(name: str, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the view of `rows` as a weight of this shape, with the strides of a loaded one."""
    if len(shape) < 3:
        return rows
    axis = _channels(name)
    if rows.shape[1] == shape[axis]:  # one tap: as loaded, since PyTorch selects code by strides
        return rows.view(shape)
    return rows.view(*shape[:axis], *shape[axis + 1 :], shape[axis]).movedim(-1, axis)


def _channels(name: str) -> int:
    return 2 if name.endswith(TAPS) else 1


def to_engine(x: Tensor) -> Tensor:
    """Return a view [T, H, W, C] of [1, C, T, H, W] or [C, T, H, W]."""
    return (x[0] if x.dim() == 5 else x).movedim(0, -1)


def from_engine(x: Tensor) -> Tensor:
    """Return a view [1, C, T, H, W] of [T, H, W, C]."""
    return x[None].movedim(-1, 1)


def _segment(
    decoder_part: DecoderPart,
    x: Tensor,
    results: tuple[Tensor, dict[str, Tensor]],
    baked: VaeDecoder | None,
    digest: str | None,
) -> Segment:
    """Return the segment of a part that computes `results`, of these shapes, from x."""
    out, past = results
    names = decoder_part.weights
    stored = stored_weights(baked or decoder_part.net)
    weights = {name: stored[name] for name in names}
    rows = tuple(_spec(name, as_rows(name, weight)) for name, weight in weights.items())
    spec = EngineSpec(
        segment=segment_name(decoder_part.part, first=decoder_part.first),
        inputs=(
            _spec("x", to_engine(x)),
            *(_spec(name + PAST, to_engine(past[name])) for name in decoder_part.past_in),
            *(() if baked else rows),
        ),
        outputs=(
            _spec("out", to_engine(out)),
            *(_spec(name + LAST, to_engine(frames)) for name, frames in past.items()),
        ),
        limits=(),
        sources=source_digest(),
        weights=(digest or digest_of(map(_bytes, weights.values()))) if baked else None,
    )
    computation = Computation(decoder_part.net, decoder_part.compute)
    if baked:
        stored_inside = WithWeights(computation, names, baked=list(weights.values()))
        return DecoderSegment(spec, stored_inside, (), decoder_part)
    shapes = {name: weight.shape for name, weight in weights.items()}

    def restore(name: str, weight: Tensor) -> Tensor:
        return from_rows(name, weight, shapes[name])

    return DecoderSegment(spec, WithWeights(computation, names, restore), names, decoder_part)


def _part_of(weight: str, net: VaeDecoder) -> Part:
    """Return the part that a weight belongs to, by its name."""
    last = f"decoder.upsamples.{len(net.decoder.upsamples) - 1}."
    if weight.startswith((last, "decoder.head.")):
        return "frame"
    if weight.startswith("decoder.upsamples.") and not weight.startswith("decoder.upsamples.0."):
        return "fine"
    return "coarse"


def _bytes(weight: Tensor) -> bytes:
    return weight.cpu().numpy().tobytes()


def _spec(name: str, x: Tensor) -> TensorSpec:
    return TensorSpec(name=name, dtype="fp32", shape=tuple(x.shape))


@dataclass(frozen=True, slots=True)
class DecoderPart:
    """One part of a decoder, for a clip's first latent frame or for later ones.

    Attributes:
        net: the decoder, on the meta device.
        part: coarse or fine.
        first: for a clip's first latent frame.
        cached: names of the convolutions that keep past frames.
    """

    net: VaeDecoder
    part: Part
    first: bool
    cached: tuple[str, ...]

    @property
    def past_in(self) -> tuple[str, ...]:
        """Names of the convolutions whose past frames are inputs."""
        return () if self.first else self.cached

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weights that the part takes."""
        return tuple(
            name
            for name in stored_weights(self.net)
            if _part_of(name, self.net) == self.part
            and not (self.first and ".time_conv." in name)  # frames are doubled later
        )

    def compute(self, net: VaeDecoder, x: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Map x and past frames to the result and the new past frames, all as in the spec."""
        cache = CausalCache(first=self.first)
        for name, frames in zip(self.past_in, past, strict=True):
            # A copy: the decoder overwrites its cache, an engine leaves its inputs unchanged.
            cache.past[net.get_submodule(name)] = from_engine(frames).clone()
        out: Tensor = getattr(net, PARTS[self.part])(from_engine(x), cache)
        frames_out = (cache.past[net.get_submodule(name)] for name in self.cached)
        return to_engine(out), *(to_engine(frames) for frames in frames_out)


@dataclass(frozen=True, slots=True)
class DecoderSegment(Segment):
    """A segment of the decoder, with what another form of it is written from."""

    part: DecoderPart


# See `pw_runtime.execution.transformer_segments`.
_KERNELS = ("attention/chunked", "causal_conv3d", "channel_norm", "dup_up", "upsample2x")
_MODELS = ("causal_cache", "vae", "vae_blocks")


@cache
def source_digest() -> str:
    """Return the SHA-256 of the code that defines the arithmetic of the decoder's segments."""
    return digest_of_files(_KERNELS, _MODELS, Path(__file__))
