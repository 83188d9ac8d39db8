# SPDX-License-Identifier: Apache-2.0
"""Network configs, derived from a checkpoint's config files and tensor shapes.

A number that both a config file and the shapes give must agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pw_export.checkpoints.tensor_refs import Refs
from pw_export.checkpoints.upstream_configs import MAX_SIZE, ConfigFields
from pw_export.wan22_configs import LATENT_MEAN, LATENT_STD
from pw_runtime.checkpoint.bundle import some_names
from pw_runtime.errors import BadWeights
from pw_runtime.types import PATCH, Config, DitConfig, TextEncoderConfig, VaeConfig

_HEAD_WIDTH = 128


def dit_config(what: str, refs: Refs, file: Path | None, fields: ConfigFields) -> DitConfig:
    """Derive the config of a transformer with official tensor names.

    Args:
        what: subject of error messages.
        refs: its tensors.
        file: its config file, or None.
        fields: the content of `file`; the number of heads comes from it alone. Without a file,
            heads are 128 wide, as in every Wan transformer that was published.

    Raises BadWeights.
    """
    dim, in_dim = _shape(what, refs, "patch_embedding.weight", 5)[:2]
    zero_layers = [re.match(r"spatial_adapter\.zero_layers\.(\d{1,6})\.", name) for name in refs]
    adapter = "spatial_adapter.backbone.0.weight"
    seen = {
        "dim": dim,
        "in_dim": in_dim,
        "out_dim": _shape(what, refs, "head.head.weight", 2)[0] // PATCH**2,
        "ffn_dim": _shape(what, refs, "blocks.0.ffn.0.weight", 2)[0],
        "num_heads": fields["num_heads"] if file else _heads(what, dim),
        "num_layers": count(what, refs, r"blocks\.(\d+)\."),
        "text_dim": _shape(what, refs, "text_embedding.0.weight", 2)[1],
        "freq_dim": _shape(what, refs, "time_embedding.0.weight", 2)[1],
        "has_dt": "dt_embedding.0.weight" in refs,
        "adapter_dim": _shape(what, refs, adapter, 5)[0] if adapter in refs else 0,
        "control_blocks": tuple(sorted({int(match[1]) for match in zero_layers if match})),
    }
    with _one_network(what, file):
        config = DitConfig(**{**{k: fields[k] for k in ("text_len", "eps") if k in fields}, **seen})
    _agree(file, what, fields, config)
    return config


@contextmanager
def _one_network(what: str | Path, file: Path | None) -> Iterator[None]:
    """Turn the ValueError of a config with numbers that do not go together into BadWeights."""
    try:
        yield
    except ValueError as error:
        raise BadWeights(
            f"{what} and {file or 'no config.json'} do not describe a valid network",
            got=error,
            wanted="config and tensors of Wan2.2-TI2V-5B or of a model like it",
            do="take config and weights from one checkpoint",
        ) from error


def _heads(what: str, dim: int) -> int:
    if dim % _HEAD_WIDTH:
        raise BadWeights(
            f"the number of heads of {what} is unknown",
            got=f"width {dim}, no multiple of {_HEAD_WIDTH}, and no config.json",
            wanted="config.json of the checkpoint, in its folder",
            do="download config.json into the folder given as --wan",
        )
    return dim // _HEAD_WIDTH


def vae_config(file: Path, refs: Refs, fields: ConfigFields) -> VaeConfig:
    """Derive the config of a VAE with official tensor names.

    `fields` is empty for the official layout, which has no config file.

    Raises BadWeights, also for an unknown z_dim without latent statistics.
    """
    z_dim = _shape(file, refs, "conv2.weight", 5)[0]
    known = z_dim == len(LATENT_MEAN)
    mean = fields.get("latent_mean", LATENT_MEAN if known else ())
    std = fields.get("latent_std", LATENT_STD if known else ())
    if (len(mean), len(std)) != (z_dim, z_dim):
        raise BadWeights(
            f"the latent mean and standard deviation for {file} are unknown",
            got=f"{len(mean)} means and {len(std)} deviations",
            wanted=f"{z_dim} of each, one per latent channel",
            do="convert the diffusers form of this checkpoint, whose vae/config.json lists them",
        )
    down, up = "encoder.downsamples", "decoder.upsamples"
    stages = count(file, refs, r"encoder\.downsamples\.(\d+)\.")
    encoder_blocks = count(file, refs, r"encoder\.downsamples\.0\.downsamples\.(\d+)\.residual\.")
    with _one_network(file, file / "config.json"):
        config = VaeConfig(
            z_dim=z_dim,
            encoder_dims=_dims(file, refs, "encoder.conv1", down + ".{}.downsamples.0", stages),
            decoder_dims=_dims(file, refs, "decoder.conv1", up + ".{}.upsamples.0", stages),
            encoder_blocks=encoder_blocks,
            decoder_blocks=count(
                file, refs, r"decoder\.upsamples\.0\.upsamples\.(\d+)\.residual\."
            ),
            temporal_downsample=tuple(
                f"{down}.{stage}.downsamples.{encoder_blocks}.time_conv.weight" in refs
                for stage in range(stages - 1)
            ),
            latent_mean=mean,
            latent_std=std,
        )
    _agree(file / "config.json", file, fields, config)
    return config


def text_encoder_config(file: Path, refs: Refs, fields: ConfigFields) -> TextEncoderConfig:
    """Derive the config of a UMT5 encoder with transformers' tensor names.

    `fields` is empty for the official layout, which has no config file.

    Raises BadWeights.
    """
    attention = "encoder.block.0.layer.0.SelfAttention."
    vocab_size, dim = _shape(file, refs, "shared.weight", 2)
    num_buckets, num_heads = _shape(file, refs, attention + "relative_attention_bias.weight", 2)
    with _one_network(file, file / "config.json"):
        config = TextEncoderConfig(
            vocab_size=vocab_size,
            dim=dim,
            attention_dim=_shape(file, refs, attention + "q.weight", 2)[0],
            ffn_dim=_shape(file, refs, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2)[0],
            num_heads=num_heads,
            num_layers=count(file, refs, r"encoder\.block\.(\d+)\."),
            num_buckets=num_buckets,
            **{name: fields[name] for name in ("max_distance", "eps") if name in fields},
        )
    _agree(file / "config.json", file, fields, config)
    return config


def _shape(what: str | Path, refs: Refs, name: str, rank: int) -> tuple[int, ...]:
    shape = refs[name].shape if name in refs else None
    if shape is None or len(shape) != rank:
        got = f"missing among {some_names(refs)}" if shape is None else str(list(shape))
        raise _incomplete(what, f"{name}: {got}", f"{name} with {rank} dimensions")
    if not all(1 <= size <= MAX_SIZE for size in shape):
        raise _incomplete(what, f"{name}: {list(shape)}", f"sizes from 1 to {MAX_SIZE:,}")
    return shape


def count(what: str | Path, refs: Refs, pattern: str) -> int:
    """Return how many numbers the group of `pattern` matches in names.

    Raises BadWeights when no name matches, and when one of the numbers from 0 on is left out.
    """
    texts = {match[1] for name in refs if (match := re.match(pattern, name))}
    if not texts:
        raise _incomplete(what, f"no tensor named like {pattern}", "at least one")
    if gaps := {str(number) for number in range(len(texts))} - texts:
        first = min(gaps, key=int)
        plain = pattern.replace("\\.", ".").replace(r"(\d+)", "{}")
        raise _incomplete(
            what,
            f"{plain.format(first)}* missing, {plain.format(max(texts, key=len))}* there",
            "all, numbered from 0",
        )
    return len(texts)


def _incomplete(what: str | Path, got: str, wanted: str) -> BadWeights:
    return BadWeights(
        f"{what} is incomplete or another kind of network",
        got=got,
        wanted=wanted,
        do="check that this is Wan2.2-TI2V-5B or was trained from it, or download it again",
    )


def _dims(what: str | Path, refs: Refs, first: str, template: str, stages: int) -> tuple[int, ...]:
    blocks = [f"{template.format(stage)}.residual.6" for stage in range(stages)]
    return tuple(_shape(what, refs, f"{name}.weight", 5)[0] for name in [first, *blocks])


def _agree(file: Path | None, what: str | Path, fields: ConfigFields, config: Config) -> None:
    if wrong := [name for name in fields if fields[name] != getattr(config, name)]:
        raise BadWeights(
            f"{file} disagrees with the tensor shapes of {what}",
            got=", ".join(f"{name} = {fields[name]}" for name in wrong),
            wanted=", ".join(f"{name} = {getattr(config, name)}" for name in wrong),
            do="take config and weights from one checkpoint (the transformer of Wan2.2-TI2V-5B is "
            "3072 wide, that of a 14B model 5120)",
        )
