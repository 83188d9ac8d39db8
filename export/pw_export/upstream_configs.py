# SPDX-License-Identifier: Apache-2.0
"""What published config files say, under the field names of pw_runtime.types.

Keys that say nothing about the mathematics, or that tensor shapes decide, are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from pw_runtime.errors import BadWeights

Stated = Mapping[str, Any]
FileT = TypeVar("FileT")


def read_json(path: Path, kind: type[FileT]) -> FileT:
    """A JSON file as the dataclass `kind`; keys it does not name are ignored. Raises BadWeights."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True)
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
    num_heads: int  # the one number that nothing else shows
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
    temperal_downsample: tuple[bool, ...]  # spelt so upstream
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    is_residual: Literal[True]  # False is the VAE of Wan2.1, which has other mathematics
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


def official_dit(file: Path) -> Stated:
    """config.json of the official layout; it does not say text_dim. Raises BadWeights.

    What it leaves out is seen from the shapes or is the official default.
    """
    said = asdict(read_json(file, _OfficialDit))
    return {name: value for name, value in said.items() if value is not None}


def diffusers_dit(file: Path) -> Stated:
    """transformer/config.json of diffusers; it does not say text_len. Raises BadWeights."""
    said = read_json(file, _DiffusersDit)
    return {
        "num_heads": said.num_attention_heads,
        "dim": said.num_attention_heads * said.attention_head_dim,
        "ffn_dim": said.ffn_dim,
        "num_layers": said.num_layers,
        "in_dim": said.in_channels,
        "out_dim": said.out_channels,
        "text_dim": said.text_dim,
        "freq_dim": said.freq_dim,
        "eps": said.eps,
    }


def diffusers_vae(file: Path) -> Stated:
    """vae/config.json of diffusers. Raises BadWeights."""
    said = read_json(file, _DiffusersVae)
    decoder_base = said.decoder_base_dim or said.base_dim
    return {
        "z_dim": said.z_dim,
        "encoder_dims": tuple(said.base_dim * m for m in (1, *said.dim_mult)),
        "decoder_dims": tuple(
            decoder_base * m for m in (*said.dim_mult[-1:], *said.dim_mult[::-1])
        ),
        "encoder_blocks": said.num_res_blocks,
        "decoder_blocks": said.num_res_blocks + 1,
        "temporal_downsample": said.temperal_downsample,
        "latent_mean": said.latents_mean,
        "latent_std": said.latents_std,
    }


def transformers_text_encoder(file: Path) -> Stated:
    """text_encoder/config.json of transformers. Raises BadWeights."""
    said = read_json(file, _TransformersUmt5)
    return {
        "vocab_size": said.vocab_size,
        "dim": said.d_model,
        "attention_dim": said.num_heads * said.d_kv,
        "ffn_dim": said.d_ff,
        "num_heads": said.num_heads,
        "num_layers": said.num_layers,
        "num_buckets": said.relative_attention_num_buckets,
        "max_distance": said.relative_attention_max_distance,
        "eps": said.layer_norm_epsilon,
    }
