# SPDX-License-Identifier: Apache-2.0
"""The networks of a bundle from the tensors of a checkpoint: names, shapes and configs, no data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic

import torch

from pw_export.checkpoints.configs import count, text_encoder_config, vae_config
from pw_export.checkpoints.network_kinds import require_role
from pw_export.checkpoints.tensor_refs import Refs, renamed, shapes_of
from pw_export.checkpoints.upstream_configs import ConfigFields
from pw_runtime.checkpoint import keymaps
from pw_runtime.checkpoint.bundle import ConfigT, require_shapes
from pw_runtime.errors import BadWeights
from pw_runtime.models import expected_shapes
from pw_runtime.types import Network, TextEncoderConfig, VaeConfig

CHECK = "check that this is the checkpoint you meant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part(Generic[ConfigT]):
    """A network: its config, and its tensors with the bundle's names in the model's order."""

    what: str  # the file or folder it comes from, for messages
    config: ConfigT
    refs: Refs


def make_part(network: Network, what: str, config: ConfigT, refs: Refs) -> Part[ConfigT]:
    """Check that a network has exactly the tensors that its config asks for. Raises BadWeights."""
    try:
        shapes = expected_shapes(network, config)
    except (ValueError, RuntimeError) as error:  # torch rejects widths that do not divide
        raise BadWeights(f"{what} has impossible widths", got=error, do=CHECK) from error
    require_shapes(what, shapes_of(refs), shapes, do=CHECK)
    return Part(what=what, config=config, refs={name: refs[name] for name in shapes})


def transformer_refs(what: Path, refs: Refs) -> Refs:
    """Return the tensors of a transformer under official names. Raises BadWeights."""
    kind = require_role(str(what), shapes_of(refs), "transformer")
    return renamed(what, refs, keymaps.dit_from_diffusers) if kind.scheme == "library" else refs


def vae_part(what: Path, refs: Refs, fields: ConfigFields) -> Part[VaeConfig]:
    """Return the VAE with these tensors; `fields` may be empty. Raises BadWeights."""
    if require_role(str(what), shapes_of(refs), "VAE").scheme == "library":
        to_official = partial(
            keymaps.vae_from_diffusers,
            encoder_blocks=count(what, refs, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
            decoder_blocks=count(what, refs, r"decoder\.up_blocks\.0\.resnets\.(\d+)\."),
        )
        refs = renamed(what, refs, to_official)
    return make_part("vae", str(what), vae_config(what, refs, fields), refs)


def text_encoder_part(what: Path, refs: Refs, fields: ConfigFields) -> Part[TextEncoderConfig]:
    """Return the text encoder with these tensors; `fields` may be empty. Raises BadWeights."""
    if require_role(str(what), shapes_of(refs), "text encoder").scheme == "library":
        refs = _untied(what, refs)
    else:
        refs = renamed(what, refs, keymaps.text_encoder_to_transformers)
    return make_part("text_encoder", str(what), text_encoder_config(what, refs, fields), refs)


def _untied(what: Path, refs: Refs) -> Refs:
    """Drop the second copy of the token table, which transformers saves under one name or both."""
    alias, name = keymaps.TEXT_ENCODER_ALIAS
    if alias not in refs:
        return refs
    rest = {key: ref for key, ref in refs.items() if key != alias}
    if name not in rest:
        return {name: refs[alias], **rest}
    same = refs[alias].shape == refs[name].shape and refs[alias].dtype == refs[name].dtype
    if not (same and torch.equal(refs[alias].read(), refs[name].read())):
        raise BadWeights(
            f"{what} holds two different token tables",
            got=f"{alias} unlike {name}",
            wanted="one table, or two equal ones",
            do=CHECK,
        )
    return rest
