# SPDX-License-Identifier: Apache-2.0
"""`pw demo`: six clips of the built-in model, which is part of the package."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

import click

from pw_runtime.cli.exit_codes import DONE
from pw_runtime.cli.log import logging_options
from pw_runtime.cli.options import FOLDER, device_option, exit_code


@click.command()
@click.option(
    "--out", type=FOLDER, default=Path("pw-demo"), show_default=True, help="Output folder."
)
@device_option
@logging_options
@click.option("--quiet", is_flag=True, help="Print only warnings, errors and finished clips.")
def demo(out: Path, device: str, quiet: bool) -> int:
    """Make six small clips of the built-in model, with a contact sheet; needs no download.

    The model has a few million parameters and draws coloured shapes at 256x128.
    """
    import pw_runtime
    from pw_export.bundle_cache import demo_bundle
    from pw_runtime.checkpoint.bundle import open_bundle
    from pw_runtime.job.checks import pick_device
    from pw_runtime.pipeline import generate
    from pw_runtime.presets import PRESETS
    from pw_runtime.prompts import read_prompts
    from pw_runtime.system.packages import require_packages
    from pw_runtime.system.progress import Reporter
    from pw_runtime.types import Request, RunOptions

    require_packages("`pw demo`", "tokenizers")
    reporter = Reporter(quiet=quiet)
    options = RunOptions(device=str(pick_device(device)))
    bundle = demo_bundle(reporter.say)
    prompts = Path(pw_runtime.__file__).parent / "data" / "demo_prompts.txt"
    request = Request(
        prompts=read_prompts(prompts, reporter.warn),
        preset=PRESETS["nano"],
        out=out,
        options=options,
        contact_sheet=True,
    )
    code = exit_code(partial(generate, request, open_bundle(bundle), reporter), reporter)
    if code == DONE:
        words = ["pw", "generate", "--model", str(bundle), "--preset", "nano"]
        reporter.say(
            "your own: "
            + shlex.join([*words, "--out", "clips", "--prompt", "a small green box rises at night"])
        )
    return code
