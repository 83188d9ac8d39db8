# SPDX-License-Identifier: Apache-2.0
"""Configs of the tiny networks that tests share.

The golden tensors (`tests/data/golden`) were made with the networks TINY_*.
"""

from __future__ import annotations

from dataclasses import replace

from pw_export import wan22_configs
from pw_runtime.types import DitConfig, TextEncoderConfig

TINY_DRAFT = DitConfig(dim=128, ffn_dim=320, num_heads=2, num_layers=4, text_dim=64, text_len=16)
TINY_HIGHRES = replace(TINY_DRAFT, has_dt=True, adapter_dim=32, control_blocks=(1,))
TINY_VAE = replace(
    wan22_configs.VAE, encoder_dims=(4, 4, 8, 16, 16), decoder_dims=(32, 32, 32, 16, 8)
)
# Every kind of layer of the decoder, once or twice: for compilers and exporters, which are slow.
SMALLEST_VAE = replace(
    TINY_VAE, decoder_dims=(16, 16, 8, 8), decoder_blocks=1, temporal_downsample=(True, True)
)
TINY_TEXT_ENCODER = TextEncoderConfig(
    vocab_size=96, dim=32, attention_dim=48, ffn_dim=56, num_heads=4, num_layers=3
)
