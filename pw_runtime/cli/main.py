# SPDX-License-Identifier: Apache-2.0
"""The `pw` command line. Options are read here; the work is imported when a verb runs."""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from pw_runtime.cli.build import build, engines
from pw_runtime.cli.decode import decode
from pw_runtime.cli.options import (
    BAD_INPUT,
    CODECS,
    DONE,
    FILE,
    FOLDER,
    INTERRUPTED,
    chunk_option,
    device_option,
    exit_code,
    fragmented_option,
    gpu_memory_option,
    host_memory_option,
    precision_option,
    trace_option,
    traced,
    vae_precision_option,
)
from pw_runtime.cli.plan import plan
from pw_runtime.errors import BadRequest, PixelWizardError


def version_of_this() -> str:
    """The installed version, or that there is none."""
    try:
        return version("pixelwizard-runtime")
    except PackageNotFoundError:
        return "running from source"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version_of_this(), prog_name="pw")
def cli() -> None:
    """Native 2K and 4K text-to-video with PixelWizard."""


@cli.command()
@click.option("--kernels", is_flag=True, help="Also list the operations and what each runs on.")
def doctor(kernels: bool) -> int:
    """Show what is installed, what is missing and what that disables."""
    from pw_runtime.system.machine import describe, doctor_report

    click.echo(doctor_report(describe()))
    if kernels:
        # here: they need torch, which the report does not
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


@cli.command()
@click.option(
    "--wan", type=FOLDER, required=True, help="Wan2.2-TI2V-5B folder, official or diffusers."
)
@click.option("--draft", type=FILE, help="PixelWizard draft checkpoint. [default: base weights]")
@click.option("--highres", type=FILE, help="PixelWizard high-res checkpoint (2k or 4k model.pt).")
@click.option("--out", type=FOLDER, required=True, help="Bundle to make; must not exist yet.")
@click.option("--ema", is_flag=True, help="Take generator_ema of the .pt files.")
@click.option("--quiet", is_flag=True, help="Say nothing but errors.")
def convert(
    wan: Path, draft: Path | None, highres: Path | None, out: Path, ema: bool, quiet: bool
) -> int:
    """Turn downloaded checkpoints into a bundle, once."""
    from pw_runtime.system.progress import Reporter

    # By name: pw_runtime lies below pw_export and must not import it.
    export = import_module("pw_export.convert")
    reporter = Reporter(quiet=quiet)
    export.convert(wan=wan, draft=draft, highres=highres, out=out, ema=ema, say=reporter.say)
    click.echo(out)
    return DONE


@cli.command()
@click.option("--model", type=FOLDER, help="Bundle made by `pw convert`.")
@click.option(
    "--prompts", "--prompt_file", "prompt_file", type=FILE, help="Prompt file, .txt or .jsonl."
)
@click.option("--prompt", "prompt_texts", multiple=True, help="A prompt; may be repeated.")
@click.option(
    "--preset",
    "--resolution",
    required=True,
    help="draft, 2k, 4k, 4k-5step, nano, nano-hd, or a preset file (.toml).",
)
@click.option("--out", "--video_dir", type=FOLDER, required=True, help="Folder for the clips.")
@click.option(
    "--seed",
    "--base_seed",
    type=int,
    default=0,
    show_default=True,
    help="Base seed; negative: a random one.",
)
@click.option("--negative", help="Negative prompt. [default: the official one]")
@click.option("--noise", type=FILE, help="Safetensors file with draft_noise and highres_noise.")
@click.option(
    "--codec",
    type=CODECS,
    default="h264",
    show_default=True,
    help="ffv1 is lossless RGB in .mkv.",
)
@fragmented_option
@click.option("--save-latents", is_flag=True, help="Keep <id>.latents.safetensors at the end.")
@click.option("--draft-only", is_flag=True, help="Stop after the draft; the clip shows it.")
@click.option("--contact-sheet", is_flag=True, help="Write contact_sheet.png too.")
@precision_option
@vae_precision_option
@gpu_memory_option
@host_memory_option
@device_option
@click.option(
    "--kernels",
    type=click.Choice(["reference", "triton"]),
    default="reference",
    show_default=True,
    help="triton: CUDA only, see docs/kernels.md.",
)
@click.option(
    "--attention",
    type=click.Choice(
        ["reference", "triton", "gluon", "cudnn", "flash", "flash-attn", "flash-attn-4"]
    ),
    help="Attention alone; all but reference: CUDA and bf16 only. [default: as --kernels]",
)
@click.option(
    "--policy",
    type=click.Choice(["auto", "engines", "eager"]),
    default="auto",
    show_default=True,
    help="auto: engines of `pw build` where there are; engines: nothing else for the "
    "transformers; eager: none.",
)
@chunk_option
@trace_option
@click.option("--quiet", is_flag=True, help="Say nothing but warnings and errors.")
@click.option(
    "--ckpt_dir", type=FOLDER, help="Official flag: checkpoint folder, converted on first use."
)
@click.option("--lr_ckpt", type=FILE, help="Official flag: draft checkpoint, with --ckpt_dir.")
@click.option("--hr_ckpt", type=FILE, help="Official flag: high-res checkpoint, with --ckpt_dir.")
def generate(**options: Any) -> int:
    """Make one clip per prompt: <id>.mp4 and its receipt <id>.json."""
    from pw_runtime.pipeline import generate as run
    from pw_runtime.system.progress import Reporter

    reporter = Reporter(quiet=options["quiet"])
    request = read_request(options)
    bundle = open_model(options, reporter)
    work = partial(exit_code, lambda: run(request, bundle, reporter), reporter)
    return traced(work, options["trace"], request.device)


