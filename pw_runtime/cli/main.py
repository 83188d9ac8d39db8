# SPDX-License-Identifier: Apache-2.0
"""The `pw` command: its verbs and exit codes. Each verb imports what it needs when it runs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType

import click

from pw_runtime.cli.bench import bench, compare_clips
from pw_runtime.cli.build import build, engines
from pw_runtime.cli.decode import decode
from pw_runtime.cli.generate import generate
from pw_runtime.cli.options import BAD_INPUT, DONE, FILE, FOLDER, INTERRUPTED
from pw_runtime.cli.plan import plan
from pw_runtime.errors import PixelWizardError


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
def doctor(kernels: bool) -> int:
    """Show what is installed, what is missing and what that disables."""
    from pw_runtime.system.machine import describe, doctor_report

    click.echo(doctor_report(describe()))
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
    "--wan", type=FOLDER, required=True, help="Wan2.2-TI2V-5B folder, official or diffusers."
)
@click.option("--draft", type=FILE, help="PixelWizard draft checkpoint. [default: base weights]")
@click.option("--highres", type=FILE, help="PixelWizard high-res checkpoint (2k or 4k model.pt).")
@click.option("--out", type=FOLDER, required=True, help="Output bundle directory; must not exist.")
@click.option("--ema", is_flag=True, help="Use the EMA weights (`generator_ema`) of the .pt files.")
@click.option("--quiet", is_flag=True, help="Say nothing but errors.")
def convert_checkpoints(
    wan: Path, draft: Path | None, highres: Path | None, out: Path, ema: bool, quiet: bool
) -> int:
    """Convert downloaded checkpoints into a bundle, once."""
    from pw_export.convert import convert
    from pw_runtime.system.progress import Reporter

    reporter = Reporter(quiet=quiet)
    convert(wan=wan, draft=draft, highres=highres, out=out, ema=ema, say=reporter.say)
    click.echo(out)
    return DONE


cli.add_command(bench)
cli.add_command(compare_clips)
cli.add_command(generate)
cli.add_command(decode)
cli.add_command(build)
cli.add_command(engines)
cli.add_command(plan)


def main() -> None:
    """Entry point of the `pw` command; ends the process with one of the documented codes."""
    # OpenMP reads this when torch loads. By default waiting threads spin, and on a machine that has
    # anything else to do, the decode then takes two to five times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with _ending_on(signal.SIGTERM, signal.SIGHUP):
            code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = BAD_INPUT
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: finished clips were kept, partial files removed", err=True)
        code = INTERRUPTED
    except Terminated as ended:
        name = signal.Signals(ended.number).name
        click.echo(f"ended by {name}: finished clips were kept, partial files removed", err=True)
        code = 128 + ended.number
    except Exception as error:
        if not _is_expected(error):
            raise
        click.echo(f"error: {error}", err=True)
        code = BAD_INPUT
    sys.exit(code if isinstance(code, int) else DONE)


class Terminated(BaseException):
    """A signal asks the process to end; it unwinds as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


@contextmanager
def _ending_on(*signals: signal.Signals) -> Iterator[None]:
    """Raise Terminated in the main thread on these signals, unless they are ignored (nohup)."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the unwinding
        raise Terminated(number)

    before = {number: signal.getsignal(number) for number in signals}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_expected(error: Exception) -> bool:
    """Tell whether an error's message is meant for the user."""
    if isinstance(error, PixelWizardError):
        return True
    engines = sys.modules.get("pw_engines")  # importing it takes seconds; who raised it has done so
    return engines is not None and isinstance(error, engines.EngineError | engines.StoreError)
