# SPDX-License-Identifier: Apache-2.0
"""`pw bench serve`: load on `pw serve`."""

from __future__ import annotations

from pathlib import Path

import click

from pw_runtime.cli.bench_networks import out_option, save
from pw_runtime.cli.options import FOLDER, PresetName
from pw_runtime.system.packages import require_packages


@click.command()
@click.option("--model", type=FOLDER, required=True, help="Bundle made by `pw convert`.")
@click.option(
    "--preset", type=PresetName(), default="nano", show_default=True, help="As for `pw generate`."
)
@click.option(
    "--part",
    "parts",
    type=click.Choice(("status", "streams", "queue", "soak")),
    multiple=True,
    help="May be repeated. [default: all]",
)
@click.option("--clients", type=click.IntRange(1), default=50, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--streams", type=click.IntRange(1), default=200, show_default=True)
@click.option("--queued", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--soak", type=click.IntRange(1), default=300, show_default=True, help="Jobs.")
@out_option
def serve(
    model: Path,
    preset: str,
    parts: tuple[str, ...],
    clients: int,
    rounds: int,
    streams: int,
    queued: int,
    soak: int,
    out: Path,
) -> int:
    """Measure `pw serve` under load: polling clients, event streams, a long queue, many jobs."""
    require_packages("`pw bench serve`", "fastapi", "uvicorn", "sqlalchemy")
    from pw_bench.results import require_folder
    from pw_bench.serve.run import PARTS, Load, measure_serve

    require_folder(out)
    load = Load(clients=clients, rounds=rounds, streams=streams, queued=queued, soak=soak)
    return save(measure_serve(model.absolute(), preset, parts or PARTS, load, click.echo), out)
