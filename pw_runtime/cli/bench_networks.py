# SPDX-License-Identifier: Apache-2.0
"""Verbs of `pw bench` for single networks: peers, memory, quality."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pw_runtime.cli.exit_codes import DONE
from pw_runtime.cli.options import FILE, MODEL
from pw_runtime.system.packages import require_packages

if TYPE_CHECKING:
    from pw_bench.results import Result

out_option = click.option("--out", type=FILE, required=True, help="Results file.")
rounds_option = click.option(
    "--rounds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Processes of each contender.",
)


def save(result: Result, out: Path) -> int:
    """Write a result, print its tables and the name of the file."""
    from pw_bench.report.console import show
    from pw_bench.results import write_result

    write_result(result, out)
    show(result)
    click.echo(out)
    return DONE


@click.command("dit-peers")
@out_option
@click.option("--dim", default=1152, show_default=True, help="Width, a multiple of 384.")
@click.option("--layers", type=click.IntRange(1), default=4, show_default=True)
@click.option("--width", default=1536, show_default=True, help="In pixels, a multiple of 32.")
@click.option("--height", default=896, show_default=True, help="In pixels, a multiple of 32.")
@click.option("--frames", default=9, show_default=True, help="4n + 1.")
@click.option("--steps", type=click.IntRange(1), default=4, show_default=True)
@click.option("--text", default=60, show_default=True, help="Rows of a text without padding.")
@click.option(
    "--part",
    "chunk",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Maximum tokens that ours works on at a time.",
)
@rounds_option
def dit_peers(
    out: Path,
    dim: int,
    layers: int,
    width: int,
    height: int,
    frames: int,
    steps: int,
    text: int,
    chunk: int,
    rounds: int,
) -> int:
    """Compare our transformer with diffusers' on this CPU: time, memory, difference."""
    require_packages("`pw bench dit-peers`", "diffusers")
    from pw_bench.peers.dit import DitWork, measure_dit_peers
    from pw_bench.results import require_folder

    require_folder(out)
    work = DitWork(
        dim=dim,
        layers=layers,
        width=width,
        height=height,
        frames=frames,
        steps=steps,
        text=text,
        chunk=chunk,
    )
    return save(measure_dit_peers(work, rounds), out)


@click.command("vae-peers")
@out_option
@click.option("--width", default=896, show_default=True, help="In pixels.")
@click.option("--height", default=512, show_default=True, help="In pixels.")
@click.option("--frames", default=17, show_default=True, help="4n + 1.")
@click.option("--strips", type=click.IntRange(1), default=8, show_default=True, help="Of ours.")
@rounds_option
def vae_peers(out: Path, width: int, height: int, frames: int, strips: int, rounds: int) -> int:
    """Compare our VAE decode with diffusers' on this CPU: time, memory, difference."""
    require_packages("`pw bench vae-peers`", "diffusers")
    from pw_bench.peers.vae import VaeWork, measure_vae_peers
    from pw_bench.results import require_folder

    require_folder(out)
    work = VaeWork(width=width, height=height, frames=frames, strips=strips)
    return save(measure_vae_peers(work, rounds), out)


@click.command("cpu-conv")
@out_option
@rounds_option
def cpu_conv(out: Path, rounds: int) -> int:
    """Compare our C++ for CPUs with oneDNN on this CPU: convolutions, decodes, errors, memory."""
    from pw_bench.peers.cpu_conv import measure_cpu_conv
    from pw_bench.results import require_folder

    require_folder(out)
    return save(measure_cpu_conv(rounds, say=click.echo), out)


@click.command("generate-memory")
@click.option("--model", type=MODEL, required=True, help="Bundle made by `pw convert`.")
@out_option
@click.option("--width", default=1280, show_default=True, help="In pixels.")
@click.option("--height", default=704, show_default=True, help="In pixels.")
@click.option(
    "--frames",
    multiple=True,
    type=click.IntRange(1),
    default=(17, 61, 121),
    show_default=True,
    help="Of a clip; may be repeated.",
)
def generate_memory(
    model: Path, out: Path, width: int, height: int, frames: tuple[int, ...]
) -> int:
    """Measure the host memory of whole clips of several lengths, over time."""
    from pw_bench.peers.generate_memory import measure_generate_memory
    from pw_bench.results import require_folder

    require_folder(out)
    return save(measure_generate_memory(model, width, height, frames, click.echo), out)


