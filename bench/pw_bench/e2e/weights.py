# SPDX-License-Identifier: Apache-2.0
"""The weights that a benchmark runs on: a checkpoint's, the built-in ones, or made-up ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

import click

from pw_export.convert import convert
from pw_export.nano import (
    NANO_DIT,
    NANO_TEXT_ENCODER,
    NANO_VAE,
    write_nano_checkpoint,
)
from pw_export.nano.weights import write_trained_checkpoint
from pw_runtime.cli.options import FOLDER
from pw_runtime.errors import BadRequest

Synthetic = Literal["nano", "medium", "5b"]

# Between the built-in model and the published one, at the latter's proportions.
MEDIUM_DIT: Final = replace(
    NANO_DIT, dim=768, ffn_dim=3584, num_heads=6, num_layers=8, text_dim=512
)
MEDIUM_VAE: Final = replace(
    NANO_VAE,
    encoder_dims=tuple(2 * width for width in NANO_VAE.encoder_dims),
    decoder_dims=tuple(2 * width for width in NANO_VAE.decoder_dims),
)
MEDIUM_TEXT_ENCODER: Final = replace(
    NANO_TEXT_ENCODER, dim=512, attention_dim=512, ffn_dim=1024, num_heads=8, num_layers=4
)
HIGHRES_FILE: Final = Path("pixelwizard") / "highres.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A checkpoint in the official layout, and the same as a bundle."""

    name: str
    checkpoint: Path
    bundle: Path
    digest: str
    in_memory: bool = False  # every process makes them up, and there are no files


def weights_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options --checkpoint and --synthetic."""
    size = click.option(
        "--synthetic",
        type=click.Choice(get_args(Synthetic)),
        help="Size of made-up weights; 5b: that of the published networks, in memory, for a GPU. "
        "[default: none; nano and nano-hd run on the trained built-in model]",
    )
    checkpoint = click.option(
        "--checkpoint", type=FOLDER, help="In the official layout, instead of made-up weights."
    )
    return checkpoint(size(command))


def pick_weights(options: Mapping[str, Any], folder: Path, say: Callable[[str], None]) -> Weights:
    """Those of --checkpoint, made-up or built-in ones. Raises BadRequest, BadWeights."""
    checkpoint, synthetic, preset = (options[k] for k in ("checkpoint", "synthetic", "preset"))
    if synthetic is None and checkpoint is None and preset in ("nano", "nano-hd"):
        write_trained_checkpoint(folder / "checkpoint")
        return converted(folder / "checkpoint", folder, say, name="the built-in model, trained")
    if (checkpoint is None) == (synthetic is None):
        raise BadRequest(
            "no weights, or two kinds of them",
            got=f"--preset {preset}",
            do="give --checkpoint FOLDER or --synthetic nano, medium or 5b",
        )
    return made_up(synthetic, folder, say) if synthetic else converted(checkpoint, folder, say)


def made_up(name: Synthetic, folder: Path, say: Callable[[str], None]) -> Weights:
    """Write random weights of a size, by seed 0, and convert them."""
    checkpoint = folder / "checkpoint"
    what = f"made-up weights, {name}, seed 0"
    if name == "5b":
        return Weights(
            name=what, checkpoint=folder, bundle=folder, digest="none: no files", in_memory=True
        )
    if name == "nano":
        write_nano_checkpoint(checkpoint)
    else:
        write_nano_checkpoint(
            checkpoint,
            dit=MEDIUM_DIT,
            highres=replace(MEDIUM_DIT, has_dt=True, adapter_dim=192, control_blocks=(1,)),
            vae=MEDIUM_VAE,
            text_encoder=MEDIUM_TEXT_ENCODER,
        )
    return converted(checkpoint, folder, say, name=what)


def converted(
    checkpoint: Path, folder: Path, say: Callable[[str], None], name: str | None = None
) -> Weights:
    """Convert a checkpoint into a bundle under `folder`. Raises BadWeights, BadRequest."""
    highres = checkpoint / HIGHRES_FILE
    made = highres if highres.exists() else None
    bundle = convert(wan=checkpoint, highres=made, out=folder / "bundle", say=say)
    return Weights(
        name=name or checkpoint.name,
        checkpoint=checkpoint,
        bundle=bundle.root,
        digest=f"sha256:{bundle.digest}",
    )
