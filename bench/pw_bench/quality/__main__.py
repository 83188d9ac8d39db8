# SPDX-License-Identifier: Apache-2.0
"""Measure the built-in model on held-out captions and scenes.

python -m pw_bench.quality --model BUNDLE --preset nano --out bench/results/quality-nano.json
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from pydantic import TypeAdapter

from pw_bench.measure.commit import commit
from pw_bench.quality.gate import Quality, adherence, from_true_drafts, reconstruction
from pw_bench.quality.measure import Seen
from pw_bench.quality.plots import bars, table, write_sheets
from pw_bench.quality.render import examples, open_studio
from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.presets import find_preset
from pw_runtime.system.atomic_files import write_text
from pw_runtime.system.machine import describe


@click.command()
@click.option("--model", type=click.Path(path_type=Path), required=True, help="Bundle to measure.")
@click.option("--preset", "name", default="nano", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Result file (.json).")
@click.option("--captions", default=64, show_default=True, help="Held-out ones.")
@click.option("--clips", default=16, show_default=True, help="True ones, for what has a truth.")
@click.option("--plot", type=click.Path(path_type=Path), help="Bars of the shares (.svg).")
@click.option("--sheet", type=click.Path(path_type=Path), help="Frames of eight captions (.png).")
def main(
    model: Path,
    name: str,
    out: Path,
    captions: int,
    clips: int,
    plot: Path | None,
    sheet: Path | None,
) -> None:
    """Measure what clips of the built-in model show."""
    bundle, preset, shown = open_bundle(model), find_preset(name), examples(captions)
    with torch.inference_mode():
        studio = open_studio(bundle)
        if sheet is not None:
            write_sheets(studio, preset, shown[:8], sheet)
        ways = adherence(studio, preset, shown)
        found = Quality(
            machine=describe(),
            commit=commit(),
            preset=name,
            plan=preset,
            weights=bundle.digest,
            captions=tuple(example.text for example in shown),
            wanted=tuple(
                Seen(one.scene.colour, one.scene.shape, one.scene.motion) for one in shown
            ),
            ways=ways,
            reconstruction=reconstruction(studio, preset, clips),
            from_true_drafts=from_true_drafts(studio, preset, clips),
        )
    write_text(out, TypeAdapter(Quality).dump_json(found, indent=1).decode() + "\n")
    if plot is not None:
        write_text(plot, bars(ways))
    click.echo(table(ways))
    for title, rows in (
        ("through encoder and decoder", found.reconstruction),
        ("from true drafts", found.from_true_drafts),
    ):
        for one in rows:
            click.echo(
                f"{title}, {one.name}: {one.mean_psnr:.2f} dB, SSIM {one.mean_ssim:.3f}, "
                f"sharpness {one.sharpness:.2e}"
            )


if __name__ == "__main__":
    main()
