# SPDX-License-Identifier: Apache-2.0
"""`pw bench kills`: a batch that is killed at random moments, and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from pw_bench.choices import SyntheticSize
from pw_runtime.cli.bench_networks import out_option, save
from pw_runtime.cli.exit_codes import SOME_FAILED
from pw_runtime.cli.options import FOLDER, PresetName
from pw_runtime.system.packages import require_packages


@click.command()
@click.option("--preset", type=PresetName(), required=True, help="As for `pw generate`.")
@click.option("--model", type=FOLDER, help="Bundle made by `pw convert`.")
@click.option(
    "--synthetic",
    type=click.Choice(get_args(SyntheticSize)),
    help="Size of random weights. [default: none; nano and nano-hd run on the trained built-in "
    "model]",
)
@click.option("--steps", type=click.IntRange(1), help="Maximum for each denoising stage.")
@click.option(
    "--prompts", type=click.IntRange(1, 3), default=2, show_default=True, help="Clips of a batch."
)
@click.option("--kills", type=click.IntRange(1), default=100, show_default=True)
@click.option(
    "--pairs",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Whole runs with and without the journal, whose times are compared.",
)
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
@out_option
def kills(
    preset: str,
    model: Path | None,
    synthetic: SyntheticSize | None,
    steps: int | None,
    prompts: int,
    kills: int,
    pairs: int,
    seed: int,
    out: Path,
) -> int:
    """Kill a batch at random moments: does it go on, with the same files, and at which cost?

    The exit code is 3 where a file differs from that of a run that was not killed.
    """
    require_packages("`pw bench kills`", "tokenizers")
    from pw_bench.kills.run import measure_kills
    from pw_bench.results import require_folder

    require_folder(out)
    result = measure_kills(
        preset,
        model=model,
        synthetic=synthetic,
        steps=steps,
        prompts=prompts,
        kills=kills,
        pairs=pairs,
        seed=seed,
        say=click.echo,
    )
    code = save(result, out)
    return SOME_FAILED if result.kills is not None and result.kills.altered else code
