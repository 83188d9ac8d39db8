# SPDX-License-Identifier: Apache-2.0
"""The encoder of the official Wan2.2 VAE, streamed like `pw_bench.official.vae`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pw_bench.official.vae import State, Stream, latent_scale


def avg_down(x: Tensor, out: int, ft: int, fs: int) -> Tensor:
    """Downsample without parameters: means over groups of (channel, frame, row, column)."""
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % ft, 0))
    _, channels, t, h, w = x.shape
    x = x.view(1, channels, t // ft, ft, h // fs, fs, w // fs, fs).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(1, out, -1, t // ft, h // fs, w // fs).mean(dim=2)


def pixel_patchify(video: Tensor) -> Tensor:
    """Fold [1, 3, T, 2H, 2W] to [1, 12, T, H, W]: channel, column offset, row offset."""
    b, c, t, h, w = video.shape
    x = video.view(b, c, t, h // 2, 2, w // 2, 2).permute(0, 1, 6, 4, 2, 3, 5)
    return x.reshape(b, 4 * c, t, h // 2, w // 2)


class Encoder(Stream):
    """One pass over a clip."""

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
        """Run residual blocks, a downsampler except in the last stage, and an AvgDown shortcut."""
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
        """Encode 1 or 4 folded frames [1, 12, T, H, W] to a latent frame [1, 96, 1, H/8, W/8]."""
        x = self.causal_conv("encoder.conv1", x)
        for stage in self.children("encoder.downsamples"):
            x = self.down_stage(f"encoder.downsamples.{stage}.downsamples", x)
        return self.head("encoder.head", self.middle("encoder.middle", x))


def encode(state: State, video: Tensor) -> Tensor:
    """Encode a video [3, 1 + 4n, H, W] to a latent [48, 1 + n, H/16, W/16]."""
    stream = Encoder(state)
    x = pixel_patchify(video[None])
    sizes = [1] + [4] * ((x.shape[2] - 1) // 4)
    out = torch.cat([stream.encode_chunk(chunk) for chunk in x.split(sizes, dim=2)], dim=2)
    mean, inv_std = latent_scale(video.device)
    mu = stream.causal_conv("conv1", out).chunk(2, dim=1)[0]
    return ((mu - mean) * inv_std)[0]