@click.command("decoder-memory")
@out_option
@click.option("--rows", default=16, show_default=True, help="Of the latent, 16 pixels each.")
@click.option("--columns", default=160, show_default=True, help="Of the latent.")
@click.option("--frames", default=3, show_default=True, help="Of the latent.")
@click.option("--strips", type=click.IntRange(1), default=2, show_default=True)
def decoder_memory(out: Path, rows: int, columns: int, frames: int, strips: int) -> int:
    """Measure the memory of the full-width decoder on this CPU, beside its prediction."""
    from pw_bench.peers.decoder_memory import measure_decoder_memory
    from pw_bench.results import require_folder

    require_folder(out)
    return save(measure_decoder_memory(rows, columns, frames, strips, click.echo), out)


@click.command("linear-error")
@click.option("--model", type=MODEL, required=True, help="Bundle of the built-in model.")
@click.option("--preset", default="nano", show_default=True, help="As for `pw generate`.")
@out_option
@click.option("--clips", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--tokens",
    type=click.IntRange(2),
    default=256,
    show_default=True,
    help="Of the block of published width.",
)
def linear_error(model: Path, preset: str, out: Path, clips: int, tokens: int) -> int:
    """Measure the errors of quantized linear layers: of layers, a block, latents and clips."""
    require_packages("`pw bench linear-error`", "scikit-image", "tokenizers")
    from pw_bench.quality.linear_error import measure_linear_error
    from pw_bench.results import require_folder

    require_folder(out)
    result = measure_linear_error(model, preset, clips=clips, tokens=tokens, say=click.echo)
    return save(result, out)


@click.command("sparse-error")
@click.option("--model", type=MODEL, required=True, help="Bundle of the built-in model.")
@click.option("--preset", default="nano-hd", show_default=True, help="As for `pw generate`.")
@out_option
def sparse_error(model: Path, preset: str, out: Path) -> int:
    """Measure the errors of block-sparse attention and its CPU time."""
    require_packages("`pw bench sparse-error`", "scikit-image")
    from pw_bench.quality.sparse_error import measure_sparse_error
    from pw_bench.results import require_folder

    require_folder(out)
    return save(measure_sparse_error(model, preset, click.echo), out)


@click.command()
@click.option("--model", type=MODEL, required=True, help="Bundle.")
@click.option("--preset", default="nano", show_default=True, help="As for `pw generate`.")
@out_option
@click.option(
    "--vary",
    "variants",
    multiple=True,
    required=True,
    help="Options of a variant, step_cache=0.05,linear=int8 for instance; may be repeated.",
)
@click.option("--clips", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--captions",
    type=click.IntRange(0),
    default=24,
    show_default=True,
    help="Held-out captions; 0 for a model that has learned none.",
)
def approximations(
    model: Path, preset: str, out: Path, variants: tuple[str, ...], clips: int, captions: int
) -> int:
    """Measure approximations beside the exact path: latents, frames, adherence, CPU time."""
    require_packages("`pw bench approximations`", "scikit-image")
    from pw_bench.quality.approximations import measure_approximations
    from pw_bench.results import require_folder

    require_folder(out)
    numbers = {"clips": clips, "captions": captions}
    return save(measure_approximations(model, preset, variants, **numbers, say=click.echo), out)


@click.command()
@click.option("--model", type=MODEL, required=True, help="Bundle of the built-in model.")
@click.option("--preset", default="nano", show_default=True, help="As for `pw generate`.")
@out_option
@click.option(
    "--captions",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Held-out captions; half as many of each hard kind.",
)
@click.option(
    "--clips",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="True renderings, for what has a ground truth.",
)
@click.option("--plot", type=FILE, help="Bars of the shares (.svg).")
@click.option("--sheet", type=FILE, help="Frames of eight captions (.png).")
@click.option(
    "--usual-only", is_flag=True, help="No other numbers of steps, and nothing without a part."
)
def quality(
    model: Path,
    preset: str,
    out: Path,
    captions: int,
    clips: int,
    plot: Path | None,
    sheet: Path | None,
    *,
    usual_only: bool,
) -> int:
    """Measure what clips of the built-in model show (`pw docs quality`)."""
    require_packages("`pw bench quality`", "scikit-image", "scipy")
    from pw_bench.quality.plots import bars
    from pw_bench.quality.run import measure_quality
    from pw_bench.results import require_folder
    from pw_runtime.system.atomic_files import write_text

    require_folder(out)
    numbers = {"captions": captions, "clips": clips}
    result = measure_quality(model, preset, **numbers, sheet=sheet, usual_only=usual_only)
    if plot is not None and result.quality is not None:
        write_text(plot, bars(result.quality.variants))
    return save(result, out)
