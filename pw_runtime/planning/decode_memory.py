# SPDX-License-Identifier: Apache-2.0
"""Peak memory of the exact decode, in closed form: for sizes that nobody has run yet.

The decoder's layers are visited in order with the sizes of what they allocate and free. Tensors
are counted, not what an allocator or a library's workspace adds; for norms and attention, what the
kernels take. Tests compare it with `pw_bench.measure.tensor_ledger`, within 2 % at full size.
"""

from __future__ import annotations

from itertools import chain

from pw_runtime.execution.division import frames_begun, run_of
from pw_runtime.models.tiling import band_rects, make_bands
from pw_runtime.planning.decode_layers import GLOBAL_PAST, PAST, SEAMS, SHARED, PeakCounter
from pw_runtime.system.pinned_memory import pinned_bytes
from pw_runtime.types import VAE_STRIDE, DecodeOrder, MemoryItem, MemoryKind, Place, VaeConfig

PACKED = "packed frames"
_KINDS: dict[str, MemoryKind] = {"weights": "weights", PAST: "caches", GLOBAL_PAST: "caches"}


def decode_memory(
    config: VaeConfig,
    *,
    frames: int,
    rows: int,
    columns: int,
    strips: int = 1,
    itemsize: int = 4,
    order: DecodeOrder = "frames",
    on_gpu: bool = False,
    ranks: int = 1,
    rank: int = 0,
    rgb: bool = False,
) -> tuple[MemoryItem, ...]:
    """List what is in memory at the device's peak during the exact decode of a clip.

    Args:
        config: of the decoder.
        frames: of the latent; from the third on nothing grows any more, and no fewer are assumed.
        rows: of the latent.
        columns: of the latent.
        strips: bands of rows, as in `TilingConfig`.
        itemsize: bytes of a weight and of an activation, 4 or 2.
        order: frame by frame, or one band of all frames after the other.
        on_gpu: in the order `tiles`, what waits for a band is in pinned host memory.
        ranks: that divide the bands, at most as many; more than one decode frame by frame.
        rank: the one whose memory it is.
        rgb: frames are packed as RGB; else as planes, with half as many bytes.

    Returns:
        The items; those at "device" add up to its peak. The frames of one chunk are at "host".
    """
    counter = PeakCounter(config, itemsize)
    counter.allocate("latent", config.z_dim * frames * rows * columns * 4)
    cut = make_bands(rows, strips, config)
    bands, owned = [band.stop - band.start for band in cut], run_of(len(cut), ranks, rank)
    counter.count_weights()
    host: dict[str, int] = {}
    if order == "tiles":
        waiting = waiting_sizes(config, frames, rows, columns, bands, itemsize)
        if on_gpu:
            host["what bands share and hand on"] = pinned_bytes(chain(*waiting.values()))
            waiting = {}
        counter.tile_by_tile(rows, columns, bands, waiting)
    else:
        neighbours = (owned.start > 0) + (owned.stop < len(bands))
        seam = border_bytes(config, columns, bands, itemsize) if neighbours else 0
        counter.frame_by_frame(rows, columns, bands, owned, neighbours * seam)
    heights = [rect.height for rect in band_rects(cut, columns, config)]
    own = sum(heights[owned.start : owned.stop])
    # The first rank puts frames together from those of all ranks, the others send the last ones.
    begun = frames_begun(ranks) if ranks > 1 else 0
    lines = 2 * own if rank else (1 + begun) * sum(heights)
    host[PACKED] = VAE_STRIDE[0] * lines * columns * VAE_STRIDE[2] * (6 if rgb else 3) // 2
    return (
        *(_item(name, size, "device") for name, size in counter.peak.items()),
        *(_item(name, size, "host") for name, size in host.items() if size),
    )


def waiting_sizes(
    config: VaeConfig, frames: int, rows: int, columns: int, bands: list[int], itemsize: int
) -> dict[str, list[int]]:
    """List the bytes of each tensor that waits for a band in the order `tiles`, by kind.

    Args:
        config: of the decoder.
        frames: of the latent.
        rows: of the latent.
        columns: of the latent.
        bands: rows of each.
        itemsize: bytes of an activation.
    """
    shared = [config.decoder_dims[0] * rows * columns * itemsize] * frames
    if len(bands) == 1:
        return {SHARED: shared, SEAMS: []}
    seams: list[int] = []
    for first in (True, False):
        counter = PeakCounter(config, itemsize)
        counter.local_part(bands, 0, columns, first=first)
        seams += counter.handed_on * (1 if first else frames - 1)
    return {SHARED: shared, SEAMS: seams}


def border_bytes(config: VaeConfig, columns: int, bands: list[int], itemsize: int) -> int:
    """Return the bytes of the rows that one latent frame, not the first, hands to the next band."""
    counter = PeakCounter(config, itemsize)
    counter.local_part(bands, 0, columns)
    return sum(counter.handed_on)


def busiest_share(config: VaeConfig, rows: int, columns: int, strips: int, ranks: int) -> float:
    """Return the share of the bands' work that the busiest of the ranks has."""
    bands = [band.stop - band.start for band in make_bands(rows, strips, config)]
    work = []
    for index in range(len(bands)):
        counter = PeakCounter(config, 4)
        counter.local_part(bands, index, columns)
        work.append(counter.flop)
    runs = (run_of(len(bands), ranks, rank) for rank in range(ranks))
    return max(sum(work[run.start : run.stop]) for run in runs) / sum(work)


def waiting_traffic(waiting: dict[str, list[int]], bands: int) -> int:
    """Return the bytes that cross between host and device in the order `tiles`."""
    return 2 * sum(waiting[SHARED]) + 2 * (bands - 1) * sum(waiting[SEAMS])


def _item(name: str, size: int, place: Place) -> MemoryItem:
    return MemoryItem(name=name, kind=_KINDS.get(name, "activations"), bytes=size, place=place)
