# SPDX-License-Identifier: Apache-2.0
"""`pw decode`: finish clips from their latents files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, get_args

import click

from pw_runtime.cli.log import logging_options
from pw_runtime.cli.options import (
    CODECS,
    FILE,
    FOLDER,
    MODEL,
    PRECISIONS,
    device_option,
    exit_code,
    fragmented_option,
    gpu_memory_option,
    host_memory_option,
    trace_option,
    traced,
)
from pw_runtime.cli.stopping import command_again, stopping
from pw_runtime.types import Conv, Kernels, Outcome


@click.command()
@click.argument("latents", nargs=-1, required=True, type=FILE)
@click.option("--model", type=MODEL, required=True, help="Bundle with the VAE of that run.")
@click.option("--out", type=FOLDER, help="Output folder. [default: that of each file]")
@click.option("--codec", type=CODECS, help="Video codec. [default: as in the earlier run]")
@gpu_memory_option
@host_memory_option
@device_option
@click.option(
    "--kernels",
    type=click.Choice([name for name in get_args(Kernels) if name != "auto"]),
    help="Implementation of the operations. [default: as in the earlier run]",
)
@click.option(
    "--conv",
    type=click.Choice(get_args(Conv)),
    help="Convolutions of the decoder on a CPU, as for `pw generate`. "
    "[default: as in the earlier run]",
)
@click.option(
    "--vae-precision",
    type=PRECISIONS,
    help="Precision of the decoder; bf16 halves its memory and is an approximation. "
    "[default: as in the earlier run]",
)
@fragmented_option
@trace_option
@click.option("--overwrite", is_flag=True, help="Replace clips that exist.")
@logging_options
@click.option("--quiet", is_flag=True, help="Print only warnings, errors and finished clips.")
def decode(latents: tuple[Path, ...], **options: Any) -> int:
    """Finish clips from the <id>.latents.safetensors that an earlier `pw generate` left."""
    from pw_runtime.checkpoint.bundle import open_bundle
    from pw_runtime.job.checks import pick_device
    from pw_runtime.job.clip import Clip
    from pw_runtime.resume import Overrides, finish_clips, open_clips
    from pw_runtime.system.progress import Reporter
    from pw_runtime.system.stop import StopRequest

    reporter, device = Reporter(quiet=options["quiet"]), pick_device(options["device"])
    resolved = options | {"device": str(device)}
    overrides = Overrides(**{field.name: resolved[field.name] for field in fields(Overrides)})
    bundle, overwrite = open_bundle(options["model"]), options["overwrite"]

    def run() -> Sequence[Outcome]:
        stop, clips = StopRequest(), list[Clip]()

        def go_on() -> str:
            # why without these: the command would be refused, because their clips exist
            done = {clip.latents for clip in clips if clip.latents and clip.video is not None}
            return command_again(done=done)

        with stopping(stop, reporter, go_on):
            clips += open_clips(latents, bundle, reporter, overrides)
            return finish_clips(clips, bundle, reporter, overwrite=overwrite, stop=stop)

    return traced(partial(exit_code, run, reporter), options["trace"], device)
