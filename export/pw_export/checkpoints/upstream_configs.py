# SPDX-License-Identifier: Apache-2.0
"""Published config files, translated to the field names of pw_runtime.types.

Keys that do not affect the mathematics, or that tensor shapes determine, are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from pw_export.checkpoints.file_kinds import require_regular
from pw_runtime.errors import BadWeights

ConfigFields = Mapping[str, Any]
MAX_SIZE = 2**20  # of any width, count or length; the largest known is a vocabulary of 256,384
_MAX_FILE_BYTES = 2**24
_WANTED = "the file of a Wan2.2-TI2V-5B checkpoint"

_Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
_Epsilon = Annotated[float, Field(ge=1e-12, lt=1)]
_Mean = Annotated[
    float, Field(ge=-1e3, le=1e3, allow_inf_nan=False)
]  # of a latent channel; published: -0.3 to 0.5
_Deviation = Annotated[float, Field(ge=1e-3, le=1e3, allow_inf_nan=False)]  # published: 0.35 to 1.7
FileT = TypeVar("FileT")


def read_json(path: Path, file_type: type[FileT]) -> FileT:
    """Read a JSON file as the dataclass `file_type`, ignoring other keys. Raises BadWeights."""
    size = require_regular(path, wanted=_WANTED)
    try:
        if size > _MAX_FILE_BYTES:
            raise OSError(0, f"{size >> 20} MiB, more than {_MAX_FILE_BYTES >> 20}")
        return TypeAdapter(file_type).validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        reason = error.strerror
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        if isinstance(first["input"], int | float):
            reason += f" (is {first['input']})"
    raise BadWeights(
        f"{path} cannot be used",
        got=reason,
        wanted=_WANTED,
        do="check that this is the checkpoint you meant; download it again",
    )


@dataclass(frozen=True, slots=True)
class _OfficialDit:
    num_heads: _Size  # the only number that no tensor shape shows
    dim: _Size | None = None
    ffn_dim: _Size | None = None
    num_layers: _Size | None = None
    in_dim: _Size | None = None
    out_dim: _Size | None = None
    freq_dim: _Size | None = None
    text_len: _Size | None = None
    eps: _Epsilon | None = None


@dataclass(frozen=True, slots=True)
class _DiffusersDit:
    num_attention_heads: _Size
    attention_head_dim: _Size
    ffn_dim: _Size
    num_layers: _Size
    in_channels: _Size
    out_channels: _Size
    text_dim: _Size
    freq_dim: _Size
    eps: _Epsilon


@dataclass(frozen=True, slots=True)
class _DiffusersVae:
    base_dim: _Size
    decoder_base_dim: _Size | None
    z_dim: _Size
    dim_mult: tuple[_Size, ...]
    num_res_blocks: _Size
    temperal_downsample: tuple[bool, ...]  # upstream spelling
    latents_mean: tuple[_Mean, ...]
    latents_std: tuple[_Deviation, ...]
    is_residual: Literal[True]  # False: the VAE of Wan2.1, a different network
    patch_size: Literal[2]


@dataclass(frozen=True, slots=True)
class _TransformersUmt5:
    vocab_size: _Size
    d_model: _Size
    d_kv: _Size
    d_ff: _Size
    num_heads: _Size
    num_layers: _Size
    relative_attention_num_buckets: _Size
    relative_attention_max_distance: _Size
    layer_norm_epsilon: _Epsilon
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
