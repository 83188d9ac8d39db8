# SPDX-License-Identifier: Apache-2.0
"""Peak memory of the text stage and of a denoising stage in closed form: no network runs.

Tested against a count of every tensor that the stage really makes (tests/planning).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from pw_engines import DTYPES
from pw_runtime.checkpoint.loader import is_streamed
from pw_runtime.execution.transformer_segments import (
    BLOCK_PARTS,
    POSITIONS,
    Segment,
    heads_at_once,
    quantized_name,
    segments_of,
)
from pw_runtime.models import expected_shapes
from pw_runtime.models.blocks import pad_biases
from pw_runtime.models.precision import store_dit_weight
from pw_runtime.models.quantized_linear import quantized_blocks
from pw_runtime.sampling.noise import latent_shape
from pw_runtime.types import (
    PATCH,
    Blocks,
    DitConfig,
    LinearFormat,
    MemoryItem,
    MemoryKind,
    Place,
    Precision,
    StageConfig,
    TextEncoderConfig,
    TransformerPlan,
    VideoConfig,
)

LATENTS = {"unipc": 5, "dpm++": 4}  # with the noise, while the first pass of a step runs
SOLVER_STEP = 9  # latents that a step makes beside those


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Bytes of a transformer's weights in the precision they are used in."""

    blocks: int  # all of all blocks
    rest: int
    slots: int  # one block's, of each kind of block that has slots when weights are streamed
    largest_text: int  # one block's keys and values of the text


@cache
def weight_bytes(
    config: DitConfig, precision: Precision, linear: LinearFormat = "exact"
) -> WeightBytes:
    """Count a transformer's weights by name, shape and the dtype each is kept in."""
    sizes = {}
    for name, shape in expected_shapes("draft", config).items():
        kept = store_dit_weight(name, torch.empty(shape, device="meta"), precision)
        sizes[name] = kept.numel() * kept.element_size()
    blocks = sum(size for name, size in sizes.items() if is_streamed(name))
    rest = sum(sizes.values()) - blocks
    segments = segments_of(config, precision, 1, linear)
    by_segment = {name: _bytes_of_weights(segment) for name, segment in segments.items()}
    exact, quantized = (
        sum(by_segment.get(quantized_name(part, kind), 0) for part in BLOCK_PARTS)
        for kind in ("exact", linear)
    )
    blocks -= len(quantized_blocks(config.num_layers, linear)) * (exact - quantized)
    return WeightBytes(
        blocks=blocks,
        rest=rest,
        slots=exact + (quantized if linear != "exact" else 0),
        largest_text=by_segment["text_keys_values"],
    )


def _bytes_of_weights(segment: Segment) -> int:
    """Return the bytes of a segment's weights, its last inputs."""
    tensors = segment.spec.inputs[-len(segment.weights) :]
    return sum(DTYPES[x.dtype].itemsize * math.prod(x.sized({})) for x in tensors)


