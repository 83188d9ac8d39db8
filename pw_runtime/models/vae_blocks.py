# SPDX-License-Identifier: Apache-2.0
"""Layers of the Wan2.2 VAE, with the official parameter names (vae2_2.py).

A clip passes through in chunks of frames. The past frames that a chunk needs are kept in a
`CausalCache`, which the caller owns: one per clip and tile. Activations are channels-last in
memory, [T, H, W, C], on every device: the fastest layout for norms and thin convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pw_kernels import (
    causal_conv3d,
    channel_norm,
    chunked_attention,
    dup_up_add,
    phase_taps,
    upsample2x_conv,
)
from pw_runtime.models.causal_cache import CausalCache

ROWS = 2  # by which a residual block lags behind its input in bands: one for each convolution


class CausalConv3d(nn.Conv3d):
    """3-D convolution whose left padding in time is the past frames.

    Attributes:
        keeps_rows: in bands, it keeps the rows that the next band needs; otherwise its caller does.
    """

    keeps_rows = True

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:  # type: ignore[override]
        """Convolve, [B, C, T, H, W] -> [B, C', T, H, W]."""
        if self.kernel_size[0] == 1:
            return causal_conv3d(x, self.weight, self.bias)
        buffer, frames = self.buffer(x, cache)
        frames.copy_(x)
        return self.convolve(buffer, cache)

    def buffer(self, x: Tensor, cache: CausalCache) -> tuple[Tensor, Tensor]:
        """Allocate the input of `convolve` and fill everything except the frames.

        Args:
            x: [B, C, T, H, W], of which only shape, dtype and device are used.
            cache: cache of this part.

        Returns:
            [B, C, kt-1+T, H, W], the past and then the frames, and the view of it in which to
            write the frames. For a band, more rows: on top those kept from the band above, or
            zeros above the frame, and at the bottom of the frame zeros.
        """
        history, (above, below) = self.kernel_size[0] - 1, self._beside(cache)
        b, c, t, h, w = x.shape
        shape = (b, c, history + t, above + h + below, w)
        order = torch.channels_last_3d
        buffer = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order)
        buffer[:, :, :, above + h :] = 0
        seen = buffer[:, :, :, : above + h]
        seen[:, :, :history] = cache.past.get(self, 0)
        if above:
            assert cache.seam is not None
            kept = cache.seam.above(self, x, above) if self.keeps_rows else None
            seen[:, :, history:, :above] = 0 if kept is None else kept
        return buffer, seen[:, :, history:, above:]

    def _beside(self, cache: CausalCache) -> tuple[int, int]:
        """Return how many rows a buffer has above and below those of the band; 0 without bands."""
        seam, reach = cache.seam, self.kernel_size[1] // 2
        if seam is None or reach == 0:
            return 0, 0
        return reach if seam.top else 2 * reach, reach if seam.bottom else 0

    def normed(
        self, x: Tensor, norm: nn.Module, cache: CausalCache, above: Tensor | None = None
    ) -> Tensor:
        """Write norm and SiLU of x, [B, C, T, H, W], into a buffer for `convolve`.

        The norm writes where the convolution reads: nothing is concatenated, padded or copied.
        `above` are the rows above x, where the caller has kept them.
        """
        buffer, frames = self.buffer(x, cache)
        norm(x, silu=True, out=frames)
        if above is not None:
            rows = buffer[:, :, buffer.shape[2] - x.shape[2] :, : above.shape[3]]
            norm(above, silu=True, out=rows)
        return buffer

    def convolve(self, buffer: Tensor, cache: CausalCache) -> Tensor:
        """Convolve a filled buffer and keep its last frames as the past of the next chunk.

        Keeps its last rows for the band below, if the chunk is decoded in bands.
        """
        history, (above, below) = self.kernel_size[0] - 1, self._beside(cache)
        cache.keep(self, buffer[:, :, -history:, : buffer.shape[3] - below])
        if above and self.keeps_rows:
            assert cache.seam is not None
            reach = self.kernel_size[1] // 2
            cache.seam.keep(self, buffer[:, :, history:, -2 * reach :])
        return causal_conv3d(buffer, self.weight, self.bias, rows_given=above > 0)


