# SPDX-License-Identifier: Apache-2.0
"""Estimate how long a run takes: its arithmetic divided by the rates of a machine.

Loading, conversion of pixels and encoding are not included. Of several ranks the busiest one
counts, and what it exchanges with the others is not overlapped with its computation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch

from pw_kernels import attention, causal_conv3d
from pw_kernels.attention.sparse import kept_keys
from pw_runtime.checkpoint.loader import is_streamed
from pw_runtime.execution.division import block_traffic, rank_share, slice_sizes, step_traffic
from pw_runtime.models import VaeDecoder, expected_shapes
from pw_runtime.models.causal_cache import CausalCache
from pw_runtime.sampling.noise import latent_shape
from pw_runtime.types import (
    PATCH,
    DitConfig,
    Precision,
    StageConfig,
    TransformerPlan,
    VaeConfig,
    VideoConfig,
)

CELLS = 8  # rows and columns of the latent on which the decoder's arithmetic is counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """FLOP per second of the three kinds of work that matter, and bytes per second of copies."""

    matmul: float
    attention: float
    conv: float
    copy: float  # between host memory and the device
    source: str
    link: float | None = None  # to the other devices, in each direction; None: not known


# Orders of magnitude of processes on one CPU, by which divisions are put in order; never shown.
A_CPU = Rates(matmul=5e10, attention=5e10, conv=5e10, copy=math.inf, source="guessed", link=1e9)

# Published by others, none measured by this project. H200: matrix products of 8192^3 in bf16, cuDNN
# attention of 111600 tokens with heads of 128, convolutions in TF32, PCIe 5, NVLink's 900 GB/s in
# both directions. RTX 4090: NVIDIA's peaks of dense bf16 (fp32 sums) and TF32; PCIe 4.0 x16 at the
# 24 GB/s that NCCL's search of paths rates it. Without peer-to-peer copies, which the drivers of
# GeForce cards lack, all pass through host memory, and several cards may reach less together.
KNOWN: Mapping[str, Rates] = MappingProxyType(
    {
        "H200": Rates(
            matmul=790e12,
            attention=565e12,
            conv=275e12,
            copy=50e9,
            link=450e9,
            source="modelled from published rates of an H200",
        ),
        "RTX 4090": Rates(
            matmul=165.2e12,
            attention=165.2e12,
            conv=82.6e12,
            copy=24e9,
            link=24e9,
            source="modelled from the peak rates of an RTX 4090, which programs do not reach",
        ),
    }
)


def division_rates(device: torch.device) -> Rates:
    """Return the rates by which divisions among devices like this one are put in order.

    Those of the card, or of an H200 where they are not known or there is no GPU here; a guess for
    processes on a CPU. A run and `pw plan` take the same.
    """
    if device.type == "cpu":
        return A_CPU
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""
    found = (rates for card, rates in KNOWN.items() if name.endswith(card))
    return next(found, KNOWN["H200"])


def denoise_seconds(
    config: DitConfig,
    stage: StageConfig,
    video: VideoConfig,
    plan: TransformerPlan,
    rates: Rates,
    streamed: int = 0,
    itemsize: int = 2,
    keep: float | None = None,
) -> float:
    """Estimate one clip's denoising stage.

    Args:
        config: of its transformer.
        stage: size of the picture, sampler.
        video: length of the clip.
        plan: how it runs.
        rates: of the device.
        streamed: bytes of weights that every pass copies, or gathers from the other ranks.
        itemsize: bytes of a number in queries, keys and values.
        keep: fraction of the blocks of keys that self-attention keeps; None: it is exact. The time
            to choose them is not counted.

    Raises:
        ValueError: several ranks, and no rate of the link between them.
    """
    tokens = math.prod(latent_shape(stage, video)[1:]) // PATCH**2
    sizes, split = slice_sizes(tokens, plan.chunk), plan.split
    shares = [
        rank_share(config, split, sizes, passes=len(stage.passes), rank=rank)
        for rank in range(split.ranks)
    ]
    passes = max(share.passes for share in shares)
    own = max(share.own for share in shares)
    shared = plan.share_attention and passes > 1
    self_attentions = config.num_layers * passes - shared  # per step
    scores = max(share.queries * share.heads for share in shares) * config.head_dim
    products = 2 * passes * own * _linear_weights(config)
    keys = tokens if keep is None else kept_keys(tokens, keep)
    attended = 4 * keys * scores * self_attentions
    attended += 4 * own * config.dim * passes * config.text_len * config.num_layers
    computed = products / rates.matmul + attended / rates.attention
    if split.ranks == 1:  # weights are streamed while the passes compute
        return stage.steps * max(computed, passes * streamed / rates.copy)
    if rates.link is None:
        raise ValueError("the time of several ranks depends on the rate of their link")
    copied = passes * streamed / rates.copy
    if plan.weights == "gathered":
        copied = passes * streamed * (split.ranks - 1) / split.ranks / rates.link
    exchanged = self_attentions * max(
        max(rank.sent, rank.received)
        for rank in block_traffic(config, split.sequence, sizes, itemsize)
    )
    traffic = step_traffic(config, split, sizes, passes=len(stage.passes), itemsize=itemsize)
    moved = (exchanged + traffic.latents) / rates.link
    return stage.steps * (max(computed, copied) + moved)


@cache
def _linear_weights(config: DitConfig) -> int:
    """Count the weights that every token is multiplied by, of all blocks."""
    return sum(
        math.prod(shape)
        for name, shape in expected_shapes("draft", config).items()
        if is_streamed(name)
        and len(shape) == 2
        and ".cross_attn.k." not in name
        and ".cross_attn.v." not in name
    )


def decode_seconds(
    config: VaeConfig,
    stage: StageConfig,
    video: VideoConfig,
    rates: Rates,
    copied: int = 0,
    *,
    share: float = 1,
    waited: float = 0,
    sent: int = 0,
) -> float:
    """Estimate one clip's decode.

    Args:
        config: of the decoder.
        stage: size of the picture.
        video: length of the clip.
        rates: of the device.
        copied: bytes that cross between host and device.
        share: of the work after the attention that the busiest rank has. All have the rest.
        waited: latent frames that the last rank waits for the first rows from above.
        sent: bytes that the busiest rank sends to another, or receives.

    Raises:
        ValueError: bytes to send, and no rate of the link.
    """
    _, frames, rows, columns = latent_shape(stage, video)
    cells = rows * columns
    attended = 4 * cells * cells * config.decoder_dims[0] * (frames + waited)
    first, later = (whole + share * part for whole, part in _frame_flops(config))
    convolved = (first + later * (frames - 1 + waited)) * cells / CELLS**2
    seconds = convolved / rates.conv + attended / rates.matmul + copied / rates.copy
    if not sent:
        return seconds
    if rates.link is None:
        raise ValueError("the time of several ranks depends on the rate of their link")
    return seconds + sent / rates.link


@cache
def _frame_flops(config: VaeConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """Count the FLOP of the first latent frame and of a later one, on CELLS x CELLS.

    Of each the part that sees the whole frame, up to the attention, and the rest.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    counts = []
    with torch.device("meta"), torch.inference_mode():
        net, shared, rest = VaeDecoder(config), CausalCache(), CausalCache()
        for _ in range(3):  # only the third sees a full past
            with FlopCounterMode(display=False) as whole:
                x = net.global_part(torch.empty(config.z_dim, 1, CELLS, CELLS), shared)
            with FlopCounterMode(display=False) as part:
                net.local_part(x, rest)
            counts.append((whole.get_total_flops(), part.get_total_flops()))
    return counts[0], counts[2]


