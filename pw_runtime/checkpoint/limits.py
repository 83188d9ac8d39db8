# SPDX-License-Identifier: Apache-2.0
"""Bounds of what bundle.json declares: the networks that this program can build, with room."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, Final, get_args

from pw_runtime.types import Config, DitConfig, Network, TextEncoderConfig, VaeConfig

if TYPE_CHECKING:
    from pw_runtime.checkpoint.manifest import Manifest

CHANNELS: Final = 48  # of the latents, which noise, presets and receipts take for granted
STAGES: Final = 4  # of the VAE: 16 pixels are one latent cell
WIDTH: Final = (1, 2**16)
LAYERS: Final = (1, 512)
GROUPS: Final = 16  # of channels, which the adapter of the high-res network normalizes
EPS: Final = (1e-12, 1.0)
MEAN: Final = (-1e4, 1e4)
STD: Final = (1e-4, 1e4)

_BOUNDS: Final[dict[type, dict[str, tuple[float, float]]]] = {
    DitConfig: {
        "dim": WIDTH,
        "ffn_dim": (1, 2**20),
        "num_heads": (1, 1024),
        "num_layers": LAYERS,
        "text_dim": WIDTH,
        "text_len": WIDTH,
        "in_dim": (CHANNELS, CHANNELS),
        "out_dim": (CHANNELS, CHANNELS),
        "freq_dim": WIDTH,
        "eps": EPS,
        "adapter_dim": (0, 2**16),
    },
    VaeConfig: {
        "z_dim": (CHANNELS, CHANNELS),
        "encoder_blocks": (1, 16),
        "decoder_blocks": (1, 16),
    },
    TextEncoderConfig: {
        "vocab_size": (1, 2**24),
        "dim": WIDTH,
        "attention_dim": WIDTH,
        "ffn_dim": (1, 2**20),
        "num_heads": (1, 1024),
        "num_layers": LAYERS,
        "num_buckets": (4, 4096),
        "max_distance": (1, 2**20),
        "eps": EPS,
    },
}
_LAYER: Final[dict[type, re.Pattern[str]]] = {
    DitConfig: re.compile(r"blocks\.(\d{1,9})\."),
    TextEncoderConfig: re.compile(r"encoder\.block\.(\d{1,9})\."),
}
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")


def problems_of(manifest: Manifest) -> list[str]:
    """Return what in a manifest cannot be, each with its place; empty for a usable one."""
    networks = manifest.networks
    problems = [
        f"networks.{name}.config.{problem}"
        for name in get_args(Network)
        if (entry := networks.get(name)) is not None
        for problem in _problems_of_config(entry.config)
    ]
    for name, dit in (("draft", networks.draft), ("highres", networks.highres)):
        wanted = networks.text_encoder.config.dim
        if dit is not None and dit.config.text_dim != wanted:
            got = dit.config.text_dim
            problems.append(f"networks.{name}.config.text_dim is {got}, the encoder's is {wanted}")
    lengths = {x.config.text_len for x in (networks.draft, networks.highres) if x is not None}
    if len(lengths) > 1:
        problems.append(f"networks.highres.config.text_len differs: {sorted(lengths)}")
    for name, record in manifest.files.items():
        if not name or _CONTROL.search(name) or len(name) > 1000:
            problems.append(f"files has the name {ascii(name)[:80]}")
        if record.bytes < 0 or not _SHA256.fullmatch(record.sha256):
            problems.append(f"files.{ascii(name)[1:-1]} has no size in bytes and SHA-256")
    return problems


def declared_layers(config: Config) -> int | None:
    """Return the number of layers that a config declares; None for the VAE, which is small."""
    return None if isinstance(config, VaeConfig) else config.num_layers


def stored_layers(config: Config, names: Collection[str]) -> int:
    """Return the number of layers among the names of a network's tensors."""
    pattern = _LAYER[type(config)]
    return len({match[1] for name in names if (match := pattern.match(name))})


def _problems_of_config(config: Config) -> Iterator[str]:
    for name, (least, most) in _BOUNDS[type(config)].items():
        value = getattr(config, name)
        if not least <= value <= most:
            wanted = f"{least:g}" if least == most else f"{least:g} to {most:g}"
            yield f"{name} is {value}, wanted {wanted}"
    if isinstance(config, DitConfig) and config.adapter_dim % GROUPS:
        yield f"adapter_dim is {config.adapter_dim}, wanted a multiple of {GROUPS}"
    if isinstance(config, VaeConfig):
        yield from _problems_of_vae(config)
    if isinstance(config, TextEncoderConfig):
        if config.num_heads > 0 and config.attention_dim % config.num_heads:
            yield f"num_heads is {config.num_heads}, which does not divide attention_dim"
        if config.max_distance <= config.num_buckets // 4:
            yield f"max_distance is {config.max_distance}, wanted more than num_buckets / 4"


def _problems_of_vae(config: VaeConfig) -> Iterator[str]:
    for name in ("encoder_dims", "decoder_dims"):
        dims = getattr(config, name)
        if len(dims) != STAGES + 1 or not all(WIDTH[0] <= dim <= WIDTH[1] for dim in dims):
            yield f"{name} is {_short(dims)}, wanted {STAGES + 1} widths from 1 to {WIDTH[1]}"
    if len(config.temporal_downsample) != STAGES - 1 or sum(config.temporal_downsample) != 2:
        yield f"temporal_downsample is {_short(config.temporal_downsample)}, wanted 2 of 3 true"
    for name, (least, most) in (("latent_mean", MEAN), ("latent_std", STD)):
        values = getattr(config, name)
        if len(values) != CHANNELS:
            yield f"{name} has {len(values)} values, wanted {CHANNELS}"
        elif bad := [x for x in values if not (math.isfinite(x) and least <= x <= most)]:
            yield f"{name} has the value {bad[0]}, wanted {least:g} to {most:g}"


def _short(values: tuple[Any, ...]) -> str:
    return str(list(values[:8])) if len(values) <= 8 else f"{len(values)} values"
