# SPDX-License-Identifier: Apache-2.0
"""The Wan2.2 VAE in streaming form: one latent frame in, its pixel frames out.

Source: wan/modules/vae2_2.py. Everything is fp32, as there, except in a decoder loaded in bf16,
whose products are bf16 while norms and softmax stay fp32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pw_runtime.models.causal_cache import CausalCache
from pw_runtime.models.finite import require_finite_weights
from pw_runtime.models.vae_blocks import (
    AttentionBlock,
    CausalConv3d,
    ChannelNorm,
    DownStage,
    ResidualBlock,
    UpStage,
)
from pw_runtime.types import VAE_STRIDE, VaeConfig

PIXEL_CHANNELS = 12  # 3 colours of a 2x2 pixel block


class Middle(nn.ModuleList):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            [ResidualBlock(channels, channels), AttentionBlock(channels)]
            + [ResidualBlock(channels, channels)]
        )

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Run all three, [1, C, T, H, W] -> the same shape."""
        for layer in self:
            x = layer(x, cache)
        return x


class HeadLayers(nn.ModuleDict):
    """Norm, SiLU, convolution."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__({"0": ChannelNorm(c_in), "2": CausalConv3d(c_in, c_out, 3)})

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Run all three, [1, C, T, H, W] -> [1, C', T, H, W]."""
        conv = self["2"]
        assert isinstance(conv, CausalConv3d)
        return conv.convolve(conv.normed(x, self["0"], cache), cache)


