# SPDX-License-Identifier: Apache-2.0
"""The verbs of `pw`. Each imports what it needs when it runs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from pw_runtime.cli.bench import bench, compare_clips
from pw_runtime.cli.build import build, engines
from pw_runtime.cli.decode import decode
from pw_runtime.cli.demo import demo
from pw_runtime.cli.docs import docs
from pw_runtime.cli.exit_codes import DONE
from pw_runtime.cli.fleet import fleet
from pw_runtime.cli.gallery import finish, gallery
from pw_runtime.cli.generate import generate
from pw_runtime.cli.log import logging_options
from pw_runtime.cli.options import (
    FOLDER,
    MODEL,
    json_option,
    lora_highres_option,
    lora_option,
    own_loras,
)
from pw_runtime.cli.plan import plan
from pw_runtime.cli.repro import repro
from pw_runtime.cli.serve import serve
from pw_runtime.cli.tune import tune
from pw_runtime.cli.upscale import upscale
from pw_runtime.cli.verify import verify
from pw_runtime.errors import BadRequest
from pw_runtime.types import LoraFile


def version_of_this() -> str:
    """Return the installed version."""
    try:
        return version("pixelwizard-runtime")
    except PackageNotFoundError:
        return "running from source"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version_of_this(), prog_name="pw")
def cli() -> None:
    """Native 2K and 4K text-to-video with PixelWizard."""


@cli.command()
@click.option("--kernels", is_flag=True, help="Also list the operations and what implements each.")
@json_option
def doctor(kernels: bool, as_json: bool) -> int:
    """Show what is installed, what is missing and what that disables."""
    from pw_runtime.cli.doctor import report

    if kernels and as_json:
        raise BadRequest("--json has no list of operations", do="leave --kernels or --json out")
    click.echo(report(as_json=as_json))
    if kernels:
        # Imported here because they need torch, which the report does not.
        from pw_kernels.library import library, status
        from pw_kernels.op import table

        try:
            compiled = library()
        except RuntimeError as error:
            raise click.ClickException(str(error)) from error
        click.echo(f"\n{table()}\n\nkernels: {status()}")
        if compiled is not None:
            click.echo(f"\n{compiled.table()}")
    return DONE


@cli.command("convert")
@click.option(
    "--wan",
    type=MODEL,
    required=True,
    help="Wan2.2-TI2V-5B folder: official, diffusers, or ComfyUI's single files; or ORG/NAME in "
    "the local cache of Hugging Face's hub.",
)
@click.option("--draft", type=MODEL, help="PixelWizard draft checkpoint. [default: base weights]")
@click.option("--highres", type=MODEL, help="PixelWizard high-res checkpoint (2k or 4k model.pt).")
@click.option("--out", type=FOLDER, required=True, help="Output bundle directory; must not exist.")
@click.option("--ema", is_flag=True, help="Use the EMA weights (`generator_ema`) of the .pt files.")
@lora_option
@lora_highres_option
@logging_options
@click.option("--quiet", is_flag=True, help="Say nothing but errors.")
def convert_checkpoints(
    wan: Path,
    draft: Path | None,
    highres: Path | None,
    out: Path,
    ema: bool,
    loras: tuple[LoraFile, ...],
    loras_highres: tuple[LoraFile, ...],
    quiet: bool,
) -> int:
    """Convert downloaded checkpoints into a bundle, once."""
    from pw_export.convert import convert
    from pw_runtime.system.progress import Reporter

    reporter = Reporter(quiet=quiet)
    convert(
        wan=wan,
        draft=draft,
        highres=highres,
        out=out,
        ema=ema,
        loras=loras,
        loras_highres=own_loras(loras_highres),
        say=reporter.say,
    )
    click.echo(out)
    return DONE


cli.add_command(bench)
cli.add_command(compare_clips)
cli.add_command(generate)
cli.add_command(gallery)
cli.add_command(finish)
cli.add_command(upscale)
cli.add_command(decode)
cli.add_command(build)
cli.add_command(engines)
cli.add_command(plan)
cli.add_command(fleet)
cli.add_command(serve)
cli.add_command(tune)
cli.add_command(verify)
cli.add_command(repro)
cli.add_command(demo)
cli.add_command(docs)