def read_request(options: dict[str, Any]) -> Any:
    """Options of `pw generate` -> Request. Raises BadRequest."""
    from pw_runtime.job.preflight import default_precision, pick_device
    from pw_runtime.presets import find_preset
    from pw_runtime.prompts import make_prompts, read_prompts
    from pw_runtime.sampling.noise import resolve_base_seed
    from pw_runtime.types import OFFICIAL_NEGATIVE, Request

    texts: tuple[str, ...] = options["prompt_texts"]
    if (options["prompt_file"] is None) == (not texts):
        raise BadRequest(
            "no prompts, or two kinds of them", do="give --prompts FILE or --prompt TEXT"
        )
    if any(not text.strip() for text in texts):
        raise BadRequest("--prompt is empty", do="write what the clip should show")
    prompts = (
        make_prompts([(str(i), text.strip()) for i, text in enumerate(texts)])
        if texts
        else read_prompts(options["prompt_file"])
    )
    device = pick_device(options["device"])
    return Request(
        prompts=prompts,
        preset=find_preset(options["preset"]),
        out=options["out"],
        negative=OFFICIAL_NEGATIVE if options["negative"] is None else options["negative"],
        seed=resolve_base_seed(options["seed"]),
        noise=options["noise"],
        codec=options["codec"],
        fragmented=options["fragmented"],
        save_latents=options["save_latents"],
        draft_only=options["draft_only"],
        contact_sheet=options["contact_sheet"],
        precision=default_precision(options["precision"], device),
        kernels=options["kernels"],
        attention=options["attention"],
        policy=options["policy"],
        vae_precision=options["vae_precision"],
        gpu_memory=options["gpu_memory"],
        host_memory=options["host_memory"],
        chunk=options["chunk"],
        device=device,
    )


def open_model(options: dict[str, Any], reporter: Any) -> Any:
    """The bundle of --model, or one made of the official flags. Raises BadRequest, BadWeights."""
    from pw_runtime.checkpoint.bundle import open_bundle

    model, checkpoint = options["model"], options["ckpt_dir"]
    if (model is None) == (checkpoint is None):
        raise BadRequest("no model, or two", do="give --model BUNDLE or --ckpt_dir CHECKPOINT")
    if model is not None:
        if options["lr_ckpt"] or options["hr_ckpt"]:
            raise BadRequest(
                "--model is complete in itself", do="give --lr_ckpt and --hr_ckpt with --ckpt_dir"
            )
        return open_bundle(model)
    cached = import_module("pw_export.bundle_cache")
    return open_bundle(
        cached.cached_bundle(
            wan=checkpoint, draft=options["lr_ckpt"], highres=options["hr_ckpt"], say=reporter.say
        )
    )


@cli.command()
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@click.option("--contact-sheet", "sheet", type=FILE, help="PNG of both and of their differences.")
@click.option("--json", "out", type=FILE, help="The same numbers as JSON.")
def compare(a: Path, b: Path, sheet: Path | None, out: Path | None) -> int:
    """Tell how far clip A is from clip B, or the clips of folder A from those of folder B."""
    import_module("pw_bench.clips.compare").compare_clips(a, b, sheet, out)
    return DONE


class Bench(click.Group):
    """The verbs of pw_bench, which stands above the runtime: found when one is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names."""
        return import_module("pw_bench.cli").bench.list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """One of them."""
        return import_module("pw_bench.cli").bench.get_command(ctx, cmd_name)


cli.add_command(
    Bench("bench", help="Measure latency and memory, compare, report (docs/benchmarks.md).")
)
cli.add_command(decode)
cli.add_command(build)
cli.add_command(engines)
cli.add_command(plan)


def main() -> None:
    """Entry point of the `pw` command; ends the process with one of the documented codes."""
    # Read when torch loads its OpenMP: waiting threads otherwise spin, and on a machine with
    # anything else to do the decode then takes two to five times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = BAD_INPUT
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: what was finished is kept, half-made files are removed", err=True)
        code = INTERRUPTED
    except Exception as error:
        # Errors of packages below the runtime, by name: importing them takes seconds.
        ours = isinstance(error, PixelWizardError)
        if not ours and type(error).__name__ not in ("StoreError", "EngineError"):
            raise
        click.echo(f"error: {error}", err=True)
        code = BAD_INPUT
    sys.exit(code if isinstance(code, int) else DONE)
