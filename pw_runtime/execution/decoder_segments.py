# SPDX-License-Identifier: Apache-2.0
"""The VAE decoder cut into segments: the coarse and the fine part, first frame and later ones.

A segment is of one size of picture. What the decoder remembers, the last input frames of every
causal convolution, goes in and comes out: nothing is hidden in an engine. Activations and memory
have shapes with their channels last, as they lie in memory; so have weights, a row per channel of
the result. Changing between these shapes and the network's copies nothing.

Weights are inputs, as those of the transformer are: one engine serves every checkpoint. For
TensorRT they should be part of the plan (`baked`): it packs weights of convolutions anew on every
call where they are inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pw_engines import EngineSpec, TensorSpec, digest_of
from pw_runtime.execution.transformer_segments import Segment, digest_of_files
from pw_runtime.models import VaeDecoder
from pw_runtime.models.causal_cache import CausalCache
from pw_runtime.models.tiling import exact_halo, make_strips
from pw_runtime.models.vae_blocks import Upsample
from pw_runtime.types import TilingConfig, VaeConfig

Part = Literal["coarse", "fine"]
# Part -> the decoder's method that it is.
PARTS: Mapping[Part, str] = MappingProxyType({"coarse": "coarse_layers", "fine": "fine"})
# Begin the names of the coarse part's weights; the others are the fine part's.
_COARSE = ("conv2.", "decoder.conv1.", "decoder.middle.", "decoder.upsamples.0.")
PAST, LAST = ".past", ".last"  # end the names of memory going in and coming out
_TAPS = ".taps"  # end the names of what stands for the weight of a convolution that upsamples


def segments_of_decode(
    config: VaeConfig,
    plan: TilingConfig,
    rows: int,
    columns: int,
    *,
    baked: VaeDecoder | None = None,
    digest: str | None = None,
) -> dict[str, Segment]:
    """Every segment that the decode of a latent of `rows` x `columns` needs, by name and size.

    `baked` and `digest` are as those of `segments_of_vae`.
    """
    exact = plan.tiling == "exact"
    overlap = max(plan.overlap, exact_halo(config)) if exact else plan.overlap
    strips = {one.last - one.first for one in make_strips(columns, plan.strips, overlap)}
    widths: dict[Part, set[int]] = {"coarse": {columns} if exact else strips, "fine": strips}
    return {
        f"{segment.name}_{rows}x{width}": segment
        for width in sorted(widths["coarse"] | strips)
        for segment in segments_of_vae(config, rows, width, baked=baked, digest=digest).values()
        if any(width in widths[part] and part in segment.name for part in PARTS)
    }


def segments_of_vae(
    config: VaeConfig,
    rows: int,
    columns: int,
    *,
    baked: VaeDecoder | None = None,
    digest: str | None = None,
) -> dict[str, Segment]:
    """The four segments by name, for one size.

    Args:
        config: of the decoder.
        rows: of the latent.
        columns: of the latent, or of the part of it that a strip is computed from.
        baked: a decoder whose weights become part of the segments; on the meta device, where the
            segments are only to be found and not to be run.
        digest: of the weights to bake, where it is known; else it is computed from them.
    """
    with torch.device("meta"):
        net = VaeDecoder(config).requires_grad_(False)
        frame = torch.empty(1, config.z_dim, 1, rows, columns)
    names = {module: name for name, module in net.named_modules()}
    memory = {part: CausalCache() for part in PARTS}
    made = {}
    for first in (True, False):
        x = frame
        for part, method in PARTS.items():
            result = getattr(net, method)(x, memory[part])
            held = {names[conv]: past for conv, past in memory[part].past.items()}
            step = _Step(_Caller(net, part, first, list(held)))
            made[segment_name(part, first=first)] = _segment(step, x, (result, held), baked, digest)
            x = result
    return made


def segment_name(part: Part, *, first: bool) -> str:
    """Of the segment for a clip's first latent frame, or for every later one."""
    return f"vae_{part}_{'first' if first else 'next'}"


def stored_weights(net: VaeDecoder) -> dict[str, Tensor]:
    """What a decoder computes with, by name: its parameters, but taps instead of their weight."""
    weights: dict[str, Tensor] = dict(net.named_parameters())
    for name, module in net.named_modules():
        if isinstance(module, Upsample):
            del weights[f"{name}.resample.1.weight"]
            weights[name + _TAPS] = module.made_taps()
    return weights


def as_rows(name: str, weight: Tensor) -> Tensor:
    """A weight as an engine takes it: [C', taps x C], a view where its channels are last in memory.

    What has no such channels, a bias, stays as it is.
    """
    if weight.dim() < 3:
        return weight
    axis = _channels(name)
    return weight.movedim(axis, -1).flatten(axis).flatten(0, -2)


