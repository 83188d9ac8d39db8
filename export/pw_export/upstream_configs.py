# SPDX-License-Identifier: Apache-2.0
"""Published config files, translated to the field names of pw_runtime.types.

Keys that do not affect the mathematics, or that tensor shapes determine, are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from pw_runtime.errors import BadWeights

ConfigFields = Mapping[str, Any]
FileT = TypeVar("FileT")


def read_json(path: Path, file_type: type[FileT]) -> FileT:
    """Read a JSON file as the dataclass `file_type`, ignoring other keys. Raises BadWeights."""
    try:
        return TypeAdapter(file_type).validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        reason = error.strerror
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
    raise BadWeights(
        f"{path} cannot be used",
        got=reason,
        wanted="the file of a Wan2.2-TI2V-5B checkpoint",
        do="check that this is the checkpoint you meant; download it again",
    )


@dataclass(frozen=True, slots=True)
class _OfficialDit:
    num_heads: int  # the only number that no tensor shape shows
    dim: int | None = None
    ffn_dim: int | None = None
    num_layers: int | None = None
    in_dim: int | None = None
    out_dim: int | None = None
    freq_dim: int | None = None
    text_len: int | None = None
    eps: float | None = None


@dataclass(frozen=True, slots=True)
class _DiffusersDit:
    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    num_layers: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    eps: float


@dataclass(frozen=True, slots=True)
class _DiffusersVae:
    base_dim: int
    decoder_base_dim: int | None
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temperal_downsample: tuple[bool, ...]  # upstream spelling
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    is_residual: Literal[True]  # False: the VAE of Wan2.1, a different network
    patch_size: Literal[2]


@dataclass(frozen=True, slots=True)
class _TransformersUmt5:
    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float
    feed_forward_proj: Literal["gated-gelu"]


def official_dit(file: Path) -> ConfigFields:
    """Read config.json of the official layout, which lacks text_dim. Raises BadWeights.

    Missing fields follow from the shapes or have the official default.
    """
    cfg = asdict(read_json(file, _OfficialDit))
    return {name: value for name, value in cfg.items() if value is not None}


def diffusers_dit(file: Path) -> ConfigFields:
    """Read transformer/config.json of diffusers, which lacks text_len. Raises BadWeights."""
    cfg = read_json(file, _DiffusersDit)
    return {
        "num_heads": cfg.num_attention_heads,
        "dim": cfg.num_attention_heads * cfg.attention_head_dim,
        "ffn_dim": cfg.ffn_dim,
        "num_layers": cfg.num_layers,
        "in_dim": cfg.in_channels,
        "out_dim": cfg.out_channels,
        "text_dim": cfg.text_dim,
        "freq_dim": cfg.freq_dim,
        "eps": cfg.eps,
    }


def diffusers_vae(file: Path) -> ConfigFields:
    """Read vae/config.json of diffusers. Raises BadWeights."""
    cfg = read_json(file, _DiffusersVae)
    decoder_base = cfg.decoder_base_dim or cfg.base_dim
    return {
        "z_dim": cfg.z_dim,
        "encoder_dims": tuple(cfg.base_dim * m for m in (1, *cfg.dim_mult)),
        "decoder_dims": tuple(decoder_base * m for m in (*cfg.dim_mult[-1:], *cfg.dim_mult[::-1])),
        "encoder_blocks": cfg.num_res_blocks,
        "decoder_blocks": cfg.num_res_blocks + 1,
        "temporal_downsample": cfg.temperal_downsample,
        "latent_mean": cfg.latents_mean,
        "latent_std": cfg.latents_std,
    }


def transformers_text_encoder(file: Path) -> ConfigFields:
    """Read text_encoder/config.json of transformers. Raises BadWeights."""
    cfg = read_json(file, _TransformersUmt5)
    return {
        "vocab_size": cfg.vocab_size,
        "dim": cfg.d_model,
        "attention_dim": cfg.num_heads * cfg.d_kv,
        "ffn_dim": cfg.d_ff,
        "num_heads": cfg.num_heads,
        "num_layers": cfg.num_layers,
        "num_buckets": cfg.relative_attention_num_buckets,
        "max_distance": cfg.relative_attention_max_distance,
        "eps": cfg.layer_norm_epsilon,
    }
