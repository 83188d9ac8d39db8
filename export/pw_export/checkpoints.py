# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints as the networks of a bundle: names, shapes and configs, without data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic

import torch

from pw_export import keymaps
from pw_export.configs import count, dit_config, text_encoder_config, vae_config
from pw_export.sources import Refs, read_pixelwizard, read_safetensors, read_state_dict, renamed
from pw_export.upstream_configs import (
    ConfigFields,
    diffusers_dit,
    diffusers_vae,
    official_dit,
    transformers_text_encoder,
)
from pw_runtime.checkpoint.bundle import MANIFEST, ConfigT, require_shapes, some_names
from pw_runtime.errors import BadRequest, BadWeights
from pw_runtime.types import DitConfig, Network, TextEncoderConfig, VaeConfig

_DIT_STEM = "diffusion_pytorch_model"
_HIGHRES_ONLY = ("spatial_adapter.", "dt_embedding.")
_CHECK = "check that this is the checkpoint you meant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part(Generic[ConfigT]):
    """A network: its config, and its tensors with the bundle's names in the model's order."""

    config: ConfigT
    refs: Refs


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Everything that goes into a bundle; `source` names the files it comes from."""

    draft: Part[DitConfig]
    highres: Part[DitConfig] | None
    vae: Part[VaeConfig]
    text_encoder: Part[TextEncoderConfig]
    tokenizer: tuple[Path, ...]
    source: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    """A Wan2.2-TI2V-5B folder in either layout."""

    layout: str
    config: Path
    fields: ConfigFields
    dit: Callable[[], Refs]  # lazy: the shards may be missing if a draft checkpoint replaces them
    vae: Part[VaeConfig]
    text_encoder: Part[TextEncoderConfig]
    tokenizer: Path


def open_checkpoint(
    wan: Path, draft: Path | None, highres: Path | None, *, ema: bool, say: Callable[[str], None]
) -> Checkpoint:
    """Read headers and configs and check every name and shape, without reading the data.

    Raises BadRequest for a path without a checkpoint, BadWeights for anything missing, left over,
    damaged or contradictory.
    """
    base = _open_base(wan)
    source = {"layout": base.layout, "wan": wan.absolute().name}
    if draft is None:
        draft_part = _draft(str(wan), base.dit(), base)
    else:
        refs, member = read_pixelwizard(draft, ema=ema, say=say)
        draft_part = _draft(str(draft), refs, base)
        source["draft"] = _named(draft, member)
    highres_part = None
    if highres is not None:
        refs, member = read_pixelwizard(highres, ema=ema, say=say)
        highres_part = _highres(str(highres), refs, base)
        source["highres"] = _named(highres, member)
    return Checkpoint(
        draft=draft_part,
        highres=highres_part,
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=_tokenizer(base.tokenizer),
        source=source,
    )


def _named(file: Path, member: str) -> str:
    # Published as lr/model.pt, 2k/model.pt and 4k/model.pt: the folder is part of the name.
    return f"{file.absolute().parent.name}/{file.name}:{member}"


def _open_base(wan: Path) -> _Base:
    if not wan.is_dir():
        raise BadRequest(
            f"there is no checkpoint folder {wan}",
            got="a file" if wan.exists() else "no such folder",
            wanted="the folder of Wan2.2-TI2V-5B",
            do="check the path",
        )
    if (wan / MANIFEST).exists():
        raise BadRequest(
            f"{wan} is already a bundle",
            got=f"a folder with {MANIFEST}",
            wanted="the folder of Wan2.2-TI2V-5B",
            do="use it without converting",
        )
    if (wan / "transformer").is_dir():
        return _diffusers(wan)
    if (wan / "config.json").is_file():
        return _official(wan)
    raise BadWeights(
        f"{wan} is not a checkpoint of a known layout",
        got="neither config.json nor transformer/",
        wanted="the folder of Wan2.2-TI2V-5B as published by Wan-AI, or its diffusers form",
        do="check the path, or download the whole folder again",
    )


def _official(wan: Path) -> _Base:
    vae_file = wan / "Wan2.2_VAE.pth"
    vae = read_state_dict(vae_file)
    text_file = wan / "models_t5_umt5-xxl-enc-bf16.pth"
    text = renamed(text_file, read_state_dict(text_file), keymaps.text_encoder_to_transformers)
    return _Base(
        layout="official",
        config=wan / "config.json",
        fields=official_dit(wan / "config.json"),
        dit=partial(read_safetensors, wan, _DIT_STEM),
        vae=_part("vae", str(vae_file), vae_config(vae_file, vae, {}), vae),
        text_encoder=_part(
            "text_encoder", str(text_file), text_encoder_config(text_file, text, {}), text
        ),
        tokenizer=wan / "google" / "umt5-xxl",
    )


def _diffusers(wan: Path) -> _Base:
    transformer = wan / "transformer"
    return _Base(
        layout="diffusers",
        config=transformer / "config.json",
        fields=diffusers_dit(transformer / "config.json"),
        dit=lambda: renamed(
            transformer, read_safetensors(transformer, _DIT_STEM), keymaps.dit_from_diffusers
        ),
        vae=_diffusers_vae(wan / "vae"),
        text_encoder=_transformers_text_encoder(wan / "text_encoder"),
        tokenizer=wan / "tokenizer",
    )


def _diffusers_vae(folder: Path) -> Part[VaeConfig]:
    theirs = read_safetensors(folder, _DIT_STEM)
    to_official = partial(
        keymaps.vae_from_diffusers,
        encoder_blocks=count(folder, theirs, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        decoder_blocks=count(folder, theirs, r"decoder\.up_blocks\.0\.resnets\.(\d+)\."),
    )
    refs = renamed(folder, theirs, to_official)
    config = vae_config(folder, refs, diffusers_vae(folder / "config.json"))
    return _part("vae", str(folder), config, refs)


def _transformers_text_encoder(folder: Path) -> Part[TextEncoderConfig]:
    refs = _untied(folder, read_safetensors(folder, "model"))
    fields = transformers_text_encoder(folder / "config.json")
    return _part("text_encoder", str(folder), text_encoder_config(folder, refs, fields), refs)


def _untied(folder: Path, refs: Refs) -> Refs:
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
            f"{folder} holds two different token tables",
            got=f"{alias} unlike {name}",
            wanted="one table, or two equal ones",
            do=_CHECK,
        )
    return rest


def _draft(what: str, refs: Refs, base: _Base) -> Part[DitConfig]:
    if extra := [name for name in refs if name.startswith(_HIGHRES_ONLY)]:
        raise BadWeights(
            f"{what} is a high-res checkpoint and cannot be the draft",
            got=some_names(extra),
            wanted="a transformer without spatial adapter and dt embedding",
            do="pass it as --highres",
        )
    config = dit_config(what, refs, base.config, base.fields)
    return _matching(_part("draft", what, config, refs), what, base)


def _highres(what: str, refs: Refs, base: _Base) -> Part[DitConfig]:
    config = dit_config(what, refs, base.config, base.fields)
    reached = [block for block in config.control_blocks if block < config.num_layers]
    if not (config.has_dt and config.adapter_dim and reached):
        extra = [name for name in refs if name.startswith(_HIGHRES_ONLY)]
        raise BadWeights(
            f"{what} is not a high-res checkpoint",
            got=f"high-res tensors: {some_names(extra) or 'none'}",
            wanted="dt_embedding.*, spatial_adapter.* and a zero_layers.<i> of an existing block",
            do="pass PixelWizard's 2k or 4k checkpoint as --highres, its lr checkpoint as --draft",
        )
    return _matching(_part("highres", what, config, refs), what, base)


def _part(network: Network, what: str, config: ConfigT, refs: Refs) -> Part[ConfigT]:
    # Imports transformers, which takes seconds: a mistyped path should fail at once.
    from pw_runtime.models import expected_shapes

    try:
        shapes = expected_shapes(network, config)
    except ValueError as error:  # torch rejects widths that do not divide
        raise BadWeights(f"{what} has impossible widths", got=error, do=_CHECK) from error
    require_shapes(what, {name: ref.shape for name, ref in refs.items()}, shapes, do=_CHECK)
    return Part(config=config, refs={name: refs[name] for name in shapes})


def _matching(part: Part[DitConfig], what: str, base: _Base) -> Part[DitConfig]:
    dit, z_dim = part.config, base.vae.config.z_dim
    got = (dit.in_dim, dit.out_dim, dit.text_dim)
    expected = (z_dim, z_dim, base.text_encoder.config.dim)
    if got != expected:
        raise BadWeights(
            f"{what} does not match the VAE and the text encoder",
            got=f"latent channels in, latent channels out, text width: {got}",
            wanted=str(expected),
            do="take all networks from one family of checkpoints",
        )
    return part


def _tokenizer(folder: Path) -> tuple[Path, ...]:
    files = tuple(sorted(file for file in folder.glob("*") if file.is_file()))
    if not {"tokenizer.json", "spiece.model"} & {file.name for file in files}:
        raise BadWeights(
            f"{folder} contains no tokenizer",
            got=some_names([file.name for file in files]) or "nothing",
            wanted="tokenizer.json or spiece.model",
            do="download the whole checkpoint again",
        )
    return files
