# SPDX-License-Identifier: Apache-2.0
"""The full-width VAE decoder with random weights decodes on this CPU: its memory, and as predicted.

python -m pw_bench.peers.decoder_memory --out bench/results/NAME.json
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from pydantic import TypeAdapter

from pw_bench.measure.commit import commit
from pw_bench.peers.subprocess_ab import process_bytes, reset_peak
from pw_export.wan22_configs import VAE
from pw_runtime.checkpoint.loader import channels_last
from pw_runtime.models import VaeDecoder
from pw_runtime.planning.decode_memory import decode_memory
from pw_runtime.stages.decode import decode_frames
from pw_runtime.system.atomic_files import write_text
from pw_runtime.system.machine import Machine, describe
from pw_runtime.types import Compat, Latent, MemoryItem, TilingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Content of the result file. Rows, columns and frames are those of the latent."""

    machine: Machine
    commit: str
    rows: int
    columns: int
    frames: int
    strips: int
    parameters: int
    cpu_seconds: float
    predicted_bytes: int
    peak_bytes: int  # resident, beyond what the process had before the network was made
    items: tuple[MemoryItem, ...]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Result file.")
@click.option("--rows", default=16, show_default=True, help="Of the latent, 16 pixels each.")
@click.option("--columns", default=160, show_default=True)
@click.option("--frames", default=3, show_default=True, help="Of the latent.")
@click.option("--strips", default=2, show_default=True)
def main(out: Path, rows: int, columns: int, frames: int, strips: int) -> None:
    """Decode a strip of a 2K picture with the published widths."""
    before = reset_peak()
    torch.manual_seed(0)
    net = VaeDecoder(VAE).requires_grad_(False)
    stored = {name: channels_last(x) for name, x in net.state_dict().items()}
    net.load_state_dict(stored, assign=True)
    del stored
    latent, start = torch.randn(VAE.z_dim, frames, rows, columns), time.process_time()
    reset_peak()  # two copies of the weights are no part of a decode
    for chunk in decode_frames(
        net, Latent(x=latent), TilingConfig(strips=strips), Compat(), "yuv420p"
    ):
        click.echo(f"frame {chunk.start}: {time.process_time() - start:.0f} CPU s")
        del chunk
    seconds, peak = time.process_time() - start, process_bytes("VmHWM") - before
    items = decode_memory(VAE, frames=frames, rows=rows, columns=columns, strips=strips)
    result = Result(
        machine=describe(),
        commit=commit(),
        rows=rows,
        columns=columns,
        frames=frames,
        strips=strips,
        parameters=sum(x.numel() for x in net.parameters()),
        cpu_seconds=round(seconds, 1),
        predicted_bytes=sum(item.bytes for item in items),
        peak_bytes=peak,
        items=items,
    )
    click.echo(
        f"peak {peak / 2**20:.0f} MiB, tensors predicted {result.predicted_bytes / 2**20:.0f} MiB"
    )
    write_text(out, TypeAdapter(Result).dump_json(result, indent=1).decode() + "\n")


if __name__ == "__main__":
    main()
