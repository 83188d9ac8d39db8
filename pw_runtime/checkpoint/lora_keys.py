# SPDX-License-Identifier: Apache-2.0
"""Keys of LoRA files: the tensor of a transformer that each changes, and its part in that.

Every writer has names of its own. All of them lead to an official module once the prefix is gone
and dots are underscores:

    diffusion_model.blocks.0.self_attn.q.lora_A.weight        ComfyUI, kijai, diffusion-pipe
    blocks.0.self_attn.q.lora_A.default.weight                DiffSynth
    pipe.dit.blocks.0.self_attn.q.lora_A.default.weight       DiffSynth, told to remove no prefix
    transformer.blocks.0.attn1.to_q.lora_A.weight             diffusers
    base_model.model.blocks.0.self_attn.q.lora_A.weight       PEFT
    lora_unet_blocks_0_self_attn_q.lora_down.weight           kohya, musubi-tuner
    lora_unet__blocks_0.self_attn.q.lora_down.weight          older versions of theirs
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

from pw_runtime.checkpoint.keymaps import dit_to_diffusers
from pw_runtime.models import expected_shapes
from pw_runtime.types import DitConfig

Part = Literal["down", "up", "alpha", "difference"]

_PREFIX: Final = re.compile(
    r"(?:(?:base_model\.model|diffusion_model|transformer|model|unet|pipe\.dit)\.)*(?:lora_unet__?)?"
)
# What is behind the module: its part, and the tensors of the module that it can be about.
_PARTS: Final[tuple[tuple[re.Pattern[str], Part, tuple[str, ...]], ...]] = (
    (
        re.compile(
            r"\.lora_A(\.(?!bias$)\w+)*|[._]lora[._]down(\.weight)?|\.lora_linear_layer\.down\.weight"
        ),
        "down",
        (".weight",),
    ),
    (
        re.compile(
            r"\.lora_B(\.(?!bias$)\w+)*|[._]lora[._]up(\.weight)?|\.lora_linear_layer\.up\.weight"
        ),
        "up",
        (".weight",),
    ),
    (re.compile(r"\.alpha"), "alpha", (".weight",)),
    (re.compile(r"\.diff"), "difference", (".weight", "")),
    (re.compile(r"\.diff_b"), "difference", (".bias",)),
)
_MODULE_AND_PART: Final = tuple(
    (re.compile(rf"(?P<module>.+?)(?:{pattern.pattern})"), part, leaves)
    for pattern, part, leaves in _PARTS
)

# Keys that are refused, by what they are.
_REFUSED: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (re.compile(r"\.(dora_scale|lora_magnitude_vector)\b"), "of DoRA, which rescales weights"),
    (re.compile(r"\.hada_[wt]\d"), "of LoHa, products of two low ranks"),
    (re.compile(r"\.lokr_[wt]\d"), "of LoKr, Kronecker products"),
    (re.compile(r"\.lora_mid\b"), "of LoRA with a middle matrix (lora_mid)"),
    (re.compile(r"\.b?oft_"), "of OFT, which rotates weights"),
    (re.compile(r"\.lora_B\.(\w+\.)?bias$"), "of biases beside the matrices (lora_B.bias)"),
    (
        re.compile(r"^(lora_)?(te\d?|text_encoders?(_\d)?|text_model)[._]"),
        "of the text encoder, which takes no LoRA here",
    ),
    (
        re.compile(
            r"[._]([kv]_img|norm_k_img|img_emb|add_[kv]_proj|norm_added_k|image_embedder)[._]"
        ),
        "of the image encoder that only image-to-video models of Wan2.1 have",
    ),
)
_MODULATION: Final = re.compile(r"(?<=\.)diff_m$")  # of LightX2V: of a block, of the head
_BLOCK: Final = re.compile(r"blocks_(\d+)_")
_HIGHRES: Final = re.compile(r"(spatial_adapter|dt_embedding)_")


@dataclass(frozen=True, slots=True)
class Target:
    """A key's tensor, by its official name, and the key's part in the change of it."""

    tensor: str
    part: Part


def target_of(key: str, config: DitConfig) -> Target | str:
    """Return what a key is for, or in words that follow "N keys" why it cannot be used."""
    for refused, reason in _REFUSED:
        if refused.search(key):
            return reason
    plain, modules = key[_PREFIX.match(key).end() :], _modules(config)  # type: ignore[union-attr]
    plain = _MODULATION.sub("modulation.diff", plain)
    shapes = expected_shapes("draft", config)
    for pattern, part, leaves in _MODULE_AND_PART:
        if match := pattern.fullmatch(plain):
            flat = _flat(match["module"])
            module = modules.get(flat)
            for name in (f"{module}{leaf}" for leaf in leaves):
                if name in shapes:
                    return Target(name, part)
            return _unknown(flat, config)
    module, _, leaf = plain.rpartition(".")
    if leaf in ("weight", "bias") and _flat(module) in modules:
        return "with a network's own weights, not changes of them"
    return "unknown"


def _unknown(flat: str, config: DitConfig) -> str:
    """Say why there is no module of this name."""
    block = _BLOCK.match(flat)
    if block and int(block[1]) >= config.num_layers:
        return f"of other blocks than the {config.num_layers} that the network has"
    if _HIGHRES.match(f"{flat}_") and not config.has_dt:
        return "of what only the high-res network has"
    return "unknown"


@cache
def _modules(config: DitConfig) -> Mapping[str, str]:
    """Return the official name of every module with tensors, by its flat names."""
    found: dict[str, str] = {}
    for name in expected_shapes("draft", config):
        module = re.sub(r"\.(weight|bias)$", "", name)
        for known in (module, dit_to_diffusers(module)):
            if known is not None:
                other = found.setdefault(_flat(known), module)
                assert other == module, f"{known} could be {other} or {module}"
    return found


def _flat(name: str) -> str:
    return name.replace(".", "_")
