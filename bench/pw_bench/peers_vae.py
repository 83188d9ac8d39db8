# SPDX-License-Identifier: Apache-2.0
"""Our VAE decode beside diffusers' AutoencoderKLWan: time, memory and difference, on this CPU.

    python -m pw_bench.peers_vae --out bench/results/NAME.json

The same random weights and latent in fp32, a process of its own for every sample, the sides in
turns. Their time ends with the values, ours with the bytes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from pydantic import TypeAdapter
from torch import Tensor

from pw_bench.commit import commit
from pw_bench.ledger import Ledger
from pw_export.nano import NANO_VAE
from pw_runtime import keymaps
from pw_runtime.atomic import write_text
from pw_runtime.machine import Machine, describe
from pw_runtime.models import VaeDecoder
from pw_runtime.networks import channels_last
from pw_runtime.stages.decode import decode
from pw_runtime.types import VAE_STRIDE, Compat, DecodePlan, Latent

THEIRS, TILED, OURS = "diffusers", "diffusers tiled", "ours"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One decode in a process of its own; `peak_bytes` beyond what lay there before it."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """All samples of one program, and the most bytes of tensors that it made and held."""

    name: str
    samples: list[Sample]
    ledger_bytes: int
    largest_difference: int  # to diffusers untiled, in levels of 255
    share_that_differs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Content of the result file."""

    machine: Machine
    commit: str
    threads: int
    width: int
    height: int
    frames: int
    strips: int
    sides: list[Side]


def their_vae() -> Any:
    """AutoencoderKLWan in the widths of the built-in model, with random weights."""
    import diffusers

    torch.manual_seed(0)
    kind: Any = diffusers.AutoencoderKLWan
    vae = kind(
        base_dim=NANO_VAE.encoder_dims[0],
        decoder_base_dim=NANO_VAE.decoder_dims[-1],
        z_dim=NANO_VAE.z_dim,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
    ).requires_grad_(False)
    return vae.eval()


def our_decoder(theirs: Any) -> VaeDecoder:
    """The decoder with their weights; the latent's scale is the caller's on their side."""
    config = replace(NANO_VAE, latent_mean=(0.0,) * 48, latent_std=(1.0,) * 48)
    weights = {
        keymaps.vae_from_diffusers(name, encoder_blocks=2, decoder_blocks=3): x
        for name, x in theirs.state_dict().items()
    }
    net = VaeDecoder(config).requires_grad_(False)
    stored = {name: channels_last(weights[name]) for name in net.state_dict()}
    net.load_state_dict(stored, assign=True)
    return net


def run_side(side: str, shape: tuple[int, ...], strips: int, *, account: bool, file: Path) -> None:
    """In a child: decode once, write the frames to a file, print seconds, CPU seconds, bytes."""
    latent = torch.randn(48, *shape, generator=torch.Generator().manual_seed(1))
    theirs = their_vae()
    if side == TILED:
        theirs.enable_tiling()
    ours = our_decoder(theirs) if side == OURS else None

    def run() -> Tensor:
        if ours is not None:
            plan = DecodePlan(strips=strips)
            return torch.cat([c.frames for c in decode(Latent(x=latent), plan, Compat(), ours)])
        with torch.inference_mode():
            video: Tensor = theirs.decode(latent[None], return_dict=False)[0][0]
            return video

    if account:
        with Ledger() as ledger:
            frames = run()
        peak, seconds, cpu_seconds = ledger.peak["cpu"], 0.0, 0.0
    else:
        before = reset_peak()
        start, cpu = time.perf_counter(), time.process_time()
        frames = run()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        peak = process_bytes("VmHWM") - before
    if ours is None:
        frames = ((frames.clamp(-1, 1) + 1) / 2 * 255).round().to(torch.uint8).permute(1, 2, 3, 0)
    torch.save(frames, file)
    print(seconds, cpu_seconds, peak)


def process_bytes(key: str) -> int:
    """A size of this process as Linux states it: VmRSS, or VmHWM, the most it has been."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def reset_peak() -> int:
    """Begin the process's peak anew; resident bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return process_bytes("VmRSS")


def sample(side: str, args: list[str], file: Path, *, account: bool = False) -> Sample:
    """Run a side in a process of its own."""
    command = [sys.executable, "-m", "pw_bench.peers_vae", "--side", side, "--out", str(file)]
    command += [*args, *(["--account"] if account else [])]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, cpu_seconds, peak = out.split()[-3:]
    return Sample(seconds=float(seconds), cpu_seconds=float(cpu_seconds), peak_bytes=int(peak))


def compare(names: list[str], args: list[str], rounds: int) -> list[Side]:
    """All sides in turns, then their accounts."""
    taken: dict[str, list[Sample]] = {name: [] for name in names}
    sides = []
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{index}.pt" for index, name in enumerate(names)}
        for _ in range(rounds):
            for name in names:
                taken[name].append(sample(name, args, files[name]))
        wanted = torch.load(files[THEIRS]).int()
        for name in names:
            difference = (torch.load(files[name]).int() - wanted).abs()
            side = Side(
                name=name,
                samples=taken[name],
                ledger_bytes=sample(name, args, files[name], account=True).peak_bytes,
                largest_difference=int(difference.max()),
                share_that_differs=difference.ne(0).float().mean().item(),
            )
            sides.append(side)
            best = min(one.cpu_seconds for one in side.samples)
            peak = max(one.peak_bytes for one in side.samples)
            click.echo(
                f"{name:16} {best:6.1f} CPU s at best, process +{peak / 2**20:5.0f} MiB, tensors "
                f"{side.ledger_bytes / 2**20:5.0f} MiB, differs in {side.share_that_differs:.2e} "
                f"of the bytes by {side.largest_difference} at most"
            )
    return sides


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Result file.")
@click.option("--width", default=896, show_default=True)
@click.option("--height", default=512, show_default=True)
@click.option("--frames", default=17, show_default=True)
@click.option("--strips", default=8, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--side", type=click.Choice([THEIRS, TILED, OURS]), hidden=True)
@click.option("--account", is_flag=True, hidden=True)
def main(
    out: Path,
    width: int,
    height: int,
    frames: int,
    strips: int,
    rounds: int,
    side: str | None,
    account: bool,
) -> None:
    """Compare the decoders."""
    shape = ((frames - 1) // VAE_STRIDE[0] + 1, height // VAE_STRIDE[1], width // VAE_STRIDE[2])
    if side is not None:
        run_side(side, shape, strips, account=account, file=out)
        return
    sizes = {"width": width, "height": height, "frames": frames, "strips": strips}
    args = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    result = Result(
        machine=describe(),
        commit=commit(),
        threads=torch.get_num_threads(),
        sides=compare([THEIRS, TILED, OURS], args, rounds),
        **sizes,
    )
    write_text(out, TypeAdapter(Result).dump_json(result, indent=1).decode() + "\n")


if __name__ == "__main__":
    main()
