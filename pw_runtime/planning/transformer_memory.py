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
from pw_kernels.attention.sparse import sparse_bytes
from pw_runtime.checkpoint.loader import is_streamed
from pw_runtime.execution.division import RankShare, rank_share, slice_sizes
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
# Tensors as large as the queries of a slice, while it is exchanged. Of the slice before: sent and
# received ones, and its queries. Of itself: those computed, put in order, sent and received.
UNDER_WAY, SENDING = 7, 12
FEATURES = "features of the draft"


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
    keep: float | None = None,
    rank: int = 0,
    kept: int = 0,
    merges: bool = False,
    clean: bool = False,
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
        keep: fraction of the blocks of keys that self-attention keeps; None: it is exact.
        rank: of the plan's split, whose memory it is.
        kept: latents that approximations keep from step to step.
        merges: a LoRA is merged into the weights, one after the other.
        clean: the first latent frame is known, and its tokens have a timestep of their own.

    Returns:
        Items, the largest first.
    """
    sizes = stage_slices(stage, video, plan.chunk, padded=padded, clean=clean)
    part = _Part(
        config=config,
        plan=plan,
        share=rank_share(config, plan.split, sizes, passes=len(stage.passes), rank=rank),
        first=rank == 0,
        tokens=sum(sizes),
        slice=max(sizes),
        latent=4 * math.prod(latent_shape(stage, video)),
        low=4 if precision == "fp32" else 2,
        keep=keep,
        clean=clean,
    )
    held = part.held(LATENTS[stage.solver] + kept, text_tokens)
    if blocks == "whole":
        phases = [part.residual() | {"result of a block": 4 * part.stream}]
    else:
        phases = part.block_phases(linear, blocks, on_engines=on_engines)
    if part.first:
        phases.append({"step of the solver": SOLVER_STEP * part.latent})
    if config.adapter_dim and plan.split.sequence > 1:
        phases.append(part.all_features())
    largest = max(phases, key=lambda phase: sum((held | phase).values()))
    items = _weights(config, precision, plan, linear)
    if merges:
        items.append(_item("LoRA merged into a weight", "activations", _merging(config), "host"))
    items += [
        MemoryItem(name=name, kind="activations", bytes=size, place="device")
        for name, size in (held | largest).items()
    ]
    return tuple(sorted(items, key=lambda item: -item.bytes))


def stage_slices(
    stage: StageConfig,
    video: VideoConfig,
    chunk: int,
    *,
    padded: bool = False,
    clean: bool = False,
) -> tuple[int, ...]:
    """Return the tokens of each engine call in a stage.

    Where the first latent frame is known, its calls are apart, and take copies if they pad.
    """
    tokens = stage.tokens(video)
    if clean:
        first = tokens // latent_shape(stage, video)[1]
        return slice_sizes(first, chunk) + slice_sizes(tokens - first, chunk)
    return slice_sizes(tokens, chunk, padded=padded)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Part of a stage that one rank does; every method lists bytes on the device by name."""

    config: DitConfig
    plan: TransformerPlan
    share: RankShare
    first: bool  # the rank that runs the solver
    tokens: int  # of all ranks
    slice: int  # tokens of the largest one
    latent: int  # bytes
    low: int  # bytes of an activation
    keep: float | None  # fraction of the blocks of keys; None: exact attention
    clean: bool  # the first latent frame is known

    @property
    def stream(self) -> int:
        """Elements of the residual stream."""
        return self.share.own * self.config.dim

    def held(self, latents: int, text_tokens: int | None) -> dict[str, int]:
        """List what is there during the whole stage."""
        config = self.config
        # Further ranks get the latent of each step.
        solver = {"latents of the solver": (latents + self.clean) * self.latent}
        held = solver if self.first else {"latent": self.latent}
        held |= {
            "text keys and values": _text(config, self.low, text_tokens, self.share.passes),
            "modulation": 4 * (config.num_layers + 1) * 6 * config.dim * (1 + self.clean),
            "rotary tables": 8 * POSITIONS * (config.head_dim // 2),
        }
        if config.adapter_dim:
            held[FEATURES] = self.low * self.stream
            held["resized draft"] = self.latent // PATCH**2
        return held

    def residual(self) -> dict[str, int]:
        """List what is there during a pass."""
        every = {"residual stream": 4 * self.stream}
        if self.plan.share_attention:
            every["first self-attention, shared"] = self.low * self.stream
        elif self.share.passes > 1:  # the second pass is the peak
            result = self.latent if self.first else self.latent * self.share.own // self.tokens
            every["result of the first pass"] = result
        return every

    def block_phases(
        self, linear: LinearFormat, blocks: Blocks, *, on_engines: bool
    ) -> list[dict[str, int]]:
        """List the phases of a block: before attention, attention, and after it.

        Where ranks divide the tokens, slices are exchanged before attention, and after it the
        result for all queries and a rank's heads becomes that of its tokens and all heads.
        """
        config, low, share = self.config, self.low, self.share
        chunk = min(self.plan.chunk, self.tokens)
        feed_forward = low * (config.dim + 2 * config.ffn_dim)
        feed_forward += _quantizing(config, low, linear)
        norms = config.dim * ((12 if low == 2 else 8) + 3 * low)  # in fp32
        before, after = config.dim * (3 * low + 4 + low), 8 * config.dim + max(feed_forward, norms)
        if on_engines:  # results are written where they belong, or take the place of their input
            before, after = 0, 4 * config.dim
            if self.clean:  # they take copies of slices that begin or end anywhere
                before, after = config.dim * (4 + 3 * low), config.dim * (8 + low)
        heads = heads_at_once(self.tokens, share.heads, config.head_dim, low)
        some = share.queries * heads * config.head_dim
        attention = low * some + 4 * share.queries * heads
        if blocks == "attention":  # its inputs and its result, heads first
            attention = 4 * low * some
        elif self.keep is not None:
            attention = sparse_bytes(self.tokens, heads, config.head_dim, low, self.keep)
        every = self.residual()
        row = low * share.heads * config.head_dim  # bytes of a token in the heads of this rank
        qkv = {"queries, keys, values": row * (2 * self.tokens + share.queries)}
        result = {"result of attention": low * self.stream}
        phases = [
            every | qkv | {f"attention of {heads} heads": attention},
            every | qkv | {f"{chunk} tokens before attention": chunk * before},
            every | result | {f"{chunk} tokens after attention": chunk * after},
        ]
        if self.plan.split.sequence > 1:
            of_slice, moving = low * self.slice * config.dim, "slices that are exchanged"
            under_way = UNDER_WAY if share.slices > 1 else 0
            phases[1] |= {moving: (under_way + 3) * of_slice}
            received = max(row * share.queries, low * self.stream)
            phases += [
                every | qkv | {moving: (under_way + SENDING) * of_slice},
                every | result | {"results that are exchanged": received},
            ]
        return phases

    def all_features(self) -> dict[str, int]:
        """List what there is while the features of the draft are computed for all tokens."""
        config = self.config
        hidden = 4 * self.tokens * config.adapter_dim
        return {FEATURES: 2 * self.low * self.tokens * config.dim, "adapter": hidden}


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
    ]
    if plan.weights == "gathered":
        share = -(-sizes.blocks // plan.split.ranks)
        return [*items, _item("share of the blocks' weights", "weights", share, "device")]
    items.append(_item("one block's weights in transit", "staging", sizes.slots, "host"))
    if plan.weights == "streamed":
        items.append(_item("weights of the blocks", "staging", sizes.blocks, "host"))
    return items


def _merging(config: DitConfig) -> int:
    """Return the bytes of the largest weight and of what is added to it, in fp32."""
    return 2 * 4 * max(math.prod(shape) for shape in expected_shapes("draft", config).values())


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
    # The bias of every pair of positions, twice, and the integers that index it.
    attention = (2 * low * config.num_heads + 8) * pairs
    weights = low * sum(math.prod(shape) for shape in shapes)
    return (
        _item("weights of the text encoder", "weights", weights, "device"),
        _item("attention biases", "activations", attention, "device"),
        _item("hidden states", "activations", 7 * low * tokens * config.dim, "device"),
    )
