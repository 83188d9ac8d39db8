# SPDX-License-Identifier: Apache-2.0
"""Network configs from what a checkpoint says: its config files and its tensor shapes.

Where a config file states a number that shapes also show, both must agree.
"""

from __future__ import annotations

import re
from pathlib import Path

from pw_export.sources import Refs
from pw_export.upstream_configs import Stated
from pw_export.wan22_configs import LATENT_MEAN, LATENT_STD
from pw_runtime.checkpoint.bundle import some_names
from pw_runtime.errors import BadWeights
from pw_runtime.types import PATCH, Config, DitConfig, TextEncoderConfig, VaeConfig


def dit_config(what: str, refs: Refs, file: Path, stated: Stated) -> DitConfig:
    """The config of a transformer under official names; `stated` is what `file` says.

    Heads come from the file alone, as no shape shows them. Raises BadWeights.
    """
    dim, in_dim = _shape(what, refs, "patch_embedding.weight", 5)[:2]
    zero = [re.match(r"spatial_adapter\.zero_layers\.(\d+)\.", name) for name in refs]
    adapter = "spatial_adapter.backbone.0.weight"
    seen = {
        "dim": dim,
        "in_dim": in_dim,
        "out_dim": _shape(what, refs, "head.head.weight", 2)[0] // PATCH**2,
        "ffn_dim": _shape(what, refs, "blocks.0.ffn.0.weight", 2)[0],
        "num_heads": stated["num_heads"],
        "num_layers": count(what, refs, r"blocks\.(\d+)\."),
        "text_dim": _shape(what, refs, "text_embedding.0.weight", 2)[1],
        "freq_dim": _shape(what, refs, "time_embedding.0.weight", 2)[1],
        "has_dt": "dt_embedding.0.weight" in refs,
        "adapter_dim": _shape(what, refs, adapter, 5)[0] if adapter in refs else 0,
        "control_blocks": tuple(sorted({int(found[1]) for found in zero if found})),
    }
    try:
        config = DitConfig(**{**{k: stated[k] for k in ("text_len", "eps") if k in stated}, **seen})
    except ValueError as error:
        raise BadWeights(
            f"{what} and {file} make no transformer",
            got=error,
            wanted="config and tensors of Wan2.2-TI2V-5B or of a model of its kind",
            do="take config and weights from one checkpoint",
        ) from error
    _agree(file, stated, config)
    return config


def vae_config(file: Path, refs: Refs, stated: Stated) -> VaeConfig:
    """The config of a VAE under official names; the official layout states nothing.

    Raises BadWeights, also where nothing gives the latent statistics of an unknown z_dim.
    """
    z_dim = _shape(file, refs, "conv2.weight", 5)[0]
    known = z_dim == len(LATENT_MEAN)
    mean = stated.get("latent_mean", LATENT_MEAN if known else ())
    std = stated.get("latent_std", LATENT_STD if known else ())
    if (len(mean), len(std)) != (z_dim, z_dim):
        raise BadWeights(
            f"the latent mean and deviation of {file} are not known",
            got=f"{len(mean)} means and {len(std)} deviations",
            wanted=f"{z_dim} of each, one per latent channel",
            do="convert the diffusers form of this checkpoint, whose vae/config.json states them",
        )
    down, up = "encoder.downsamples", "decoder.upsamples"
    stages = count(file, refs, r"encoder\.downsamples\.(\d+)\.")
    encoder_blocks = count(file, refs, r"encoder\.downsamples\.0\.downsamples\.(\d+)\.residual\.")
    config = VaeConfig(
        z_dim=z_dim,
        encoder_dims=_dims(file, refs, "encoder.conv1", down + ".{}.downsamples.0", stages),
        decoder_dims=_dims(file, refs, "decoder.conv1", up + ".{}.upsamples.0", stages),
        encoder_blocks=encoder_blocks,
        decoder_blocks=count(file, refs, r"decoder\.upsamples\.0\.upsamples\.(\d+)\.residual\."),
        temporal_downsample=tuple(
            f"{down}.{stage}.downsamples.{encoder_blocks}.time_conv.weight" in refs
            for stage in range(stages - 1)
        ),
        latent_mean=mean,
        latent_std=std,
    )
    _agree(file, stated, config)
    return config


def text_encoder_config(file: Path, refs: Refs, stated: Stated) -> TextEncoderConfig:
    """The config of a UMT5 encoder under transformers names; the official layout states nothing.

    Raises BadWeights.
    """
    attention = "encoder.block.0.layer.0.SelfAttention."
    vocab_size, dim = _shape(file, refs, "shared.weight", 2)
    num_buckets, num_heads = _shape(file, refs, attention + "relative_attention_bias.weight", 2)
    config = TextEncoderConfig(
        vocab_size=vocab_size,
        dim=dim,
        attention_dim=_shape(file, refs, attention + "q.weight", 2)[0],
        ffn_dim=_shape(file, refs, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2)[0],
        num_heads=num_heads,
        num_layers=count(file, refs, r"encoder\.block\.(\d+)\."),
        num_buckets=num_buckets,
        **{name: stated[name] for name in ("max_distance", "eps") if name in stated},
    )
    _agree(file, stated, config)
    return config


def _shape(what: str | Path, refs: Refs, name: str, rank: int) -> tuple[int, ...]:
    shape = refs[name].shape if name in refs else None
    if shape is None or len(shape) != rank:
        got = f"missing among {some_names(refs)}" if shape is None else str(list(shape))
        raise _incomplete(what, f"{name}: {got}", f"{name} with {rank} dimensions")
    return shape


def count(what: str | Path, refs: Refs, pattern: str) -> int:
    """One more than the greatest number that a name holds where `pattern` has its group.

    Raises BadWeights when no name matches.
    """
    numbers = [int(found[1]) for name in refs if (found := re.match(pattern, name))]
    if not numbers:
        raise _incomplete(what, f"no tensor named like {pattern}", "at least one")
    return 1 + max(numbers)


def _incomplete(what: str | Path, got: str, wanted: str) -> BadWeights:
    return BadWeights(
        f"{what} is incomplete or of another kind",
        got=got,
        wanted=wanted,
        do="check that this is Wan2.2-TI2V-5B or was trained from it; download it again",
    )


def _dims(what: str | Path, refs: Refs, first: str, template: str, stages: int) -> tuple[int, ...]:
    blocks = [f"{template.format(stage)}.residual.6" for stage in range(stages)]
    return tuple(_shape(what, refs, f"{name}.weight", 5)[0] for name in [first, *blocks])


def _agree(file: Path, stated: Stated, config: Config) -> None:
    if wrong := [name for name in stated if stated[name] != getattr(config, name)]:
        raise BadWeights(
            f"{file} disagrees with the tensor shapes",
            got=", ".join(f"{name} = {stated[name]}" for name in wrong),
            wanted=", ".join(f"{name} = {getattr(config, name)}" for name in wrong),
            do="take config and weights from one checkpoint",
        )
