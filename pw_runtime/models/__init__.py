# SPDX-License-Identifier: Apache-2.0
"""The networks as mathematics: no files, no devices, no settings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import nn

from pw_runtime.models.dit import WanDiT
from pw_runtime.models.text_encoder import TextEncoder
from pw_runtime.models.vae import VaeDecoder, VaeEncoder
from pw_runtime.types import Config, DitConfig, Network, TextEncoderConfig, VaeConfig

__all__ = [
    "TextEncoder",
    "VaeDecoder",
    "VaeEncoder",
    "WanDiT",
    "expected_shapes",
]


def expected_shapes(network: Network, config: Config) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a bundle must hold for a network.

    Transformers and VAE use the official names, the text encoder those of transformers.
    """
    return dict(_shapes(config))


@cache
def _shapes(config: Config) -> Mapping[str, tuple[int, ...]]:
    """Build the networks of a config without memory, which takes a tenth of a second."""
    modules: list[nn.Module]
    with torch.device("meta"):
        match config:
            case DitConfig():
                modules = [WanDiT(config)]
            case VaeConfig():
                modules = [VaeEncoder(config), VaeDecoder(config)]
            case TextEncoderConfig():
                modules = [TextEncoder(config)]
    shapes: dict[str, tuple[int, ...]] = {}
    for module in modules:
        shapes |= {name: tuple(t.shape) for name, t in module.state_dict().items()}
    return shapes
