# SPDX-License-Identifier: Apache-2.0
"""Memory of the full-width VAE decoder with random weights on this CPU, beside its prediction.

pw bench decoder-memory --out bench/results/NAME.json
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from pw_bench.measure.environment import envelope, identify, usual_operations
from pw_bench.peers.subprocess_ab import reset_peak
from pw_bench.results import Figure, Result
from pw_export.wan22_configs import VAE
from pw_runtime.checkpoint.loader import channels_last
from pw_runtime.models import VaeDecoder
from pw_runtime.planning.decode_memory import decode_memory
from pw_runtime.stages.decode import decode_frames
from pw_runtime.system.machine import peak_rss_bytes
from pw_runtime.types import Compat, Latent, TilingConfig


def measure_decoder_memory(
    rows: int, columns: int, frames: int, strips: int, say: Callable[[str], None]
) -> Result:
    """Decode a strip of a 2K frame with the published widths, in this process.

    Args:
        rows: of the latent, 16 pixels each.
        columns: of the latent.
        frames: of the latent.
        strips: bands that the decode is cut into.
        say: receives progress.
    """
    cpu = torch.device("cpu")
    identity = identify(cpu, operations=usual_operations(cpu))
    before = reset_peak()
    torch.manual_seed(0)
    net = VaeDecoder(VAE).requires_grad_(False)
    stored = {name: channels_last(x) for name, x in net.state_dict().items()}
    net.load_state_dict(stored, assign=True)
    del stored
    latent, start = torch.randn(VAE.z_dim, frames, rows, columns), time.process_time()
    reset_peak()  # two copies of the weights are not part of a decode
    tiling = TilingConfig(strips=strips)
    for chunk in decode_frames(net, Latent(x=latent), tiling, Compat(), "yuv420p"):
        say(f"frame {chunk.start}: {time.process_time() - start:.0f} CPU s")
        del chunk
    seconds, peak = time.process_time() - start, peak_rss_bytes() - before
    items = decode_memory(VAE, frames=frames, rows=rows, columns=columns, strips=strips)
    scope = {
        "words": "decode of a random latent by the full-width decoder, in one process",
        "latent": f"{frames} frames of {rows} rows and {columns} columns",
        "strips": str(strips),
        "parameters": str(sum(x.numel() for x in net.parameters())),
        "precision": "fp32",
        "device": "cpu",
    }
    predicted = [
        Figure(
            name=f"predicted, {item.place}/{item.name}",
            unit="B",
            samples=(item.bytes,),
            counted=True,
        )
        for item in items
    ]
    total = sum(item.bytes for item in items)
    return replace(
        envelope("decoder-memory", scope, identity),
        figures=(
            Figure(name="decoder/process memory", unit="B", samples=(peak,)),
            Figure(name="decoder/predicted", unit="B", samples=(total,), counted=True),
            Figure(name="decoder/CPU time", unit="s", samples=(seconds,)),
            *predicted,
        ),
        sides={"decoder": "resident memory beyond that of the process without the network"},
    )