def from_rows(name: str, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """The view of `rows` that is the weight of this shape, with the strides of a loaded one."""
    if len(shape) < 3:
        return rows
    axis = _channels(name)
    if rows.shape[1] == shape[axis]:  # one tap: as loaded, for PyTorch picks its code by strides
        return rows.view(shape)
    return rows.view(*shape[:axis], *shape[axis + 1 :], shape[axis]).movedim(-1, axis)


def _channels(name: str) -> int:
    return 2 if name.endswith(_TAPS) else 1


def to_engine(x: Tensor) -> Tensor:
    """[1, C, T, H, W] or [C, T, H, W] -> a view [T, H, W, C]."""
    return (x[0] if x.dim() == 5 else x).movedim(0, -1)


def from_engine(x: Tensor) -> Tensor:
    """[T, H, W, C] -> a view [1, C, T, H, W]."""
    return x[None].movedim(-1, 1)


def _segment(
    step: _Step,
    x: Tensor,
    results: tuple[Tensor, dict[str, Tensor]],
    baked: VaeDecoder | None,
    digest: str | None,
) -> Segment:
    """The segment of a step that makes `results`, of these shapes, of x."""
    caller, (out, held) = step.caller, results
    stored = stored_weights(baked or caller.net)
    weights = {name: stored[name] for name in step.weights}
    rows = tuple(_spec(name, as_rows(name, weight)) for name, weight in weights.items())
    spec = EngineSpec(
        segment=segment_name(caller.part, first=caller.first),
        inputs=(
            _spec("x", to_engine(x)),
            *(_spec(name + PAST, to_engine(held[name])) for name in caller.before),
            *(() if baked else rows),
        ),
        outputs=(
            _spec("out", to_engine(out)),
            *(_spec(name + LAST, to_engine(past)) for name, past in held.items()),
        ),
        limits=(),
        sources=source_digest(),
        weights=(digest or digest_of(map(_bytes, weights.values()))) if baked else None,
    )
    if baked:
        return Segment(spec, _Baked(step, list(weights.values())), ())
    return Segment(spec, step, step.weights)


def _bytes(weight: Tensor) -> bytes:
    return weight.cpu().numpy().tobytes()


def _spec(name: str, x: Tensor) -> TensorSpec:
    return TensorSpec(name=name, dtype="fp32", shape=tuple(x.shape))


class _Caller(nn.Module):
    """Calls a part of a decoder with its memory given as arguments."""

    def __init__(self, net: VaeDecoder, part: Part, first: bool, held: Sequence[str]) -> None:
        super().__init__()
        self.net, self.part, self.first = net, part, first
        self.before = () if first else tuple(held)
        self._after = tuple(held)

    def forward(self, x: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """x and memory -> result and memory, as in the spec."""
        memory = CausalCache(first=self.first)
        for name, frames in zip(self.before, past, strict=True):
            # A copy: the decoder overwrites its memory, an engine leaves its inputs as they are.
            memory.past[self.net.get_submodule(name)] = from_engine(frames).clone()
        out: Tensor = getattr(self.net, PARTS[self.part])(from_engine(x), memory)
        held = (memory.past[self.net.get_submodule(name)] for name in self._after)
        return to_engine(out), *(to_engine(frames) for frames in held)


class _Step(nn.Module):
    """A call with its weights given as arguments too."""

    def __init__(self, caller: _Caller) -> None:
        super().__init__()
        self._callers = [caller]  # in a list: its weights are not this module's
        stored = stored_weights(caller.net)
        self._shapes = {
            name: weight.shape
            for name, weight in stored.items()
            if name.startswith(_COARSE) == (caller.part == "coarse")
            and not (caller.first and ".time_conv." in name)  # frames are doubled later
        }
        self.weights = tuple(self._shapes)

    @property
    def caller(self) -> _Caller:
        """The call without weights."""
        return self._callers[0]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """x, memory, weights as rows -> result, memory."""
        count = 1 + len(self.caller.before)
        rows = zip(self._shapes.items(), inputs[count:], strict=True)
        return self.run(inputs[:count], [from_rows(name, x, shape) for (name, shape), x in rows])

    def run(self, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """x and memory, weights as they are in the decoder -> result, memory."""
        named = {f"net.{name}": x for name, x in zip(self.weights, weights, strict=True)}
        results: tuple[Tensor, ...] = functional_call(self.caller, named, tuple(inputs))
        return results


class _Baked(nn.Module):
    """A call that has its weights."""

    def __init__(self, step: _Step, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self._steps = [step]  # in a list, as above
        for index, weight in enumerate(weights):
            self.register_buffer(f"weight{index}", weight)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """x, memory -> result, memory."""
        return self._steps[0].run(inputs, list(self.buffers()))


# As in `pw_runtime.execution.transformer_segments`.
_KERNELS = ("attention/chunked", "causal_conv3d", "channel_norm", "dup_up", "upsample2x")
_MODELS = ("causal_cache", "vae", "vae_blocks")


@cache
def source_digest() -> str:
    """SHA-256 of the code that defines the arithmetic of every segment of the decoder."""
    return digest_of_files(_KERNELS, _MODELS, Path(__file__))