def stage_memory(
    config: DitConfig,
    stage: StageConfig,
    video: VideoConfig,
    precision: Precision,
    plan: TransformerPlan,
    *,
    text_tokens: int | None = None,
    linear: LinearFormat = "exact",
    padded: bool = False,
    on_engines: bool = False,
    blocks: Blocks = "segments",
) -> tuple[MemoryItem, ...]:
    """List what is in memory at a stage's peak: on the device, and weights also on the host.

    Args:
        config: of its transformer.
        stage: size of the picture, sampler.
        video: length of the clip.
        precision: of the weights.
        plan: how it runs.
        text_tokens: of the prompt and of its negative each; None: as many as there can be.
        linear: format of the large linear layers.
        padded: engines take whole chunks only.
        on_engines: what engines compute with is in scratch memory of their own, not counted here;
            otherwise PyTorch allocates it.
        blocks: how a block is divided among engines.

    Returns:
        Items, the largest first.
    """
    shape, tokens = latent_shape(stage, video), stage.tokens(video)
    if padded:
        tokens = -(-tokens // plan.chunk) * plan.chunk
    low = 4 if precision == "fp32" else 2
    stream = tokens * config.dim  # elements of the residual stream
    latent = 4 * math.prod(shape)
    chunk = min(plan.chunk, tokens)
    held = {
        "latents of the solver": LATENTS[stage.solver] * latent,
        "text keys and values": _text(config, low, text_tokens, len(stage.passes)),
        "modulation": 4 * (config.num_layers + 1) * 6 * config.dim,
        "rotary tables": 8 * POSITIONS * (config.head_dim // 2),
    }
    if config.adapter_dim:
        held["features of the draft"] = low * stream
        held["resized draft"] = latent // PATCH**2
    heads = heads_at_once(tokens, config.num_heads, config.head_dim, low)
    some = tokens * heads * config.head_dim
    every = {"residual stream": 4 * stream}
    if plan.share_attention:
        every["first self-attention, shared"] = low * stream
    elif len(stage.passes) > 1:  # the second pass is the peak
        every["result of the first pass"] = latent
    qkv = {"queries, keys, values": 3 * low * stream}
    feed_forward = low * (config.dim + 2 * config.ffn_dim)
    feed_forward += _quantizing(config, low, linear)
    norms = config.dim * ((12 if low == 2 else 8) + 3 * low)  # in fp32
    before, after = config.dim * (3 * low + 4 + low), 8 * config.dim + max(feed_forward, norms)
    if on_engines:  # results are written where they belong, or take the place of their input
        before, after = 0, 4 * config.dim
    attention = low * some + 4 * tokens * heads
    if blocks == "attention":  # its inputs and its result, heads first
        attention = 4 * low * some
    phases = [
        every | qkv | {f"attention of {heads} heads": attention},
        every | qkv | {f"{chunk} tokens before attention": chunk * before},
        every
        | {
            "result of attention": low * stream,
            f"{chunk} tokens after attention": chunk * after,
        },
        {"step of the solver": SOLVER_STEP * latent},
    ]
    if blocks == "whole":
        phases[:3] = [every | {"result of a block": 4 * stream}]
    largest = max(phases, key=lambda phase: sum(phase.values()))
    items = _weights(config, precision, plan, linear)
    items += [
        MemoryItem(name=name, kind="activations", bytes=size, place="device")
        for name, size in (held | largest).items()
    ]
    return tuple(sorted(items, key=lambda item: -item.bytes))


def _weights(
    config: DitConfig, precision: Precision, plan: TransformerPlan, linear: LinearFormat
) -> list[MemoryItem]:
    """List the weights in memory; the bundle's files are not counted."""
    sizes = weight_bytes(config, precision, linear)
    if plan.weights == "resident":
        return [_item("weights", "weights", sizes.blocks + sizes.rest, "device")]
    items = [
        _item("weights outside the blocks", "weights", sizes.rest, "device"),
        _item("slots for one block", "weights", sizes.slots, "device"),
        _item("one block's weights in transit", "staging", sizes.slots, "host"),
    ]
    if plan.weights == "streamed":
        items.append(_item("weights of the blocks", "staging", sizes.blocks, "host"))
    return items


def _quantizing(config: DitConfig, low: int, linear: LinearFormat) -> int:
    """Return what quantized layers hold for a token beside exact ones, where PyTorch runs them.

    In bf16 these are fp32 copies of the widest activation: before it is quantized, or after a
    product with a quantized weight alone.
    """
    if linear == "exact":
        return 0
    if low == 4:
        return 0 if linear == "int8-weight" else 6 * config.dim
    return (3 if linear == "int8-weight" else 7) * config.ffn_dim


def _item(name: str, kind: MemoryKind, size: int, place: Place) -> MemoryItem:
    return MemoryItem(name=name, kind=kind, bytes=size, place=place)


def _text(config: DitConfig, low: int, text_tokens: int | None, passes: int) -> int:
    """Return the bytes of keys and values of every block for the text of each pass."""
    rows = config.text_len if text_tokens is None else text_tokens
    rows += len(pad_biases(config.text_len - rows, DTYPES["fp32" if low == 4 else "bf16"]))
    return passes * config.num_layers * 2 * rows * config.dim * low


def text_memory(
    config: TextEncoderConfig, precision: Precision, tokens: int = 512
) -> tuple[MemoryItem, ...]:
    """List the weights, and one layer's work on a text of `tokens` tokens."""
    low = 4 if precision == "fp32" else 2
    shapes = expected_shapes("text_encoder", config).values()
    pairs = tokens * tokens
    # The bias of every pair of positions, twice; or the integers that index it.
    attention = max(2 * low * config.num_heads * pairs, 54 * pairs)
    weights = low * sum(math.prod(shape) for shape in shapes)
    return (
        _item("weights of the text encoder", "weights", weights, "device"),
        _item("attention biases", "activations", attention, "device"),
        _item("hidden states", "activations", 7 * low * tokens * config.dim, "device"),
    )
