# SPDX-License-Identifier: Apache-2.0
"""Estimate how long a run takes: its arithmetic divided by the rates of a machine.

Loading, conversion of pixels and encoding are not included.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch.utils.flop_counter import FlopCounterMode

from pw_kernels import attention, causal_conv3d
from pw_runtime.checkpoint.loader import is_streamed
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


# Published by others, none measured by this project: matrix products of 8192^3 in bf16, cuDNN
# attention of 111600 tokens with heads of 128, convolutions in TF32, PCIe 5.
KNOWN: Mapping[str, Rates] = MappingProxyType(
    {
        "H200": Rates(
            matmul=790e12,
            attention=565e12,
            conv=275e12,
            copy=50e9,
            source="modelled from published rates of an H200",
        )
    }
)


def denoise_seconds(
    config: DitConfig,
    stage: StageConfig,
    video: VideoConfig,
    plan: TransformerPlan,
    rates: Rates,
    streamed: int = 0,
) -> float:
    """Estimate one clip's denoising stage; every pass copies `streamed` bytes of weights."""
    tokens = math.prod(latent_shape(stage, video)[1:]) // PATCH**2
    shapes = expected_shapes("draft", config)
    weights = sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if is_streamed(name)
        and len(shape) == 2
        and ".cross_attn.k." not in name
        and ".cross_attn.v." not in name
    )
    per_key = 4 * tokens * config.dim  # FLOP of one key, for all tokens of one block
    passes = len(stage.passes)
    shared = plan.share_attention and passes > 1
    self_attentions = config.num_layers * passes - shared  # per step
    products = 2 * passes * tokens * weights
    attended = per_key * (tokens * self_attentions + passes * config.text_len * config.num_layers)
    computed = products / rates.matmul + attended / rates.attention
    # Weights are streamed while the passes compute.
    return stage.steps * max(computed, passes * streamed / rates.copy)


def decode_seconds(
    config: VaeConfig, stage: StageConfig, video: VideoConfig, rates: Rates, copied: int = 0
) -> float:
    """Estimate one clip's decode; `copied` bytes cross between host and device."""
    _, frames, rows, columns = latent_shape(stage, video)
    first, later = _frame_flops(config)
    cells = rows * columns
    attended = 4 * cells * cells * config.decoder_dims[0] * frames
    convolved = (first + later * (frames - 1)) * cells / CELLS**2
    return convolved / rates.conv + attended / rates.matmul + copied / rates.copy


def _frame_flops(config: VaeConfig) -> tuple[int, int]:
    """Count the FLOP of the first latent frame and of a later one, on CELLS x CELLS."""
    counts = []
    with torch.device("meta"), torch.inference_mode():
        net, coarse, fine = VaeDecoder(config), CausalCache(), CausalCache()
        for _ in range(3):  # only the third sees a full past
            with FlopCounterMode(display=False) as counter:
                net.fine(net.coarse(torch.empty(config.z_dim, 1, CELLS, CELLS), coarse), fine)
            counts.append(counter.get_total_flops())
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
