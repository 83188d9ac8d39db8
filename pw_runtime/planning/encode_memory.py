# SPDX-License-Identifier: Apache-2.0
"""Peak memory and arithmetic of the VAE encoder, in closed form: no network runs.

Its layers are visited in order, as `decode_memory` does with those of the decoder. However long a
video is, one chunk of its frames is in memory, with the past frames that its convolutions see.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import prod

from pw_runtime.models import expected_shapes
from pw_runtime.models.vae import PIXEL_CHANNELS
from pw_runtime.planning.decode_layers import PAST, PeakCounter
from pw_runtime.types import VAE_STRIDE, MemoryItem, MemoryKind, VaeConfig

CHUNK = VAE_STRIDE[0]  # frames that the encoder takes at a time, after the first
ENCODER = ("encoder.", "conv1.")
_KINDS: dict[str, MemoryKind] = {"weights": "weights", PAST: "caches"}
_ITEMSIZE = 4


def encode_memory(
    config: VaeConfig, *, width: int, height: int, video: bool
) -> tuple[MemoryItem, ...]:
    """List what is in memory at the peak of encoding, fp32.

    Args:
        config: of the encoder.
        width: of a frame, in pixels.
        height: of a frame, in pixels.
        video: chunks of frames follow the first; else it is a picture.
    """
    counter = PeakCounter(config, _ITEMSIZE)
    shapes = expected_shapes("vae", config)
    weights = sum(prod(shape) for name, shape in shapes.items() if name.startswith(ENCODER))
    counter.allocate("weights", weights * _ITEMSIZE)
    _chunk(counter, 1, height // 2, width // 2)
    if video:
        counter.caches_grow = False
        _chunk(counter, CHUNK, height // 2, width // 2)
    items = [
        MemoryItem(name=name, kind=_KINDS.get(name, "activations"), bytes=size, place="device")
        for name, size in counter.peak.items()
    ]
    return tuple(replace(item, name="past frames") if item.name == PAST else item for item in items)


def encode_flop(config: VaeConfig, *, width: int, height: int, frames: int) -> float:
    """Return the arithmetic of the convolutions that encode frames of a size in pixels."""
    total = 0.0
    for count, chunks in ((1, 1), (CHUNK, (frames - 1) // CHUNK)):
        counter = PeakCounter(config, _ITEMSIZE)
        _chunk(counter, count, height // 2, width // 2)
        total += chunks * counter.flop
    return total


def _chunk(counter: PeakCounter, t: int, n: int, w: int) -> None:
    """Encode t frames of n rows and w columns of 2x2 pixels."""
    config = counter.config
    dims, temporal = config.encoder_dims, (*config.temporal_downsample, False)
    last, first = len(dims) - 2, t == 1
    pixels = PIXEL_CHANNELS * t * n * w * _ITEMSIZE
    counter.allocate("activations", 2 * pixels)  # as they came, and in blocks
    counter.conv(PIXEL_CHANNELS, dims[0], t, n, w, None, PAST)
    x = dims[0] * t * n * w * _ITEMSIZE
    counter.allocate("activations", x - pixels)
    for stage, (c_in, c) in enumerate(pairwise(dims)):
        made = _stage(
            counter, (c_in, c), t, n, w, down=stage != last, temporal=temporal[stage], first=first
        )
        if stage != last:
            n, w = n // 2, w // 2
            t = max(1, t // 2) if temporal[stage] else t
        counter.allocate("activations", made - x)
        x = made
    counter.block(dims[-1], dims[-1], t, n, w, None, PAST)
    counter.allocate("activations", x)  # the result of the block, beside its input
    counter.attention(dims[-1], n * w)
    counter.block(dims[-1], dims[-1], t, n, w, None, PAST)
    counter.allocate("activations", -x)
    counter.conv(dims[-1], 2 * config.z_dim, t, n, w, None, PAST)
    counter.allocate("activations", -x - pixels)


def _stage(
    counter: PeakCounter,
    channels: tuple[int, int],
    t: int,
    n: int,
    w: int,
    *,
    down: bool,
    temporal: bool,
    first: bool,
) -> int:
    """Run a stage, whose input the caller counts; return the bytes of its result."""
    c_in, c = channels
    one = c * n * w * _ITEMSIZE  # of a frame
    h = 0
    for block in range(counter.config.encoder_blocks):
        counter.block(c_in if block == 0 else c, c, t, n, w, None, PAST)
        counter.allocate("activations", t * one - h)
        h = t * one
    made = h
    if down:
        padded, shrunk = c * t * (n + 1) * (w + 1) * _ITEMSIZE, t * one // 4
        counter.flop += 2 * 9 * c * c * t * (n // 2) * (w // 2)
        counter.allocate("activations", padded + shrunk)
        made = shrunk
        if temporal:
            counter.cache(PAST, one // 4)
            if not first:
                made = shrunk // 2
                counter.flop += 2 * 3 * c * c * (t // 2) * (n // 2) * (w // 2)
                # the last frame kept for the next chunk, the frames behind that of the one before
                counter.transient(one // 4 + one // 4 + shrunk + made)
        counter.allocate("activations", made - padded - shrunk - h)
    given = c_in * n * w * _ITEMSIZE * (max(t, 2) if temporal else t)
    counter.transient(2 * given if down else given)  # the shortcut, padded and in another order
    counter.transient(2 * made)  # the shortcut, and the sum
    counter.allocate("activations", -made)
    return made
