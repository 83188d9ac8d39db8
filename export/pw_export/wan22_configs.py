# SPDX-License-Identifier: Apache-2.0
"""Configs of the published networks: Wan2.2-TI2V-5B and PixelWizard's high-res transformer."""

from __future__ import annotations

from dataclasses import replace

from pw_runtime.checkpoint.bundle import Entry, Networks
from pw_runtime.types import DitConfig, TextEncoderConfig, VaeConfig

# Mean and standard deviation of the latent channels, from wan/modules/vae2_2.py (Wan2.2).
# fmt: off
LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on

DRAFT = DitConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, text_dim=4096)
HIGHRES = replace(DRAFT, has_dt=True, adapter_dim=768, control_blocks=(1,))
VAE = VaeConfig(
    z_dim=48,
    encoder_dims=(160, 160, 320, 640, 640),
    decoder_dims=(1024, 1024, 1024, 512, 256),
    encoder_blocks=2,
    decoder_blocks=3,
    temporal_downsample=(False, True, True),
    latent_mean=LATENT_MEAN,
    latent_std=LATENT_STD,
)
TEXT_ENCODER = TextEncoderConfig(
    vocab_size=256384, dim=4096, attention_dim=4096, ffn_dim=10240, num_heads=64, num_layers=24
)
NETWORKS = Networks(
    draft=Entry(config=DRAFT, dtype="", files=()),
    highres=Entry(config=HIGHRES, dtype="", files=()),
    vae=Entry(config=VAE, dtype="", files=()),
    text_encoder=Entry(config=TEXT_ENCODER, dtype="", files=()),
)
"""All networks without files, for `pw plan`, which needs only their configs."""