class ChannelNorm(nn.Module):
    """RMS norm over channels; `dims` counts the dimensions after the channel."""

    def __init__(self, channels: int, *, dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dims))

    def forward(self, x: Tensor, *, silu: bool, out: Tensor | None = None) -> Tensor:
        """Normalise and, if `silu`, apply SiLU; write to `out` if given."""
        return channel_norm(x, self.gamma, silu=silu, out=out)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, plus the input, projected if the width changes."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(c_in),
                "2": CausalConv3d(c_in, c_out, 3),
                "3": ChannelNorm(c_out),
                "6": CausalConv3d(c_out, c_out, 3),
            }
        )
        self.shortcut = CausalConv3d(c_in, c_out, 1) if c_in != c_out else None
        first = self.residual["2"]
        assert isinstance(first, CausalConv3d)
        first.keeps_rows = self.shortcut is not None  # else the shortcut keeps the same rows

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Run the block, [B, C, T, H, W] -> [B, C', T, H, W]."""
        first, second = self.residual["2"], self.residual["6"]
        assert isinstance(first, CausalConv3d)
        assert isinstance(second, CausalConv3d)
        above = None
        if cache.seam is not None and not first.keeps_rows:
            above = cache.seam.above(self, x, ROWS)
        h = first.convolve(first.normed(x, self.residual["0"], cache, above), cache)
        del above
        buffer = second.normed(h, self.residual["3"], cache)
        del h  # otherwise a third of the peak, beside the buffer and the result
        h = second.convolve(buffer, cache)
        del buffer
        if self.shortcut is not None:
            x = self.shortcut(x, cache)
        if cache.seam is None:
            h += x
        else:
            cache.seam.add(self, h, x, Tensor.add_, lag=ROWS)
        return h


class AttentionBlock(nn.Module):
    """Single-head attention over the positions of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, dims=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Attend within each frame, [1, C, T, H, W] -> the same shape; the cache is unused."""
        out = torch.empty_like(x)
        for frame, result in zip(x.unbind(2), out.unbind(2), strict=True):
            result.copy_(self._frame(frame))
        return out

    def _frame(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x, silu=False))  # [1, 3C, H, W]
        q, k, v = qkv[0].flatten(1).T.chunk(3, dim=-1)  # [HW, C]
        y = chunked_attention(q, k, v).T.reshape(x.shape)
        out: Tensor = x + self.proj(y)
        return out


class Upsample(nn.Module):
    """Double rows and columns, and frames where `temporal`."""

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, padding=1)})
        kernel = (3, 1, 1)
        self.time_conv = CausalConv3d(channels, 2 * channels, kernel) if temporal else None
        self.taps: Tensor | None
        self.register_buffer("taps", None, persistent=False)  # computed on first use
        self.register_load_state_dict_post_hook(_forget_taps)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Upsample:
        _forget_taps(self)  # the weight moves or changes dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Upsample, [1, C, T, H, W] -> [1, C, T or 2T, 2H, 2W]; the first chunk keeps its T."""
        if self.time_conv is not None and not cache.first:
            x = interleave_frames(self.time_conv(x, cache))
        conv = self.resample["1"]
        assert isinstance(conv, nn.Conv2d)
        frames, above, below = x[0].transpose(0, 1), 0, 0  # [T, C, H, W]
        if cache.seam is not None:
            frames, above, below = cache.seam.join(self, frames)
        taps = self.made_taps()
        out = upsample2x_conv(frames, taps, conv.bias, above=above, below=below)
        return out[None].transpose(1, 2)  # in this order, for the strides that convolutions need

    def made_taps(self) -> Tensor:
        """Return the `phase_taps` of the weight, [4, C, C, 2, 2], computed once."""
        if self.taps is None:
            self.taps = phase_taps(self.resample["1"].weight)  # type: ignore[arg-type]
        return self.taps


def _forget_taps(upsample: nn.Module, incompatible_keys: object = None) -> None:
    assert isinstance(upsample, Upsample)
    upsample.taps = None