def measure_rates(device: torch.device, precision: Precision) -> Rates:
    """Measure the rates of this machine, with a third of a second of work of each kind."""
    gpu = device.type == "cuda"
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    size, tokens, side = (8192, 16384, 128) if gpu else (1024, 2048, 32)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, y = normal(size, size), normal(size, size)
    q, k, v = (normal(tokens, 4, 128) for _ in range(3))
    frames = normal(1, 128, 6, side, side, dtype=torch.float32)
    frames = frames.contiguous(memory_format=torch.channels_last_3d)
    weight = normal(128, 128, 3, 3, 3, dtype=torch.float32)
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    return Rates(
        matmul=2 * size**3 / _seconds(lambda: x @ y, device),
        attention=4 * tokens**2 * 512 / _seconds(lambda: attention(q, k, v), device),
        conv=2
        * 4
        * side
        * side
        * weight.numel()
        / _seconds(lambda: causal_conv3d(frames, weight, None), device),
        copy=_copied(device),
        source="from a second of work on this machine",
    )


def _copied(device: torch.device) -> float:
    """Measure bytes per second from pinned host memory to the device; infinite on a CPU."""
    if device.type == "cpu":
        return math.inf
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device=device)
    return len(host) / _seconds(lambda: target.copy_(host, non_blocking=True), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of some runs after a warm-up, about a third of a second in all."""
    work()
    best, end = math.inf, time.perf_counter() + 0.3
    while time.perf_counter() < end:
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
