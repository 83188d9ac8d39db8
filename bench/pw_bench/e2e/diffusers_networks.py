# SPDX-License-Identifier: Apache-2.0
"""diffusers' networks of Wan2.2-TI2V-5B and transformers' text encoder, built from our configs."""

from __future__ import annotations

from typing import Any

from pw_runtime.types import PATCH, VAE_STRIDE, DitConfig, TextEncoderConfig, VaeConfig

MAX_POSITIONS = 1024  # of their rotary table


def wan_transformer(config: DitConfig) -> Any:
    """Return a WanTransformer3DModel with random weights, on the default device."""
    from diffusers import WanTransformer3DModel

    model: Any = WanTransformer3DModel
    return model(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        eps=config.eps,
    )


def rotary_table(config: DitConfig, net: Any) -> Any:
    """Return the rotary table of a transformer that was built on the meta device."""
    return type(net.rope)(config.head_dim, (1, PATCH, PATCH), MAX_POSITIONS)


def wan_autoencoder(config: VaeConfig) -> Any:
    """Return an AutoencoderKLWan with random weights, on the default device."""
    from diffusers import AutoencoderKLWan

    model: Any = AutoencoderKLWan
    base = config.encoder_dims[0]
    return model(
        base_dim=base,
        decoder_base_dim=config.decoder_dims[-1],
        z_dim=config.z_dim,
        dim_mult=[dim // base for dim in config.encoder_dims[1:]],
        num_res_blocks=config.encoder_blocks,
        temperal_downsample=list(config.temporal_downsample),
        is_residual=True,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        patch_size=PATCH,
        scale_factor_temporal=VAE_STRIDE[0],
        scale_factor_spatial=VAE_STRIDE[1],
        latents_mean=list(config.latent_mean),
        latents_std=list(config.latent_std),
    )


def umt5_encoder(config: TextEncoderConfig) -> Any:
    """Return a UMT5EncoderModel with random weights, on the default device."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=config.vocab_size,
            d_model=config.dim,
            d_kv=config.attention_dim // config.num_heads,
            d_ff=config.ffn_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.num_buckets,
            relative_attention_max_distance=config.max_distance,
            layer_norm_epsilon=config.eps,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            use_cache=False,
        )
    )
