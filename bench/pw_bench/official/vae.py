# SPDX-License-Identifier: Apache-2.0
"""The official Wan2.2 VAE decode, streamed: one latent frame per decoder call, feature caches.

Copies are those of the official code: padding and cached frames are put before a convolution's
input, the cached frames are copied out of it, and the decoded clip grows by concatenation.

Shapes: activations are [1, C, T, H, W]; latents [48, T, h, w] are normalised; video is
[3, 1 + 4 (T - 1), 16 h, 16 w] in [-1, 1]. The layout is read off the keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]
# fmt: off
MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813,
    0.0891, 0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108,
    -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313,
    -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944,
    0.3573, -0.0548, -0.1681, -0.0667,
)
STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on


def latent_scale(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and inverse standard deviation, [1, 48, 1, 1, 1] fp32 each."""
    mean = torch.tensor(MEAN, device=device).view(1, -1, 1, 1, 1)
    std = torch.tensor(STD, device=device).view(1, -1, 1, 1, 1)
    return mean, std.reciprocal()


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """Normalise to unit length over the channels (axis 1), times sqrt(C) and gamma."""
    return F.normalize(x, dim=1) * math.sqrt(x.shape[1]) * gamma


def dup_up(x: Tensor, out: int, ft: int, fs: int, first_chunk: bool) -> Tensor:
    """Upsample without parameters: `out` channels, ft times the frames, fs times the sides."""
    _, channels, t, h, w = x.shape
    x = x.repeat_interleave(out * ft * fs * fs // channels, dim=1)
    x = x.view(1, out, ft, fs, fs, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(1, out, t * ft, h * fs, w * fs)
    return x[:, :, ft - 1 :] if first_chunk else x


def pixel_unpatchify(x: Tensor) -> Tensor:
    """Turn [1, 12, T, H, W] into [1, 3, T, 2H, 2W]: the inverse of `pixel_patchify`."""
    b, c, t, h, w = x.shape
    return (
        x.view(b, c // 4, 2, 2, t, h, w)
        .permute(0, 1, 4, 5, 3, 6, 2)
        .reshape(b, -1, t, 2 * h, 2 * w)
    )


class Stream:
    """One pass over a clip: the weights, and the last input frames of each temporal convolution."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.cache: dict[str, Tensor] = {}
        self.started: set[str] = set()

    def children(self, prefix: str) -> list[int]:
        """Return the numbers that follow `prefix.` in the keys, in order."""
        keys = (key for key in self.state if key.startswith(f"{prefix}."))
        return sorted({int(key[len(prefix) + 1 :].split(".")[0]) for key in keys})

    def first_visit(self, name: str) -> bool:
        """Return True at the first call for a name, which is the clip's first chunk there."""
        new = name not in self.started
        self.started.add(name)
        return new

    def causal_conv(self, name: str, x: Tensor) -> Tensor:
        """Convolve in 3-D over [two earlier input frames (zeros at first), x]; odd spatial taps."""
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        if weight.shape[2:] == (1, 1, 1):
            return F.conv3d(x, weight, bias)
        rows, columns = weight.shape[3] // 2, weight.shape[4] // 2
        before = self.cache.get(name)
        last = x[:, :, -2:].clone()
        missing = 2
        if before is not None:
            if last.shape[2] < 2:
                last = torch.cat([before[:, :, -1:], last], dim=2)
            x = torch.cat([before, x], dim=2)
            missing -= before.shape[2]
        self.cache[name] = last
        x = F.pad(x, (columns, columns, rows, rows, missing, 0))
        return F.conv3d(x, weight, bias)

    def residual(self, name: str, x: Tensor) -> Tensor:
        """Apply RMS, SiLU, conv, RMS, SiLU, conv, and add the (possibly projected) input."""
        gammas = [self.state[f"{name}.residual.{i}.gamma"] for i in (0, 3)]
        y = self.causal_conv(f"{name}.residual.2", F.silu(rms_norm(x, gammas[0])))
        y = self.causal_conv(f"{name}.residual.6", F.silu(rms_norm(y, gammas[1])))
        projected = f"{name}.shortcut.weight" in self.state
        return y + (self.causal_conv(f"{name}.shortcut", x) if projected else x)

    def frame_conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        """Convolve every frame in 2-D."""
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        frames = x[0].transpose(0, 1)
        return F.conv2d(frames, weight, bias, stride, padding).transpose(0, 1)[None]

    def attention(self, name: str, x: Tensor) -> Tensor:
        """Apply single-head attention over the positions of each frame, and add the input."""
        _, c, t, h, w = x.shape
        normed = rms_norm(x, self.state[f"{name}.norm.gamma"][..., None])
        qkv = self.frame_conv(f"{name}.to_qkv", normed)
        rows = qkv[0].permute(1, 2, 3, 0).reshape(t, h * w, 3 * c).contiguous()
        q, k, v = rows.chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        y = y.transpose(1, 2).reshape(t, c, h, w).transpose(0, 1)[None]
        return x + self.frame_conv(f"{name}.proj", y)

    def middle(self, name: str, x: Tensor) -> Tensor:
        """Apply residual block, attention, residual block."""
        x = self.residual(f"{name}.0", x)
        return self.residual(f"{name}.2", self.attention(f"{name}.1", x))

    def head(self, name: str, x: Tensor) -> Tensor:
        """Apply RMS, SiLU, conv."""
        return self.causal_conv(f"{name}.2", F.silu(rms_norm(x, self.state[f"{name}.0.gamma"])))

    def upsample(self, name: str, x: Tensor) -> Tensor:
        """Double the sides and, where there is a time_conv, the frames after the first chunk."""
        has_time = f"{name}.time_conv.weight" in self.state
        if has_time and not self.first_visit(name):
            pairs = self.causal_conv(f"{name}.time_conv", x).chunk(2, dim=1)
            x = torch.stack(pairs, dim=3).flatten(2, 3)
        weight, bias = (
            self.state[f"{name}.resample.1.weight"],
            self.state[f"{name}.resample.1.bias"],
        )
        frames = F.interpolate(x[0].transpose(0, 1), scale_factor=2.0, mode="nearest-exact")
        return F.conv2d(frames, weight, bias, padding=1).transpose(0, 1)[None]

    def up_stage(self, name: str, x: Tensor) -> Tensor:
        """Apply residual blocks and, except in the last stage, upsampler plus DupUp shortcut."""
        first = self.first_visit(name)
        y = x.clone()
        for index in self.children(name):
            child = f"{name}.{index}"
            if f"{child}.resample.1.weight" not in self.state:
                y = self.residual(child, y)
                continue
            ft = 2 if f"{child}.time_conv.weight" in self.state else 1
            y = self.upsample(child, y)
            y = y + dup_up(x, y.shape[1], ft, 2, first)
        return y

    def decode_chunk(self, x: Tensor) -> Tensor:
        """Decode one latent frame [1, 48, 1, h, w] to [1, 12, 1 or 4, 8h, 8w]."""
        x = self.middle("decoder.middle", self.causal_conv("decoder.conv1", x))
        for stage in self.children("decoder.upsamples"):
            x = self.up_stage(f"decoder.upsamples.{stage}.upsamples", x)
        return self.head("decoder.head", x)


def post_conv2(state: State, z: Tensor) -> Tensor:
    """Turn a latent [48, T, h, w] into the decoder's input [1, 48, T, h, w]."""
    mean, inv_std = latent_scale(z.device)
    return Stream(state).causal_conv("conv2", z[None] / inv_std + mean)


def decode_chunks(state: State, z: Tensor) -> Iterator[Tensor]:
    """Yield the decoder's 12-channel output per latent frame of z [48, T, h, w]."""
    stream = Stream(state)
    for frame in post_conv2(state, z).split(1, dim=2):
        yield stream.decode_chunk(frame)


def decode(state: State, z: Tensor) -> Tensor:
    """Decode a latent [48, T, h, w] to video [3, F, 16h, 16w], not clamped."""
    clip: Tensor | None = None
    for chunk in decode_chunks(state, z):
        clip = chunk if clip is None else torch.cat([clip, chunk], dim=2)
    assert clip is not None
    return pixel_unpatchify(clip)[0]


def tile_ranges(width: int, strips: int, overlap: int) -> list[tuple[int, int]]:
    """Return the latent columns of each tile: equal strips, widened by the overlap."""
    base = width // strips
    starts = [i * base for i in range(strips)]
    ends = [*starts[1:], width]
    return [
        (max(0, start - overlap), min(width, end + overlap))
        for start, end in zip(starts, ends, strict=True)
    ]


def tile_mask(columns: int, overlap: int, *, is_first: bool, is_last: bool) -> Tensor:
    """Return the weight of each pixel column of a tile: cosine ramps towards neighbours."""
    mask = torch.ones(16 * columns)
    pixels = min(16 * overlap, len(mask))
    ramp = 0.5 - 0.5 * torch.cos(math.pi * torch.linspace(0, 1, pixels))
    if not is_first and pixels:
        mask[:pixels] *= ramp
    if not is_last and pixels:
        mask[-pixels:] *= ramp.flip(0)
    return mask


def decode_tiled(state: State, z: Tensor, strips: int, overlap: int) -> Tensor:
    """Decode in official blended tiles along the width.

    Each tile is decoded in full, clamped and averaged on the host. Maps a latent [48, T, h, w], on
    any device, to video [3, F, 16h, 16w] fp32 in [-1, 1]. Decodes on the device of the weights.
    """
    _, t, h, width = z.shape
    device = next(iter(state.values())).device
    total = torch.zeros(3, 1 + 4 * (t - 1), 16 * h, 16 * width)
    weight = torch.zeros(16 * width)
    for i, (start, end) in enumerate(tile_ranges(width, strips, overlap)):
        tile = decode(state, z[..., start:end].to(device)).clamp_(-1, 1).cpu()
        mask = tile_mask(end - start, overlap, is_first=i == 0, is_last=i == strips - 1)
        total[..., 16 * start : 16 * end] += tile * mask
        weight[16 * start : 16 * end] += mask
        del tile
    return total / weight.clamp_min(1e-6)


def to_uint8(video: Tensor) -> Tensor:
    """Convert video [..] in [-1, 1] to bytes, truncating."""
    return ((video + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
