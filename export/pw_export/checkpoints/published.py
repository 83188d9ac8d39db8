# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints as the networks of a bundle: names, shapes and configs, without data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pw_export.checkpoints.configs import dit_config
from pw_export.checkpoints.file_kinds import require_regular
from pw_export.checkpoints.layouts import SINGLE_FILES, Base, open_base
from pw_export.checkpoints.parts import Part, make_part, transformer_refs
from pw_export.checkpoints.sources import read_pixelwizard
from pw_export.checkpoints.tensor_refs import Refs
from pw_export.checkpoints.tokenizer_files import require_tokenizer
from pw_runtime.checkpoint.bundle import some_names
from pw_runtime.errors import BadWeights
from pw_runtime.types import DitConfig, TextEncoderConfig, VaeConfig

_HIGHRES_ONLY = ("spatial_adapter.", "dt_embedding.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Everything that goes into a bundle; `source` names the files it comes from."""

    draft: Part[DitConfig]
    highres: Part[DitConfig] | None
    vae: Part[VaeConfig]
    text_encoder: Part[TextEncoderConfig]
    tokenizer: tuple[Path, ...]
    source: dict[str, str]


def open_checkpoint(
    wan: Path, draft: Path | None, highres: Path | None, *, ema: bool, say: Callable[[str], None]
) -> Checkpoint:
    """Read headers and configs and check every name and shape, without reading the data.

    Raises BadRequest for a path without a checkpoint, BadWeights for anything missing, left over,
    damaged or contradictory.
    """
    for file in (draft, highres):
        if file is not None:
            require_regular(file)  # a mistyped path should fail before the rest is read
    base = open_base(wan, say)
    source = {"layout": base.layout, "wan": wan.absolute().name}
    if draft is None:
        what, refs = base.dit()
        draft_part = _draft(str(what), refs, base)
    else:
        refs, member = read_pixelwizard(draft, ema=ema, say=say)
        draft_part = _draft(str(draft), transformer_refs(draft, refs), base)
        source["draft"] = _named(draft, member)
    highres_part = None
    if highres is not None:
        refs, member = read_pixelwizard(highres, ema=ema, say=say)
        highres_part = _highres(str(highres), transformer_refs(highres, refs), base)
        source["highres"] = _named(highres, member)
    for network, part in (
        ("draft", draft_part),
        ("vae", base.vae),
        ("text_encoder", base.text_encoder),
    ):
        if network not in source and Path(part.what).suffix in SINGLE_FILES:
            source[network] = str(Path(part.what).relative_to(wan))
    if base.config is None:
        heads = draft_part.config.num_heads
        say(f"{wan} has no config.json: {heads} heads of width 128, as every published Wan has")
    return Checkpoint(
        draft=draft_part,
        highres=highres_part,
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=require_tokenizer(base.tokenizer, base.text_encoder.config.vocab_size),
        source=source,
    )


def _named(file: Path, member: str) -> str:
    # Published as lr/model.pt, 2k/model.pt and 4k/model.pt: the folder is part of the name.
    return f"{file.absolute().parent.name}/{file.name}:{member}"


def _draft(what: str, refs: Refs, base: Base) -> Part[DitConfig]:
    if extra := [name for name in refs if name.startswith(_HIGHRES_ONLY)]:
        raise BadWeights(
            f"{what} is a high-res checkpoint and cannot be the draft",
            got=some_names(extra),
            wanted="a transformer without spatial adapter and dt embedding",
            do="pass it as --highres",
        )
    config = dit_config(what, refs, base.config, base.fields)
    return _matching(make_part("draft", what, config, refs), what, base)


def _highres(what: str, refs: Refs, base: Base) -> Part[DitConfig]:
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
    return _matching(make_part("highres", what, config, refs), what, base)


def _matching(part: Part[DitConfig], what: str, base: Base) -> Part[DitConfig]:
    dit, z_dim = part.config, base.vae.config.z_dim
    got = (dit.in_dim, dit.out_dim, dit.text_dim)
    expected = (z_dim, z_dim, base.text_encoder.config.dim)
    if got != expected:
        raise BadWeights(
            f"{what} does not match the VAE and the text encoder",
            got=f"latent channels in, latent channels out, text width: {got}",
            wanted=str(expected),
            do="take all networks from one family of checkpoints: a Wan transformer of 14B or of "
            "Wan2.1 has 16 or 36 latent channels, Wan2.2-TI2V-5B has 48",
        )
    return part
