# SPDX-License-Identifier: Apache-2.0
"""Tell by the names of tensors which network they are."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from pw_runtime.checkpoint.bundle import some_names
from pw_runtime.errors import BadWeights

Role = Literal["transformer", "VAE", "text encoder"]
Scheme = Literal["official", "library"]


@dataclass(frozen=True, slots=True)
class Kind:
    """A network or another thing that files hold; without `role` it has no place in a bundle."""

    what: str
    role: Role | None = None
    scheme: Scheme = "official"  # whose names: Wan's, or those of diffusers and transformers


# The first row with a name that matches from its start decides.
_KINDS: tuple[tuple[str, Kind], ...] = (
    (
        r"blocks\.\d+\.self_attn\.[qkvo]\.weight$",
        Kind("a Wan transformer", "transformer"),
    ),
    (
        r"blocks\.\d+\.attn1\.to_[qkv]\.weight$",
        Kind("a Wan transformer with diffusers' names", "transformer", "library"),
    ),
    (r"decoder\.upsamples\.\d+\.upsamples\.", Kind("a Wan2.2 VAE", "VAE")),
    (
        r"decoder\.up_blocks\.\d+\.resnets\.\d+\.norm1\.gamma$",
        Kind("a Wan VAE with diffusers' names", "VAE", "library"),
    ),
    (
        r"blocks\.\d+\.attn\.[qkvo]\.weight$",
        Kind("a UMT5 text encoder", "text encoder"),
    ),
    (  # alone among its family it has a bias in every block
        r"encoder\.block\.[1-9]\d*\.layer\.0\.SelfAttention\.relative_attention_bias\.weight$",
        Kind("a UMT5 text encoder with transformers' names", "text encoder", "library"),
    ),
    (r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.", Kind("a T5 text encoder, not UMT5")),
    (r"decoder\.upsamples\.\d+\.(residual|resample)\.", Kind("the VAE of Wan2.1")),
    (r"decoder\.up(_blocks)?\.\d+\.", Kind("a VAE of another family")),
    (r"enc\.blk\.|blk\.\d+\.", Kind("a network with llama.cpp's names")),
    (r"text_model\.encoder\.|transformer\.resblocks\.", Kind("a CLIP text encoder")),
    (r"vision_model\.|visual\.", Kind("an image encoder")),
    (r"(language_model\.)?layers\.\d+\.self_attn\.q_proj\.", Kind("a language model")),
    (
        r"(double_blocks|single_blocks|transformer_blocks|joint_blocks)\.\d+\.",
        Kind("a transformer of another family"),
    ),
    (r"(input_blocks|down_blocks|output_blocks)\.\d+\.", Kind("a UNet of another family")),
)
_LORA_DOWN = re.compile(r"[._]lora([._](A|down)\b|_linear_layer\.down\b)")
_LORA = re.compile(
    r"[._]lora[._](A|B|up|down|mid|linear_layer)\b|^lora_(unet|te)|\.diff(_[bm])?$|\.dora_scale$"
    r"|\.(hada|lokr)_w\d"
)


def kind_of(shapes: Mapping[str, tuple[int, ...]]) -> Kind | None:
    """Return which network tensors of these names and shapes are, or None."""
    if adapted := [name for name in shapes if _LORA.search(name)]:
        return Kind(_lora(adapted, shapes))
    for pattern, kind in _KINDS:
        match = re.compile(pattern).match
        if any(match(name) for name in shapes):
            return kind
    return None


def require_role(what: str, shapes: Mapping[str, tuple[int, ...]], role: Role) -> Kind:
    """Return the kind of these tensors if it has this role.

    Raises BadWeights that names what they are instead, or the prefixes of unknown names.
    """
    kind = kind_of(shapes)
    if kind is not None and kind.role == role:
        return kind
    if kind is None:
        raise BadWeights(
            f"{what} is not a {role} that is known",
            got=f"{len(shapes)} tensor(s) with names under {prefixes(shapes)}",
            wanted=f"the {role} of Wan2.2-TI2V-5B, with or without one prefix before all names",
            do="check that this is the checkpoint you meant; if it is, save its tensors alone",
        )
    remedy = f"pass the {role} of Wan2.2-TI2V-5B"
    if kind.role is not None:
        remedy += f", and this file where the {kind.role} belongs"
    elif "LoRA" in kind.what:
        remedy = "pass its base model, and this file to --lora, of `pw convert` or `pw generate`"
    raise BadWeights(f"{what} is not a {role}", got=kind.what, wanted=f"a {role}", do=remedy)


def prefixes(names: Collection[str]) -> str:
    """Return the prefixes that names share in groups, with the number of names and an example."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(name.partition(".")[0], []).append(name)
    return some_names(
        [f"{_shared(group)} ({len(group)}, such as {group[0]})" for group in groups.values()]
    )


def _shared(names: list[str]) -> str:
    """Return the leading components that sorted names share: the first and the last decide."""
    pairs = zip(names[0].split("."), names[-1].split("."), strict=False)
    return ".".join(first for first, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _lora(adapted: list[str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    ranks = sorted({shapes[n][0] for n in adapted if _LORA_DOWN.search(n) and shapes[n]})
    layers = sum(1 for name in adapted if _LORA_DOWN.search(name))
    if not ranks:
        return f"a LoRA without low-rank factors ({some_names(adapted)})"
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return f"a LoRA of {layers} layers, {rank}"
