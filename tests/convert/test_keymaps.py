# SPDX-License-Identifier: Apache-2.0
"""Names and configs of the full-size models, against the complete lists in tests/data/keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path

import pytest
import torch

from pw_export.checkpoints.configs import (
    dit_config,
    text_encoder_config,
    vae_config,
)
from pw_export.checkpoints.tensor_refs import Ref
from pw_export.wan22_configs import DRAFT, HIGHRES, TEXT_ENCODER, VAE
from pw_runtime.checkpoint import keymaps
from pw_runtime.models import expected_shapes
from pw_runtime.types import Config, Network

Shapes = dict[str, tuple[int, ...]]
KEYS = Path(__file__).parents[1] / "data" / "keys"
WAYS: dict[str, tuple[Callable[[str], str | None], Callable[[str], str | None]]] = {
    "dit": (keymaps.dit_to_diffusers, keymaps.dit_from_diffusers),
    "vae": (
        keymaps.vae_to_diffusers,
        partial(keymaps.vae_from_diffusers, encoder_blocks=2, decoder_blocks=3),
    ),
    "text_encoder": (
        keymaps.text_encoder_to_transformers,
        keymaps.text_encoder_from_transformers,
    ),
}


def rows(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    content = json.loads((KEYS / f"{name}.json").read_text())
    return {official: (theirs, tuple(shape)) for official, (theirs, shape) in content.items()}


def full_size(network: Network) -> Shapes:
    """Read the shapes of a published network, with the bundle's names."""
    if network == "vae":
        return {official: shape for official, (_, shape) in rows("vae").items()}
    if network == "text_encoder":
        return dict(rows("text_encoder").values())
    shapes = {official: shape for official, (_, shape) in rows("dit").items()}
    if network == "highres":
        extra = json.loads((KEYS / "highres_extra.json").read_text())
        shapes |= {name: tuple(shape) for name, shape in extra.items()}
    return shapes


@pytest.mark.parametrize("name", WAYS)
def test_table_gives_every_published_name_in_both_directions(name: str) -> None:
    there, back = WAYS[name]
    table = rows(name)
    assert {official: there(official) for official in table} == {
        official: theirs for official, (theirs, _) in table.items()
    }
    assert {theirs: back(theirs) for theirs, _ in table.values()} == {
        theirs: official for official, (theirs, _) in table.items()
    }


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(
    "stranger",
    ["", "x", "blocks.x.norm3.weight", "blocks.0.norm9.weight", "conv1Xweight"],
)
def test_table_knows_no_other_names(name: str, stranger: str) -> None:
    there, back = WAYS[name]
    assert there(stranger) is None
    assert back(stranger) is None


def test_norm_before_cross_attention_changes_its_number() -> None:
    """diffusers numbers the norms as they run; swapping only the attentions loads silently."""
    assert keymaps.dit_to_diffusers("blocks.7.norm3.weight") == "blocks.7.norm2.weight"
    assert keymaps.dit_from_diffusers("blocks.7.norm3.weight") is None


def test_modulation_of_head_and_of_blocks_stay_apart() -> None:
    assert keymaps.dit_from_diffusers("scale_shift_table") == "head.modulation"
    assert keymaps.dit_from_diffusers("blocks.3.scale_shift_table") == "blocks.3.modulation"


@pytest.mark.parametrize(
    ("network", "config", "parameters"),
    [
        ("draft", DRAFT, 4_999_787_712),
        ("highres", HIGHRES, 5_103_666_624),
        ("vae", VAE, 704_688_668),
        ("text_encoder", TEXT_ENCODER, 5_680_910_336),
    ],
)
def test_published_shapes_give_the_full_size_model_with_nothing_left_over(
    network: Network, config: Config, parameters: int
) -> None:
    shapes = full_size(network)
    refs = {n: Ref(shape=s, dtype="bfloat16", read=torch.Tensor) for n, s in shapes.items()}
    derived: Config
    if network == "vae":
        derived = vae_config(Path("vae.pth"), refs, {})
    elif network == "text_encoder":
        derived = text_encoder_config(Path("t5.pth"), refs, {})
    else:
        derived = dit_config(network, refs, Path("config.json"), {"num_heads": 24})
    assert derived == config
    assert expected_shapes(network, derived) == shapes
    assert sum(map(prod, shapes.values())) == parameters
