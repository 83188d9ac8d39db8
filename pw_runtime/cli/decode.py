# SPDX-License-Identifier: Apache-2.0
"""`pw decode`: clips finished from their latents files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from pw_runtime.cli.options import (
    CODECS,
    FILE,
    FOLDER,
    device_option,
    exit_code,
    fragmented_option,
    gpu_memory_option,
    host_memory_option,
    trace_option,
    traced,
)


@click.command()
@click.argument("latents", nargs=-1, required=True, type=FILE)
@click.option("--model", type=FOLDER, required=True, help="Bundle with the VAE of their run.")
@click.option("--out", type=FOLDER, help="Folder for the clips. [default: that of the file]")
@click.option("--codec", type=CODECS, help="[default: that of the run]")
@gpu_memory_option
@host_memory_option
@device_option
@click.option(
    "--kernels",
    type=click.Choice(["reference", "triton"]),
    help="Implementation of the operations. [default: that of the run]",
)
@click.option(
    "--vae-precision",
    type=click.Choice(["fp32", "bf16"]),
    help="Of the decoder; bf16 halves its memory and is an approximation. [default: the run's]",
)
@fragmented_option
@trace_option
@click.option("--overwrite", is_flag=True, help="Replace clips that exist.")
@click.option("--quiet", is_flag=True, help="Say nothing but warnings and errors.")
def decode(latents: tuple[Path, ...], **options: Any) -> int:
    """Finish clips from the LATENTS.safetensors that an earlier `pw generate` left."""
    from pw_runtime.checkpoint.bundle import open_bundle
    from pw_runtime.job.preflight import pick_device
    from pw_runtime.resume import finish
    from pw_runtime.system.progress import Reporter

    reporter, device = Reporter(quiet=options["quiet"]), pick_device(options["device"])
    run = partial(
        finish,
        latents,
        open_bundle(options["model"]),
        reporter,
        device=device,
        out=options["out"],
        codec=options["codec"],
        kernels=options["kernels"],
        vae_precision=options["vae_precision"],
        fragmented=options["fragmented"],
        overwrite=options["overwrite"],
        gpu_memory=options["gpu_memory"],
        host_memory=options["host_memory"],
    )
    return traced(lambda: exit_code(run, reporter), options["trace"], device)
