# SPDX-License-Identifier: Apache-2.0
"""`pw bench ranks`: one clip by several processes or GPUs, beside one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from pw_bench.choices import SyntheticSize
from pw_runtime.cli.bench_networks import out_option, save
from pw_runtime.cli.options import (
    MODEL,
    PresetName,
    chunk_option,
    device_option,
    precision_option,
)
from pw_runtime.errors import BadRequest
from pw_runtime.system.packages import require_packages

if TYPE_CHECKING:
    from pw_runtime.types import Precision


def numbers(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> tuple[int, ...]:
    """Read numbers of processes, for instance "1,2,4". Raises BadRequest."""
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise BadRequest(
            "--counts cannot be read", got=text, wanted="numbers of processes, for instance 1,2,4"
        )
    return tuple(int(part) for part in parts)


@click.command()
@click.option("--preset", type=PresetName(), required=True, help="As for `pw generate`.")
@click.option("--model", type=MODEL, help="Bundle made by `pw convert`.")
@click.option(
    "--synthetic",
    type=click.Choice(get_args(SyntheticSize)),
    help="Size of random weights; large and 5b: in memory, as 5b the published networks. "
    "[default: none; nano and nano-hd run on the trained built-in model]",
)
@click.option(
    "--counts",
    callback=numbers,
    help="Numbers of processes, beside 1. [default: 2, 4 and 8, as far as there are GPUs or cores]",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="Threads of all processes together, on a CPU. [default: its cores]",
)
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="Clips of each setup."
)
@click.option("--steps", type=click.IntRange(1), help="Maximum for each denoising stage.")
@chunk_option
@precision_option
@device_option
@out_option
def ranks(
    preset: str,
    model: Path | None,
    synthetic: SyntheticSize | None,
    counts: tuple[int, ...],
    threads: int | None,
    rounds: int,
    steps: int | None,
    chunk: int,
    precision: Precision | None,
    device: str,
    out: Path,
) -> int:
    """Measure one clip by several processes or GPUs, beside one: time, memory, bytes sent, bits."""
    require_packages("`pw bench ranks`", "tokenizers")
    from pw_bench.ranks.run import measure_ranks
    from pw_bench.results import require_folder

    require_folder(out)
    result = measure_ranks(
        preset,
        model=model,
        synthetic=synthetic,
        counts=counts,
        threads=threads,
        rounds=rounds,
        steps=steps,
        chunk=chunk,
        precision=precision,
        device_name=device,
        say=click.echo,
    )
    return save(result, out)
