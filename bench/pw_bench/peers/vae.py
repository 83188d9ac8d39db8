# SPDX-License-Identifier: Apache-2.0
"""Our VAE decode beside diffusers' AutoencoderKLWan: time, memory and difference, on this CPU.

    python -m pw_bench.peers.vae --out bench/results/NAME.json

The same random weights and latent in fp32, a process of its own for every sample, the sides in
turns. Their time ends with the values, ours with the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from pydantic import TypeAdapter
from torch import Tensor

from pw_bench.measure.commit import commit
from pw_bench.peers.subprocess_ab import Sample, in_turns, report
from pw_export import keymaps
from pw_export.nano import NANO_VAE
from pw_runtime.checkpoint.loader import channels_last
from pw_runtime.models import VaeDecoder
from pw_runtime.stages.decode import decode_frames
from pw_runtime.system.atomic_files import write_text
from pw_runtime.system.machine import Machine, describe
from pw_runtime.types import VAE_STRIDE, Compat, Latent, TilingConfig

THEIRS, TILED, OURS = "diffusers", "diffusers tiled", "ours"


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
    """In a child: decode once, write the values or, of ours, the bytes to a file."""
    latent = torch.randn(48, *shape, generator=torch.Generator().manual_seed(1))
    theirs = their_vae()
    if side == TILED:
        theirs.enable_tiling()
    ours = our_decoder(theirs) if side == OURS else None

    def run() -> Tensor:
        if ours is not None:
            plan = TilingConfig(strips=strips)
            return torch.cat(
                [c.frames for c in decode_frames(ours, Latent(x=latent), plan, Compat())]
            )
        with torch.inference_mode():
            video: Tensor = theirs.decode(latent[None], return_dict=False)[0][0]
            return video

    weights = (theirs if ours is None else ours).state_dict().values()
    report(run, [latent, *weights], account=account, file=file)


def as_bytes(output: Tensor) -> Tensor:
    """Frames [T, H, W, 3] in levels of 255, of what any side gives."""
    if output.dtype == torch.uint8:
        return output
    return ((output.clamp(-1, 1) + 1) / 2 * 255).round().to(torch.uint8).permute(1, 2, 3, 0)


def compare(names: list[str], args: list[str], rounds: int) -> list[Side]:
    """All sides in turns, then their accounts."""
    taken = in_turns("pw_bench.peers.vae", names, args, rounds)
    wanted = as_bytes(taken[THEIRS].output).int()
    sides = []
    for name, one in taken.items():
        difference = (as_bytes(one.output).int() - wanted).abs()
        side = Side(
            name=name,
            samples=one.samples,
            ledger_bytes=one.ledger_bytes,
            largest_difference=int(difference.max()),
            share_that_differs=difference.ne(0).float().mean().item(),
        )
        sides.append(side)
        click.echo(
            f"{name:16} {one}, differs in {side.share_that_differs:.2e} of the bytes by "
            f"{side.largest_difference} at most"
        )
    for name in (THEIRS, TILED):
        click.echo(f"ours against {name}: {taken[OURS].against(taken[name])}")
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
