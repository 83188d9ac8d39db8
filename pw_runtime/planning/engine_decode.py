# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a decode on engines that keep scratch memory of their own.

What an engine computes with is in its scratch memory; beside that there are its inputs and outputs,
whose sizes its spec has. Tested against a count of the tensors of a decode (tests/planning).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache

from pw_engines import DTYPES, EngineSpec, TensorSpec
from pw_runtime.execution.decoder_segments import (
    PAST,
    Part,
    decode_strips,
    segment_name,
    segments_of_decode,
)
from pw_runtime.types import MemoryItem, MemoryKind, TilingConfig, VaeConfig


@cache
def engine_decode_memory(
    config: VaeConfig, tiling: TilingConfig, rows: int, columns: int, scratch: int
) -> tuple[MemoryItem, ...]:
    """List what is on the device at the peak of a decode on engines, beside the weights.

    Args:
        config: of the decoder.
        tiling: strips of columns.
        rows: of the latent.
        columns: of the latent.
        scratch: bytes that the engines keep for what they compute.
    """
    segments = segments_of_decode(config, tiling, rows, columns)

    def spec(part: Part, width: int) -> EngineSpec:
        return segments[f"{segment_name(part, first=False)}_{rows}x{width}"].spec

    widths = [strip.last - strip.first for strip in decode_strips(config, tiling, columns)]
    coarse = [columns] if tiling.tiling == "exact" else widths
    used: list[tuple[Part, list[int]]] = [
        ("coarse", coarse),
        ("fine", widths),
        ("frame", widths),
    ]
    past = sum(_past(spec(part, width)) for part, all_widths in used for width in all_widths)
    held, steps = 0, []
    for width in widths:
        fine, frame = spec("fine", width), spec("frame", width)
        between, (_, *new_past) = _bytes(fine.outputs[:1]), fine.outputs
        frames = between // _bytes(frame.inputs[:1])  # that the fine part makes of one
        colours = frames * _bytes(frame.outputs[:1])
        held += colours
        # Its past frames stand beside the new ones until it has run.
        steps.append(between + _bytes(new_past))
        steps.append(between + _past(frame) + 2 * colours)  # the frames, and joined
    held *= 1 + (len(widths) > 1)  # the strips, and joined
    held += max(_bytes(spec("coarse", width).outputs[:1]) for width in coarse)
    return (
        _item("past frames", "caches", past),
        _item("scratch memory of the engines", "activations", scratch),
        _item("results of the engines", "activations", held + max(steps)),
    )


def _past(spec: EngineSpec) -> int:
    return _bytes(tensor for tensor in spec.inputs if tensor.name.endswith(PAST))


def _bytes(tensors: Iterable[TensorSpec]) -> int:
    return sum(math.prod(one.sized({})) * DTYPES[one.dtype].itemsize for one in tensors)


def _item(name: str, kind: MemoryKind, size: int) -> MemoryItem:
    return MemoryItem(name=name, kind=kind, bytes=size, place="device")
