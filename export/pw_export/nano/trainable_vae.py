# SPDX-License-Identifier: Apache-2.0
"""Differentiable forward passes of the runtime's VAE, on batches of whole clips.

Like `trainable`, it calls the modules of pw_runtime.models. A whole clip gives the same as the
runtime's chunks, because the past of a chunk is the frames before it; only the first frame is
treated differently.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pw_kernels import causal_conv3d
from pw_runtime.models.vae import VaeDecoder, VaeEncoder
from pw_runtime.models.vae_blocks import (
    AttentionBlock,
    CausalConv3d,
    ChannelNorm,
    Downsample,
    DownStage,
    ResidualBlock,
    Upsample,
    UpStage,
    avg_down,
)


def decode_clips(vae: VaeDecoder, latents: Tensor) -> Tensor:
    """Decode [B, C, T, H, W] normalised latents to [B, 3, F, 16 H, 16 W], not clamped."""
    shape = (1, -1, 1, 1, 1)
    mean = latents.new_tensor(vae.config.latent_mean).view(shape)
    std = latents.new_tensor(vae.config.latent_std).view(shape)
    x = (latents * std + mean).contiguous(memory_format=torch.channels_last_3d)
    x = _conv(vae.decoder.conv1, _conv(vae.conv2, x))
    for layer in vae.decoder.middle:
        x = _layer(layer, x)
    for stage in vae.decoder.upsamples:
        x = _up(stage, x)
    return unfold_pixels(_head(vae.decoder.head, x))


def encode_clips(vae: VaeEncoder, videos: Tensor) -> Tensor:
    """Encode [B, 3, F, height, width] in [-1, 1] to [B, C, T, H, W] normalised latents."""
    x = fold_pixels(videos).contiguous(memory_format=torch.channels_last_3d)
    x = _conv(vae.encoder.conv1, x)
    for stage in vae.encoder.downsamples:
        x = _down(stage, x)
    for layer in vae.encoder.middle:
        x = _layer(layer, x)
    x = _conv(vae.conv1, _head(vae.encoder.head, x))
    shape = (1, -1, 1, 1, 1)
    mean = x.new_tensor(vae.config.latent_mean).view(shape)
    std = x.new_tensor(vae.config.latent_std).view(shape)
    return (x[:, : vae.config.z_dim] - mean) / std


def fold_pixels(x: Tensor) -> Tensor:
    """Fold pixels [B, 3, F, h, w] to [B, 12, F, h/2, w/2], channel (colour, column, row)."""
    x = x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))  # [B, 3, F, h/2, 2, w/2, 2]
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unfold_pixels(x: Tensor) -> Tensor:
    """Invert `fold_pixels`: [B, 12, F, h/2, w/2] -> [B, 3, F, h, w]."""
    x = x.unflatten(1, (3, 2, 2)).permute(0, 1, 4, 5, 3, 6, 2)
    return x.flatten(5, 6).flatten(3, 4)


def _conv(conv: nn.Module, x: Tensor) -> Tensor:
    """Convolve with zeros as the past."""
    assert isinstance(conv, CausalConv3d)
    past = conv.kernel_size[0] - 1
    x = F.pad(x, (0, 0, 0, 0, past, 0)) if past else x
    return causal_conv3d(x, conv.weight, conv.bias)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(norm, ChannelNorm)
    return F.normalize(x, dim=1) * (norm.gamma * x.shape[1] ** 0.5)


def _head(head: nn.ModuleDict, x: Tensor) -> Tensor:
    return _conv(head["2"], F.silu(_norm(head["0"], x)))


def _layer(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, AttentionBlock):
        return _attention(layer, x)
    if isinstance(layer, Upsample):
        return _upsample(layer, x)
    if isinstance(layer, Downsample):
        return _downsample(layer, x)
    assert isinstance(layer, ResidualBlock)
    residual = layer.residual
    h = _conv(residual["2"], F.silu(_norm(residual["0"], x)))
    h = _conv(residual["6"], F.silu(_norm(residual["3"], h)))
    return h + (x if layer.shortcut is None else _conv(layer.shortcut, x))


def _attention(block: AttentionBlock, x: Tensor) -> Tensor:
    batch, frames = x.shape[0], x.shape[2]
    x = x.transpose(1, 2).flatten(0, 1)  # [B T, C, H, W]
    qkv = block.to_qkv(_norm(block.norm, x)).flatten(2).mT  # [B T, H W, 3C]
    y = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1)).mT.view_as(x)
    return (x + block.proj(y)).unflatten(0, (batch, frames)).transpose(1, 2)


def _frames(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2-D convolution to every frame of [B, C, T, H, W]."""
    y: Tensor = conv(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def _upsample(layer: Upsample, x: Tensor) -> Tensor:
    if layer.time_conv is not None and x.shape[2] > 1:  # the first frame is not doubled
        pairs = _conv(layer.time_conv, x[:, :, 1:]).unflatten(1, (2, -1))
        pairs = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        x = torch.cat((x[:, :, :1], pairs), dim=2)
    x = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")
    return _frames(layer.resample["1"], x)


def _up(stage: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(stage, UpStage)
    h = x
    for layer in stage.upsamples:
        h = _layer(layer, h)
    return h + _duplicated(x, h.shape[1], stage.time_factor) if stage.up else h


def _duplicated(x: Tensor, channels: int, ft: int) -> Tensor:
    """Apply the official DupUp3D: [B, C, T, H, W] -> [B, channels, ft T - (ft-1), 2H, 2W]."""
    x = x.repeat_interleave(channels * ft * 4 // x.shape[1], dim=1).unflatten(1, (-1, ft, 2, 2))
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)  # [B, channels, T, ft, H, 2, W, 2]
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, ft - 1 :]


def _downsample(layer: Downsample, x: Tensor) -> Tensor:
    x = _frames(layer.resample["1"], F.pad(x, (0, 1, 0, 1)))
    if layer.time_conv is None or x.shape[2] == 1:
        return x
    return torch.cat((x[:, :, :1], layer.time_conv(x)), dim=2)  # the first frame is kept


def _down(stage: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(stage, DownStage)
    h = x
    for layer in stage.downsamples:
        h = _layer(layer, h)
    factors = (stage.channels, stage.time_factor, stage.space_factor)
    return h + avg_down(x, *factors)
