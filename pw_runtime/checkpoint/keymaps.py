# SPDX-License-Identifier: Apache-2.0
"""Tables that translate tensor names between the official files and other libraries.

Official names are those of the Wan2.2-TI2V-5B files; the others are those of diffusers'
WanTransformer3DModel and AutoencoderKLWan and of transformers' UMT5EncoderModel. A bundle uses
official names for transformers and VAE, and transformers' names for the text encoder.

In a row, `{b}` is a block, `{s}` a stage, `{j}` a module of a stage and `{side}` encoder or
decoder; `.weight`, `.bias` and `.gamma` are kept. `tests/data/keys` has the complete name lists of
the full-size models, against which the tables are tested.
"""

from __future__ import annotations

import re

Row = tuple[str, str]

_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}

DIT_DIFFUSERS: tuple[Row, ...] = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    ("blocks.{b}.modulation", "blocks.{b}.scale_shift_table"),
    *((f"blocks.{{b}}.self_attn.{k}", f"blocks.{{b}}.attn1.{v}") for k, v in _ATTENTION.items()),
    *((f"blocks.{{b}}.cross_attn.{k}", f"blocks.{{b}}.attn2.{v}") for k, v in _ATTENTION.items()),
    # The norm before cross-attention is the only one with weights: third there, second here.
    ("blocks.{b}.norm3", "blocks.{b}.norm2"),
    ("blocks.{b}.ffn.0", "blocks.{b}.ffn.net.0.proj"),
    ("blocks.{b}.ffn.2", "blocks.{b}.ffn.net.2"),
)

_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}

_RESIDUAL_PATHS = {
    "encoder.downsamples.{s}.downsamples.{j}": "encoder.down_blocks.{s}.resnets.{j}",
    "decoder.upsamples.{s}.upsamples.{j}": "decoder.up_blocks.{s}.resnets.{j}",
    "{side}.middle.0": "{side}.mid_block.resnets.0",
    "{side}.middle.2": "{side}.mid_block.resnets.1",
}

_RESAMPLE_PATHS = {
    "encoder.downsamples.{s}.downsamples.{j}": "encoder.down_blocks.{s}.downsampler",
    "decoder.upsamples.{s}.upsamples.{j}": "decoder.up_blocks.{s}.upsampler",
}

VAE_DIFFUSERS: tuple[Row, ...] = (
    ("conv1", "quant_conv"),
    ("conv2", "post_quant_conv"),
    ("{side}.conv1", "{side}.conv_in"),
    ("{side}.head.0", "{side}.norm_out"),
    ("{side}.head.2", "{side}.conv_out"),
    ("{side}.middle.1.norm", "{side}.mid_block.attentions.0.norm"),
    ("{side}.middle.1.to_qkv", "{side}.mid_block.attentions.0.to_qkv"),
    ("{side}.middle.1.proj", "{side}.mid_block.attentions.0.proj"),
    *(
        (f"{official}.{inner}", f"{diffusers}.{name}")
        for official, diffusers in _RESIDUAL_PATHS.items()
        for inner, name in _RESIDUAL.items()
    ),
    *(
        (f"{official}.{inner}", f"{diffusers}.{inner}")
        for official, diffusers in _RESAMPLE_PATHS.items()
        for inner in ("resample.1", "time_conv")
    ),
)

TEXT_ENCODER_TRANSFORMERS: tuple[Row, ...] = (
    ("token_embedding", "shared"),
    ("norm", "encoder.final_layer_norm"),
    ("blocks.{b}.norm1", "encoder.block.{b}.layer.0.layer_norm"),
    *(
        (f"blocks.{{b}}.attn.{x}", f"encoder.block.{{b}}.layer.0.SelfAttention.{x}")
        for x in ("q", "k", "v", "o")
    ),
    (
        "blocks.{b}.pos_embedding.embedding",
        "encoder.block.{b}.layer.0.SelfAttention.relative_attention_bias",
    ),
    ("blocks.{b}.norm2", "encoder.block.{b}.layer.1.layer_norm"),
    ("blocks.{b}.ffn.gate.0", "encoder.block.{b}.layer.1.DenseReluDense.wi_0"),
    ("blocks.{b}.ffn.fc1", "encoder.block.{b}.layer.1.DenseReluDense.wi_1"),
    ("blocks.{b}.ffn.fc2", "encoder.block.{b}.layer.1.DenseReluDense.wo"),
)

# Transformers ties these two; a checkpoint may contain either name or both.
TEXT_ENCODER_ALIAS = ("encoder.embed_tokens.weight", "shared.weight")

_PLACEHOLDERS = {
    "{b}": r"(?P<b>\d+)",
    "{s}": r"(?P<s>\d+)",
    "{j}": r"(?P<j>\d+)",
    "{side}": "(?P<side>encoder|decoder)",
}


def _pattern(template: str) -> re.Pattern[str]:
    seen: set[str] = set()
    parts = []
    for part in re.split(r"(\{\w+\})", template):
        assert part not in seen, f"{template} names {part} twice"
        if part in _PLACEHOLDERS:
            seen.add(part)
        parts.append(_PLACEHOLDERS.get(part, re.escape(part)))
    return re.compile("".join(parts) + r"(?P<leaf>(\.(weight|bias|gamma))?)")


def _compile(rows: tuple[Row, ...]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((_pattern(left), right) for left, right in rows)


def _flip(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple((right, left) for left, right in rows)


_DIT_TO = _compile(DIT_DIFFUSERS)
_DIT_FROM = _compile(_flip(DIT_DIFFUSERS))
_VAE_TO = _compile(VAE_DIFFUSERS)
_VAE_FROM = _compile(_flip(VAE_DIFFUSERS))
_TEXT_TO = _compile(TEXT_ENCODER_TRANSFORMERS)
_TEXT_FROM = _compile(_flip(TEXT_ENCODER_TRANSFORMERS))


def _translate(
    name: str, table: tuple[tuple[re.Pattern[str], str], ...], **known: int
) -> str | None:
    for pattern, template in table:
        if match := pattern.fullmatch(name):
            return template.format(**{**known, **match.groupdict()}) + match["leaf"]
    return None


def dit_to_diffusers(name: str) -> str | None:
    """Translate official transformer name -> WanTransformer3DModel name; None if unknown."""
    return _translate(name, _DIT_TO)


def dit_from_diffusers(name: str) -> str | None:
    """Translate WanTransformer3DModel name -> official transformer name; None if unknown."""
    return _translate(name, _DIT_FROM)


def vae_to_diffusers(name: str) -> str | None:
    """Translate official VAE name -> AutoencoderKLWan name; None if unknown."""
    return _translate(name, _VAE_TO)


def vae_from_diffusers(name: str, *, encoder_blocks: int, decoder_blocks: int) -> str | None:
    """Translate AutoencoderKLWan name -> official VAE name; None if unknown.

    The official files number the resampler of a stage after its residual blocks; diffusers does
    not number it. That is why the counts of residual blocks per stage are needed.
    """
    blocks = encoder_blocks if name.startswith("encoder.") else decoder_blocks
    return _translate(name, _VAE_FROM, j=blocks)


def text_encoder_to_transformers(name: str) -> str | None:
    """Translate official UMT5 name -> UMT5EncoderModel name; None if unknown."""
    return _translate(name, _TEXT_TO)


def text_encoder_from_transformers(name: str) -> str | None:
    """Translate UMT5EncoderModel name -> official UMT5 name; None if unknown."""
    return _translate(name, _TEXT_FROM)