def interleave_frames(x: Tensor) -> Tensor:
    """Interleave channels of even and of odd frames, [1, 2C, T, H, W] -> [1, C, 2T, H, W]."""
    pairs = x.unflatten(1, (2, -1)).transpose(1, 2).transpose(2, 3)  # [1, C, T, 2, H, W]
    _, c, t, _, h, w = pairs.shape
    order = torch.channels_last_3d
    out = torch.empty((1, c, 2 * t, h, w), dtype=x.dtype, device=x.device, memory_format=order)
    out.unflatten(2, (t, 2)).copy_(pairs)
    return out


class UpStage(nn.Module):
    """Residual blocks, then an upsampling with a duplicating shortcut around the stage."""

    def __init__(self, c_in: int, c_out: int, blocks: int, *, up: bool, temporal: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [ResidualBlock(c_in, c_out)]
        layers += [ResidualBlock(c_out, c_out) for _ in range(blocks - 1)]
        if up:
            layers.append(Upsample(c_out, temporal=temporal))
        self.upsamples = nn.ModuleList(layers)
        self.up, self.time_factor = up, 2 if temporal else 1
        self.lag = 2 * blocks + 1  # rows, in bands: one for each convolution before the result

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Run the stage, [1, C, T, H, W] -> [1, C', T', H', W']."""
        h = x
        for layer in self.upsamples:
            h = layer(h, cache)
        if not self.up:
            return h
        spread = partial(
            dup_up_add, time_factor=self.time_factor, space_factor=2, first=cache.first
        )
        if cache.seam is None:
            return spread(h, x)
        cache.seam.add(self, h, x, spread, lag=self.lag, grow=2)
        return h


class Downsample(nn.Module):
    """Halve rows and columns, and frames where `temporal`."""

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = (
            nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None
        )

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Downsample, [1, C, T, H, W] -> [1, C, T or T/2, H/2, W/2]; the first frame keeps T."""
        frames = F.pad(x[0].transpose(0, 1), (0, 1, 0, 1))  # zero right and bottom
        x = self.resample["1"](frames)[None].transpose(1, 2)
        if self.time_conv is None:
            return x
        past = cache.past.get(self)
        cache.past[self] = x[:, :, -1:].clone()
        return x if past is None else self.time_conv(torch.cat((past, x), dim=2))


class DownStage(nn.Module):
    """Residual blocks, then a downsampling with an averaging shortcut around the stage."""

    def __init__(self, c_in: int, c_out: int, blocks: int, *, down: bool, temporal: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [ResidualBlock(c_in, c_out)]
        layers += [ResidualBlock(c_out, c_out) for _ in range(blocks - 1)]
        if down:
            layers.append(Downsample(c_out, temporal=temporal))
        self.downsamples = nn.ModuleList(layers)
        self.channels = c_out
        self.time_factor, self.space_factor = 2 if temporal else 1, 2 if down else 1

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Run the stage, [1, C, T, H, W] -> [1, C', T', H', W']."""
        h = x
        for layer in self.downsamples:
            h = layer(h, cache)
        return h + avg_down(x, self.channels, self.time_factor, self.space_factor)


def avg_down(x: Tensor, channels: int, time_factor: int, space_factor: int) -> Tensor:
    """Fold a finer grid into channels and average them in groups (official AvgDown3D).

    Args:
        x: [B, C, T, H, W]; T is zero-padded on the left to a multiple of `time_factor`.
        channels: C' of the result; each is the mean of C ft fs^2 / C' channels.
        time_factor: ft, frames folded into one.
        space_factor: fs, rows, and likewise columns, folded into one.

    Returns:
        [B, C', ceil(T/ft), H/fs, W/fs].
    """
    ft, fs = time_factor, space_factor
    b, c, t, h, w = x.shape
    x = F.pad(x, (0, 0, 0, 0, -t % ft, 0))
    x = x.reshape(b, c, -1, ft, h // fs, fs, w // fs, fs).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(b, channels, -1, *x.shape[5:]).mean(dim=2)