class DecoderLayers(nn.Module):
    """Layers of the decoder, named as in the checkpoint."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        dims = config.decoder_dims
        temporal = (*reversed(config.temporal_downsample), False)
        last = len(dims) - 2
        self.conv1 = CausalConv3d(config.z_dim, dims[0], 3)
        self.middle = Middle(dims[0])
        self.upsamples = nn.ModuleList(
            UpStage(dims[i], dims[i + 1], config.decoder_blocks, up=i != last, temporal=temporal[i])
            for i in range(last + 1)
        )
        self.head = HeadLayers(dims[-1], PIXEL_CHANNELS)


class VaeDecoder(nn.Module):
    """Latent frames to pixel frames, cut where exact tiling is possible.

    `global_part` holds all that needs the whole frame (its attention sees every position);
    `local_part` is purely convolutional, so bands of it, which hand on rows, or strips with a large
    enough halo give the same result. For engines the cut is one stage further, where frames are
    doubled for the first time: `coarse`, then `fine`.
    """

    exact_tiling: Literal["bands"] = "bands"  # how an exact decode is divided into tiles

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = DecoderLayers(config)

    def coarse(self, frame: Tensor, cache: CausalCache) -> Tensor:
        """Run the first part on one whole latent frame.

        Args:
            frame: [C, 1, H, W] normalised latent.
            cache: cache of this part.

        Returns:
            [1, C', t, 2H, 2W], t = 1 for the first frame of a clip and 2 after it.
        """
        x = self.denormalised(frame)
        return self.coarse_layers(x.to(self.conv2.weight.dtype), cache)

    def denormalised(self, frame: Tensor) -> Tensor:
        """Undo the normalisation of a latent, [C, 1, H, W] -> [1, C, 1, H, W]."""
        mean = frame.new_tensor(self.config.latent_mean).view(-1, 1, 1, 1)
        std = frame.new_tensor(self.config.latent_std).view(-1, 1, 1, 1)
        # Divide by 1/std as the official code does: z * std rounds differently.
        x = (frame / (1 / std) + mean)[None]
        return x.contiguous(memory_format=torch.channels_last_3d)

    def coarse_layers(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Run the layers of `coarse`, [1, C, 1, H, W] -> [1, C', t, 2H, 2W]."""
        x = self.decoder.upsamples[0](self._middle(x, cache), cache)
        cache.first = False
        return x

    def global_part(self, frame: Tensor, cache: CausalCache) -> Tensor:
        """Run what must see the whole of a latent frame: everything up to the attention.

        Args:
            frame: [C, 1, H, W] normalised latent.
            cache: cache of this part.

        Returns:
            [1, C', 1, H, W].
        """
        x = self.denormalised(frame)
        return self._middle(x.to(self.conv2.weight.dtype), cache)

    def local_part(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Run what follows, which only convolves, on a frame or on a band of its rows.

        Args:
            x: [1, C', 1, rows, W] from `global_part`.
            cache: cache of this part. If it has a seam, x is the next band of rows, and the rows
                of the result lag behind it by `band_lag` latent rows, but at the bottom.

        Returns:
            [12, F, 8 rows, 8 W] as `fine` does.
        """
        return self.fine(self.decoder.upsamples[0](x, cache), cache)

    def _middle(self, x: Tensor, cache: CausalCache) -> Tensor:
        x = self.conv2(x, cache)
        x = self.decoder.middle(self.decoder.conv1(x, cache), cache)
        return x

    def fine(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Run the second part on a whole frame or on any tile of it.

        Args:
            x: [1, C', t, rows, columns] from `coarse`.
            cache: cache of this part.

        Returns:
            [12, F, 4 rows, 4 columns] fp32 colours of 2x2 pixel blocks (see
            `unpatchify_pixels`), not clamped; F = 1 for the first frame, then 4.
        """
        for layer in (*self.decoder.upsamples[1:-1], *self._frame_layers()):
            x = layer(x, cache)
        cache.first = False
        return _colours(x)

    def fine_layers(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Run the stages of `fine` that upsample, all except the last one.

        Args:
            x: [1, C', t, rows, columns] from `coarse`.
            cache: cache of this part.

        Returns:
            [1, C'', F, 4 rows, 4 columns], F = 1 for the first frame, then 4.
        """
        for stage in self.decoder.upsamples[1:-1]:
            x = stage(x, cache)
        cache.first = False
        return x

    def frame_layers(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Run the last stage of `fine` and the head, on any number of frames at a time.

        Args:
            x: [1, C'', F, 4 rows, 4 columns] from `fine_layers`, or some frames of it.
            cache: cache of this part.

        Returns:
            [12, F, 4 rows, 4 columns] as `fine` does.
        """
        for layer in self._frame_layers():
            x = layer(x, cache)
        return _colours(x)

    def _frame_layers(self) -> tuple[nn.Module, ...]:
        """List the head and, before it, the last stage's blocks: it would keep its input alive."""
        last = self.decoder.upsamples[-1]
        assert isinstance(last, UpStage)
        assert not last.up
        return (*last.upsamples, self.decoder.head)

    def check_weights(self) -> None:
        """Raise BadWeights naming the weights that hold NaN or infinity."""
        require_finite_weights(self)


def _colours(x: Tensor) -> Tensor:
    """Return the result of the head, [1, 12, F, H, W], as [12, F, H, W] in fp32 or wider."""
    return x[0].float() if x.dtype == torch.bfloat16 else x[0]


class EncoderLayers(nn.Module):
    """Layers of the encoder, named as in the checkpoint."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        dims = config.encoder_dims
        temporal = (*config.temporal_downsample, False)
        last = len(dims) - 2
        self.conv1 = CausalConv3d(PIXEL_CHANNELS, dims[0], 3)
        self.downsamples = nn.ModuleList(
            DownStage(
                dims[i], dims[i + 1], config.encoder_blocks, down=i != last, temporal=temporal[i]
            )
            for i in range(last + 1)
        )
        self.middle = Middle(dims[-1])
        self.head = HeadLayers(dims[-1], 2 * config.z_dim)


class VaeEncoder(nn.Module):
    """Pixel frames to latent frames, for clips that start from a picture or a video; all fp32."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = EncoderLayers(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)

    def forward(self, video: Tensor) -> Tensor:
        """Encode a clip, its first frame alone and then four frames at a time.

        Args:
            video: [3, F, height, width] in [-1, 1], F = 4n+1, sizes multiples of 16.

        Returns:
            [C, T, H, W] normalised mean of the latent distribution.
        """
        cache = CausalCache()
        parts = (video[:, :1], *video[:, 1:].split(VAE_STRIDE[0], dim=1))
        latents = [self.latent_frame(part, cache) for part in parts if part.shape[1]]
        return torch.cat(latents, dim=1)

    def latent_frame(self, pixels: Tensor, cache: CausalCache) -> Tensor:
        """Encode the frames of one latent frame.

        Args:
            pixels: [3, 1, height, width] in [-1, 1] first, then [3, 4, height, width].
            cache: of the clip.

        Returns:
            [C, 1, H, W] normalised mean of the latent distribution.
        """
        x = self.encoder.conv1(self._patchify(pixels), cache)
        for stage in self.encoder.downsamples:
            x = stage(x, cache)
        x = self.conv1(self.encoder.head(self.encoder.middle(x, cache), cache), cache)
        mean = x.new_tensor(self.config.latent_mean).view(-1, 1, 1, 1)
        std = x.new_tensor(self.config.latent_std).view(-1, 1, 1, 1)
        return (x[0, : self.config.z_dim] - mean) * (1 / std)

    def check_weights(self) -> None:
        """Raise BadWeights naming the weights that hold NaN or infinity."""
        require_finite_weights(self)

    @staticmethod
    def _patchify(video: Tensor) -> Tensor:
        """Fold 2x2 pixels into channels (colour, column, row): [1, 12, F, h/2, w/2]."""
        c, f, h, w = video.shape
        x = video.reshape(c, f, h // 2, 2, w // 2, 2).permute(0, 5, 3, 1, 2, 4)
        return x.reshape(1, c * 4, f, h // 2, w // 2)
