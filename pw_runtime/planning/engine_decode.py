# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a decode on engines that keep scratch memory of their own.

What an engine computes with is in its scratch memory; beside that there are its inputs and outputs,
whose sizes its spec has. Tested against a count of the tensors of a decode (tests/planning).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

from pw_engines import DTYPES, EngineSpec, TensorSpec
from pw_runtime.execution.decoder_segments import (
    PAST,
    Part,
    decode_strips,
    segment_name,
    segments_of_decode,
)
from pw_runtime.system.pinned_memory import pinned_bytes
from pw_runtime.types import MemoryItem, MemoryKind, TilingConfig, VaeConfig

COARSE_RESULTS = "results of the coarse part"  # of all frames, in the order `tiles`


@cache
def engine_decode_memory(
    config: VaeConfig,
    tiling: TilingConfig,
    frames: int,
    rows: int,
    columns: int,
    *,
    pinned: bool = True,
    owned: range | None = None,
) -> tuple[MemoryItem, ...]:
    """List what is in memory at the peak of a decode on engines, beside weights and frames.

    Scratch memory is not counted here: all stages hold it.

    Args:
        config: of the decoder.
        tiling: strips of columns, and their order.
        frames: of the latent.
        rows: of the latent.
        columns: of the latent.
        pinned: what waits for a strip, in the order `tiles`, is in pinned memory.
        owned: the strips that a rank computes; None: all.
    """
    segments = segments_of_decode(config, tiling, rows, columns)

    def spec(part: Part, width: int, *, first: bool = False) -> EngineSpec:
        return segments[f"{segment_name(part, first=first)}_{rows}x{width}"].spec

    strips = decode_strips(config, tiling, columns)
    if owned is not None:
        strips = strips[owned.start : owned.stop]
    widths = [strip.last - strip.first for strip in strips]
    shared = [columns] if tiling.tiling == "exact" else []  # official strips share nothing
    past = {width: _past(spec("fine", width)) + _past(spec("frame", width)) for width in widths}
    steps = {width: _largest_step(spec("fine", width), spec("frame", width)) for width in widths}
    for width in set(widths) - set(shared):
        if tiling.tiling == "official":
            past[width] += _past(spec("coarse", width))
            steps[width] += _bytes(spec("coarse", width).outputs[:1])
    whole = sum(_bytes(spec("coarse", width).outputs[:1]) for width in shared)
    whole_past = sum(_past(spec("coarse", width)) for width in shared)
    if tiling.order == "frames":
        kept, held = whole_past + sum(past[width] for width in widths), whole + max(steps.values())
        waiting = 0
    else:
        given = {width: whole * width // columns for width in widths}
        kept, held = max((past[width], given[width] + steps[width]) for width in widths)
        if 2 * whole_past + whole > kept + held:  # while the coarse part runs: new beside old
            kept, held = whole_past, whole_past + whole
        first = [_bytes(spec("coarse", width, first=True).outputs[:1]) for width in shared]
        sizes = [*first, *(whole for _ in shared for _ in range(frames - 1))]
        waiting = pinned_bytes(sizes) if pinned else sum(sizes)
    items = [
        _item("past frames", "caches", kept),
        _item("results of the engines", "activations", held),
    ]
    if waiting:
        results = _item(COARSE_RESULTS, "activations", waiting)
        items.append(replace(results, place="host"))
    return tuple(items)


def _largest_step(fine: EngineSpec, frame: EngineSpec) -> int:
    """Return the bytes of results while a strip is computed, at most.

    First the past frames of the fine part stand beside the new ones; then those of a frame do,
    beside the frames and what they are joined to.
    """
    between, (_, *new_past) = _bytes(fine.outputs[:1]), fine.outputs
    count = between // _bytes(frame.inputs[:1])  # frames that the fine part makes of one
    colours = count * _bytes(frame.outputs[:1])
    return between + max(_bytes(new_past), _past(frame) + 2 * colours)


def _past(spec: EngineSpec) -> int:
    return _bytes(tensor for tensor in spec.inputs if tensor.name.endswith(PAST))


def _bytes(tensors: Iterable[TensorSpec]) -> int:
    return sum(math.prod(one.sized({})) * DTYPES[one.dtype].itemsize for one in tensors)


def _item(name: str, kind: MemoryKind, size: int) -> MemoryItem:
    return MemoryItem(name=name, kind=kind, bytes=size, place="device")
