# SPDX-License-Identifier: Apache-2.0
"""The official Wan2.2 VAE, streamed: one latent frame per decoder call, with feature caches.

Shapes: activations are [1, C, T, H, W]; latents [48, T, h, w] are normalised; video is
[3, 1 + 4 (T - 1), 16 h, 16 w] in [-1, 1]. The layout is read off the keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

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
    """Mean and inverse standard deviation, each [1, 48, 1, 1, 1] fp32."""
    mean = torch.tensor(MEAN, device=device).view(1, -1, 1, 1, 1)
    std = torch.tensor(STD, device=device).view(1, -1, 1, 1, 1)
    return mean, std.reciprocal()


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """Unit length over the channels (axis 1), times sqrt(C) and gamma."""
    length: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)
    return x / length * math.sqrt(x.shape[1]) * gamma


def dup_up(x: Tensor, out: int, ft: int, fs: int, first_chunk: bool) -> Tensor:
    """Parameterless upsampling to `out` channels, ft times the frames, fs times the sides."""
    _, channels, t, h, w = x.shape
    x = x.repeat_interleave(out * ft * fs * fs // channels, dim=1)
    x = x.view(1, out, ft, fs, fs, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(1, out, t * ft, h * fs, w * fs)
    return x[:, :, ft - 1 :] if first_chunk else x


def avg_down(x: Tensor, out: int, ft: int, fs: int) -> Tensor:
    """Parameterless downsampling: means over groups of (channel, frame, row, column)."""
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % ft, 0))
    _, channels, t, h, w = x.shape
    x = x.view(1, channels, t // ft, ft, h // fs, fs, w // fs, fs).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(1, out, -1, t // ft, h // fs, w // fs).mean(dim=2)


def pixel_patchify(video: Tensor) -> Tensor:
    """[1, 3, T, 2H, 2W] to [1, 12, T, H, W]; channel, then column offset, then row offset."""
    b, c, t, h, w = video.shape
    x = video.view(b, c, t, h // 2, 2, w // 2, 2).permute(0, 1, 6, 4, 2, 3, 5)
    return x.reshape(b, 4 * c, t, h // 2, w // 2)


def pixel_unpatchify(x: Tensor) -> Tensor:
    """[1, 12, T, H, W] to [1, 3, T, 2H, 2W]: the inverse of `pixel_patchify`."""
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
        """The numbers that follow `prefix.` in the keys, in order."""
        keys = (key for key in self.state if key.startswith(f"{prefix}."))
        return sorted({int(key[len(prefix) + 1 :].split(".")[0]) for key in keys})

    def first_visit(self, name: str) -> bool:
        """True once per name: whether this is the clip's first chunk there."""
        new = name not in self.started
        self.started.add(name)
        return new

    def causal_conv(self, name: str, x: Tensor) -> Tensor:
        """Convolve in 3-D over [two earlier input frames (zeros at first), x]; odd spatial taps."""
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        if weight.shape[2] == 3:
            b, c, _, h, w = x.shape
            x = torch.cat([self.cache.get(name, x.new_zeros(b, c, 2, h, w)), x], dim=2)
            self.cache[name] = x[:, :, -2:]
        return F.conv3d(x, weight, bias, padding=(0, weight.shape[3] // 2, weight.shape[4] // 2))

    def residual(self, name: str, x: Tensor) -> Tensor:
        """RMS, SiLU, conv, RMS, SiLU, conv, plus the (possibly projected) input."""
        gammas = [self.state[f"{name}.residual.{i}.gamma"] for i in (0, 3)]
        y = self.causal_conv(f"{name}.residual.2", F.silu(rms_norm(x, gammas[0])))
        y = self.causal_conv(f"{name}.residual.6", F.silu(rms_norm(y, gammas[1])))
        projected = f"{name}.shortcut.weight" in self.state
        return y + (self.causal_conv(f"{name}.shortcut", x) if projected else x)

    def frame_conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        """2-D convolution of every frame."""
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        frames = x[0].transpose(0, 1)
        return F.conv2d(frames, weight, bias, stride, padding).transpose(0, 1)[None]

    def attention(self, name: str, x: Tensor) -> Tensor:
        """Single-head attention over the positions of each frame, plus the input."""
        _, c, t, h, w = x.shape
        normed = rms_norm(x, self.state[f"{name}.norm.gamma"][..., None])
        qkv = self.frame_conv(f"{name}.to_qkv", normed)
        q, k, v = qkv[0].permute(1, 2, 3, 0).reshape(t, h * w, 3 * c).chunk(3, dim=-1)
        y = (q @ k.transpose(1, 2) / c**0.5).softmax(dim=-1) @ v
        return x + self.frame_conv(
            f"{name}.proj", y.transpose(1, 2).view(t, c, h, w).transpose(0, 1)[None]
        )

    def middle(self, name: str, x: Tensor) -> Tensor:
        x = self.residual(f"{name}.0", x)
        return self.residual(f"{name}.2", self.attention(f"{name}.1", x))

    def head(self, name: str, x: Tensor) -> Tensor:
        return self.causal_conv(f"{name}.2", F.silu(rms_norm(x, self.state[f"{name}.0.gamma"])))

    def upsample(self, name: str, x: Tensor) -> Tensor:
        """Double the frames (not in the first chunk; where there is a time_conv) and the sides."""
        has_time = f"{name}.time_conv.weight" in self.state
        if has_time and not self.first_visit(name):
            pairs = self.causal_conv(f"{name}.time_conv", x).chunk(2, dim=1)
            x = torch.stack(pairs, dim=3).flatten(2, 3)
        x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
        return self.frame_conv(f"{name}.resample.1", x, padding=1)

    def up_stage(self, name: str, x: Tensor) -> Tensor:
        """Residual blocks and, except in the last stage, an upsampler beside a DupUp shortcut."""
        first = self.first_visit(name)
        y = x
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
        """One latent frame [1, 48, 1, h, w] to [1, 12, 1 or 4, 8h, 8w]."""
        x = self.middle("decoder.middle", self.causal_conv("decoder.conv1", x))
        for stage in self.children("decoder.upsamples"):
            x = self.up_stage(f"decoder.upsamples.{stage}.upsamples", x)
        return self.head("decoder.head", x)

    def downsample(self, name: str, x: Tensor) -> Tensor:
        """Halve the sides, then (with a time_conv, after the first chunk) the frames."""
        x = self.frame_conv(f"{name}.resample.1", F.pad(x, (0, 1, 0, 1)), stride=2)
        if f"{name}.time_conv.weight" not in self.state:
            return x
        before = self.cache.get(name)
        self.cache[name] = x[:, :, -1:]
        if before is None:
            return x
        joined = torch.cat([before, x], dim=2)
        weight, bias = self.state[f"{name}.time_conv.weight"], self.state[f"{name}.time_conv.bias"]
        return F.conv3d(joined, weight, bias, stride=(2, 1, 1))

    def down_stage(self, name: str, x: Tensor) -> Tensor:
        """Residual blocks and, but for the last stage, a downsampler; plus an AvgDown shortcut."""
        y, ft, fs = x, 1, 1
        for index in self.children(name):
            child = f"{name}.{index}"
            if f"{child}.resample.1.weight" in self.state:
                fs = 2
                ft = 2 if f"{child}.time_conv.weight" in self.state else 1
                y = self.downsample(child, y)
            else:
                y = self.residual(child, y)
        return y + avg_down(x, y.shape[1], ft, fs)

    def encode_chunk(self, x: Tensor) -> Tensor:
        """1 or 4 patchified frames [1, 12, T, H, W] to one latent frame [1, 96, 1, H/8, W/8]."""
        x = self.causal_conv("encoder.conv1", x)
        for stage in self.children("encoder.downsamples"):
            x = self.down_stage(f"encoder.downsamples.{stage}.downsamples", x)
        return self.head("encoder.head", self.middle("encoder.middle", x))


def post_conv2(state: State, z: Tensor) -> Tensor:
    """Latent [48, T, h, w] to the decoder's input [1, 48, T, h, w]."""
    mean, inv_std = latent_scale(z.device)
    return Stream(state).causal_conv("conv2", z[None] / inv_std + mean)


def decode_chunks(state: State, z: Tensor) -> list[Tensor]:
    """The decoder's 12-channel output per latent frame of z [48, T, h, w]."""
    stream = Stream(state)
    return [stream.decode_chunk(frame) for frame in post_conv2(state, z).split(1, dim=2)]


def decode(state: State, z: Tensor) -> Tensor:
    """Latent [48, T, h, w] to video [3, F, 16h, 16w], not clamped."""
    return pixel_unpatchify(torch.cat(decode_chunks(state, z), dim=2))[0]


def encode(state: State, video: Tensor) -> Tensor:
    """Video [3, 1 + 4n, H, W] to the latent [48, 1 + n, H/16, W/16]."""
    stream = Stream(state)
    x = pixel_patchify(video[None])
    sizes = [1] + [4] * ((x.shape[2] - 1) // 4)
    out = torch.cat([stream.encode_chunk(chunk) for chunk in x.split(sizes, dim=2)], dim=2)
    mean, inv_std = latent_scale(video.device)
    mu = stream.causal_conv("conv1", out).chunk(2, dim=1)[0]
    return ((mu - mean) * inv_std)[0]


def tile_ranges(width: int, strips: int, overlap: int) -> list[tuple[int, int]]:
    """Latent columns of each tile: equal strips (the last takes the rest), widened inwards."""
    base = width // strips
    starts = [i * base for i in range(strips)]
    ends = [*starts[1:], width]
    return [
        (max(0, start - overlap), min(width, end + overlap))
        for start, end in zip(starts, ends, strict=True)
    ]


def tile_mask(columns: int, overlap: int, *, is_first: bool, is_last: bool) -> Tensor:
    """Weight per pixel column of one tile: a cosine ramp on each side that has a neighbour."""
    mask = torch.ones(16 * columns)
    pixels = min(16 * overlap, len(mask))
    ramp = 0.5 - 0.5 * torch.cos(math.pi * torch.linspace(0, 1, pixels))
    if not is_first and pixels:
        mask[:pixels] *= ramp
    if not is_last and pixels:
        mask[-pixels:] *= ramp.flip(0)
    return mask


def decode_tiled(state: State, z: Tensor, strips: int, overlap: int) -> Tensor:
    """Official blended tiles along the width: each decoded in full, clamped, averaged."""
    _, t, h, width = z.shape
    total = torch.zeros(3, 1 + 4 * (t - 1), 16 * h, 16 * width)
    weight = torch.zeros(16 * width)
    for i, (start, end) in enumerate(tile_ranges(width, strips, overlap)):
        tile = decode(state, z[..., start:end]).clamp(-1, 1).cpu()
        mask = tile_mask(end - start, overlap, is_first=i == 0, is_last=i == strips - 1)
        total[..., 16 * start : 16 * end] += tile * mask
        weight[16 * start : 16 * end] += mask
    return total / weight.clamp_min(1e-6)


def to_uint8(video: Tensor) -> Tensor:
    """Video [..] in [-1, 1] to bytes, truncating."""
    return ((video + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
