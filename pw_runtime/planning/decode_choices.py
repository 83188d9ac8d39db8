# SPDX-License-Identifier: Apache-2.0
"""The ways to decode a clip: tiles and their order, on engines or not, and what each takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from types import MappingProxyType

from pw_runtime.execution.decoder_segments import engine_tiling
from pw_runtime.execution.division import run_of
from pw_runtime.models import expected_shapes
from pw_runtime.models.tiling import make_bands, make_strips
from pw_runtime.models.vae import PIXEL_CHANNELS
from pw_runtime.planning.decode_memory import (
    PACKED,
    decode_memory,
    waiting_sizes,
    waiting_traffic,
)
from pw_runtime.planning.engine_decode import COARSE_RESULTS, engine_decode_memory
from pw_runtime.planning.workload import Workload
from pw_runtime.sampling.noise import latent_shape
from pw_runtime.system.pinned_memory import pinned_bytes
from pw_runtime.types import (
    VAE_STRIDE,
    Codec,
    DecodeOrder,
    DecodePlan,
    MemoryItem,
    Place,
    TilingConfig,
    VaeConfig,
)

# Bands in which a CPU decodes as fast as in one, in less memory: measured with 1 to 16 of them;
# with two latent rows in each it was 10 % slower.
CPU_BANDS, BAND_ROWS = 4, 8
HEAP_GAPS = 20  # a twentieth of the tensors: 3 to 7 % were measured
LIBRARIES = 80 * 2**20  # measured: code first used by the decode, and oneDNN's own buffers
# Frames of 1.5 bytes a pixel that an encoder holds with the threads of stages/codecs.py: at most
# 84, 123, 182 and 70 were measured at 3840x2144, packets and frames in production included.
# A PNG has one frame of 3 bytes a pixel, its copies and its bytes (by count).
ENCODER_FRAMES: Mapping[Codec, int] = MappingProxyType(
    {"h264": 110, "hevc": 150, "av1": 210, "ffv1": 80, "png": 8}
)


def decode_choices(
    work: Workload, *, gpu: bool
) -> Iterator[tuple[DecodePlan, tuple[tuple[MemoryItem, ...], ...]]]:
    """Yield the plans of a decode, the fastest first, with what each rank has at its peak.

    More and more tiles frame by frame, then tile by tile: both change the frames by rounding only.
    Ranks divide the tiles of each frame; tile by tile the first one decodes alone.
    """
    if work.in_memory:
        held = process_item("frames", work.prompts * work.preset.video.frames * _pixels(work) * 3)
    else:
        size = ENCODER_FRAMES[work.options.codec] * _pixels(work) * 3 // 2
        held = process_item(f"{work.options.codec} encoder (estimate)", size)
    for plan in _plans(work, gpu=gpu):
        first, *others = (_of_rank(work, plan, rank, gpu=gpu) for rank in range(plan.ranks))
        yield plan, ((*first, held), *others)


def _of_rank(work: Workload, plan: DecodePlan, rank: int, *, gpu: bool) -> tuple[MemoryItem, ...]:
    """List what a rank has at its peak."""
    items = _items(work, plan, rank, gpu=gpu)
    if plan.engines and work.scratch.get("vae"):
        kept = (item for item in items if item.kind == "weights" or item.name == PACKED)
        items = (*kept, *_on_engines(work, plan, rank))
    if gpu:
        return items
    on_host = (replace(item, place="host") for item in items)
    return (*on_host, *_on_a_cpu(work.vae, items))


def _plans(work: Workload, *, gpu: bool) -> list[DecodePlan]:
    """List the plans of a decode, the fastest first."""
    first, (_, _, rows, columns) = work.tiling, _shape(work)
    most = min(rows, columns)  # also what a preset, and a latents file, may say
    if not gpu and first.tiling == "exact" and not work.decoder_engines:
        least = min(CPU_BANDS, rows // BAND_ROWS, most)
        first = replace(first, strips=max(first.strips, least))
    counts = [first.strips]
    if first.tiling == "exact":
        counts = _doubled(first.strips, most)
    stored = {"frames": 0, "tiles": work.preset.video.frames * work.frame_bytes}
    orders: tuple[DecodeOrder, ...] = ("frames", "tiles")
    if first.order != "auto":
        orders = (first.order,)
    plans = [
        DecodePlan(tiling=replace(first, strips=count, order=order), store_bytes=stored[order])
        for order in orders
        for count in counts
        # One tile by itself saves nothing.
        if order == "frames" or count > 1 or first.order == "tiles"
    ]
    if work.decoder_engines:  # each engine fits one size
        on_engines = [
            replace(plan, tiling=engine_tiling(work.vae, plan.tiling, rows, columns), engines=True)
            for plan in plans
            if plan.tiling.strips == first.strips
        ]
        plans = [*on_engines, *plans]
    if work.ranks == 1 or first.tiling == "official" or first.order == "tiles":
        return plans
    return [*_divided(work, plans), *(plan for plan in plans if plan.tiling.order == "tiles")]


def _divided(work: Workload, plans: list[DecodePlan]) -> list[DecodePlan]:
    """Divide the tiles of the plans that go frame by frame among ranks: one for each, or more."""
    _, _, rows, columns = _shape(work)
    divided = [
        replace(plan, ranks=min(work.ranks, plan.tiling.strips)) for plan in plans if plan.engines
    ]
    exact = [plan for plan in plans if not plan.engines]
    least = max(exact[0].tiling.strips, min(work.ranks, rows))
    for count in _doubled(least, min(rows, columns)):
        bands = len(make_bands(rows, count, work.vae))
        tiling = replace(exact[0].tiling, strips=count, order="frames")
        divided.append(DecodePlan(tiling=tiling, ranks=min(work.ranks, bands)))
    return [plan for plan in divided if plan.tiling.order == "frames"]


def _doubled(count: int, most: int) -> list[int]:
    """List a count of tiles, and twice, four times ... as many where there can be."""
    return [count, *(n for n in (count * 2**power for power in range(1, 8)) if n <= most)]


def decode_traffic(work: Workload, plan: DecodePlan) -> int:
    """Return the bytes that cross between host and GPU in a decode, but weights and pixels."""
    if plan.tiling.order == "frames":
        return 0
    if plan.engines:
        items = _on_engines(work, plan)
        return 2 * sum(item.bytes for item in items if item.name == COARSE_RESULTS)
    if plan.tiling.tiling == "official":
        return 2 * sum(_begun(work, plan.tiling))
    _, frames, rows, columns = _shape(work)
    bands = [band.stop - band.start for band in make_bands(rows, plan.tiling.strips, work.vae)]
    waiting = waiting_sizes(work.vae, frames, rows, columns, bands, _itemsize(work))
    return waiting_traffic(waiting, len(bands))


def decode_text(plan: DecodePlan) -> str:
    """Describe how a clip is decoded."""
    tiling = plan.tiling
    kind = "blended strip" if tiling.tiling == "official" else "strip" if plan.engines else "band"
    pieces = f"{tiling.strips} {kind}s" if tiling.strips > 1 else "the picture as a whole"
    if tiling.order == "tiles":
        pieces += ", each through the whole clip, with the past of one in memory"
    ranks = f", divided among {plan.ranks} ranks" if plan.ranks > 1 else ""
    return "on engines, " * plan.engines + pieces + ranks


def process_item(name: str, size: int, place: Place = "host") -> MemoryItem:
    """Return an item that is no tensor."""
    return MemoryItem(name=name, kind="process", bytes=size, place=place)


def _shape(work: Workload) -> tuple[int, ...]:
    """Return the shape of the latent to decode, [C, T, H, W]."""
    return latent_shape(list(work.stages.values())[-1], work.preset.video)


def _pixels(work: Workload) -> int:
    last = list(work.stages.values())[-1]
    return last.width * last.height


def _itemsize(work: Workload) -> int:
    return 4 if work.options.vae_precision == "fp32" else 2


def _on_a_cpu(config: VaeConfig, items: Iterable[MemoryItem]) -> tuple[MemoryItem, ...]:
    """List what a decode on a CPU takes beside tensors."""
    shapes = expected_shapes("vae", config).items()
    largest = max(4 * math.prod(shape) for name, shape in shapes if name.startswith("decoder."))
    gaps = sum(item.bytes for item in items) // HEAP_GAPS
    return (
        process_item("a weight in oneDNN's layout", largest),
        process_item("code of oneDNN and the encoder", LIBRARIES),
        process_item("gaps of the heap (estimate)", gaps),
    )


def _on_engines(work: Workload, plan: DecodePlan, rank: int = 0) -> tuple[MemoryItem, ...]:
    _, frames, rows, columns = _shape(work)
    owned = run_of(plan.tiling.strips, plan.ranks, rank)
    return engine_decode_memory(work.vae, plan.tiling, frames, rows, columns, owned=owned)


def _items(work: Workload, plan: DecodePlan, rank: int, *, gpu: bool) -> tuple[MemoryItem, ...]:
    """List what a rank's decode takes, also with strips that are blended."""
    config, tiling, (_, frames, rows, columns) = work.vae, plan.tiling, _shape(work)
    itemsize = _itemsize(work)
    if tiling.tiling == "exact":
        return decode_memory(
            config,
            frames=frames,
            rows=rows,
            columns=columns,
            strips=tiling.strips,
            itemsize=itemsize,
            order=tiling.order,
            on_gpu=gpu,
            ranks=plan.ranks,
            rank=rank,
            rgb=work.rgb,
        )
    # Each strip is a picture of its own, with caches of its own; they run one after the other.
    items: dict[tuple[str, Place], MemoryItem] = {}
    for strip in make_strips(columns, tiling.strips, tiling.overlap):
        width = strip.last - strip.first
        alone = decode_memory(
            config, frames=frames, rows=rows, columns=width, itemsize=itemsize, rgb=work.rgb
        )
        for item in alone:
            earlier = items.get((item.name, item.place), replace(item, bytes=0))
            size = max(earlier.bytes, item.bytes)
            if item.kind == "caches" and tiling.order == "frames":
                size = earlier.bytes + item.bytes
            items[item.name, item.place] = replace(item, bytes=size)
    blended = MemoryItem(
        name="blended frames",
        kind="activations",
        bytes=_colours(4, 8 * rows, 8 * columns),
        place="device",
    )
    begun = MemoryItem(
        name="columns between strips",
        kind="activations",
        bytes=_waiting(work, tiling, gpu=gpu) if tiling.order == "tiles" else 0,
        place="host",
    )
    return (*items.values(), blended, *([begun] if begun.bytes else []))


def _waiting(work: Workload, tiling: TilingConfig, *, gpu: bool) -> int:
    """Return the bytes of memory for what blended strips leave to each other, pinned for a GPU."""
    begun, frames = _begun(work, tiling), _shape(work)[1]
    return (
        pinned_bytes(size // frames for size in begun for _ in range(frames)) if gpu else sum(begun)
    )


def _begun(work: Workload, tiling: TilingConfig) -> list[int]:
    """List the bytes, of all frames, of the columns that each strip leaves to the next one."""
    _, frames, rows, columns = _shape(work)
    strips = make_strips(columns, tiling.strips, tiling.overlap)
    pictures = VAE_STRIDE[0] * (frames - 1) + 1
    return [
        _colours(pictures, 8 * rows, 8 * (one.last - other.first))
        for one, other in pairwise(strips)
    ]


def _colours(frames: int, rows: int, columns: int) -> int:
    """Return the bytes of the colours of 2x2 pixel blocks."""
    return 4 * PIXEL_CHANNELS * frames * rows * columns
