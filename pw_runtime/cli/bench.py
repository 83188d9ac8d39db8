# SPDX-License-Identifier: Apache-2.0
"""`pw bench` and `pw compare`: options are read here; the work is imported when a verb runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from pw_bench.choices import OURS, CaseSize, ProgramName, SyntheticSize
from pw_runtime.cli.bench_kills import kills
from pw_runtime.cli.bench_networks import (
    approximations,
    cpu_conv,
    decoder_memory,
    dit_peers,
    generate_memory,
    linear_error,
    quality,
    save,
    sparse_error,
    vae_peers,
)
from pw_runtime.cli.bench_ranks import ranks
from pw_runtime.cli.bench_serve import serve
from pw_runtime.cli.exit_codes import DONE, SOME_FAILED
from pw_runtime.cli.options import (
    FILE,
    FOLDER,
    PresetName,
    device_option,
    precision_option,
)
from pw_runtime.errors import BadRequest
from pw_runtime.system.packages import require_packages

if TYPE_CHECKING:
    from pw_bench.results import Result
    from pw_runtime.types import Precision


def weights_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options --checkpoint and --synthetic."""
    size = click.option(
        "--synthetic",
        type=click.Choice(get_args(SyntheticSize)),
        help="Size of random weights; large and 5b: in memory, as 5b the published networks. "
        "[default: none; nano and nano-hd run on the trained built-in model]",
    )
    checkpoint = click.option(
        "--checkpoint", type=FOLDER, help="Weights in the official layout, instead of random ones."
    )
    return checkpoint(size(command))


def measured(measure: Callable[[], Result], keep: Callable[[Result], int]) -> int:
    """Measure and keep the result: also what there is of it when a signal ends the process."""
    from pw_bench.measure.interruption import Interrupted

    try:
        result = measure()
    except Interrupted as interrupted:
        keep(interrupted.result)
        raise interrupted.cause from None
    return keep(result)


@click.group()
def bench() -> None:
    """Measure latency and memory, compare, report (`pw docs benchmarks`)."""


@bench.command()
@click.option("--out", type=FILE, help="Results file.")
@click.option(
    "--sizes", multiple=True, type=click.Choice(get_args(CaseSize)), help="[default: all true ones]"
)
@click.option("--only", default="", help="Only operations whose name contains this text.")
@click.option("--quick", is_flag=True, help="Three samples each, no warm-up.")
@click.option("--interpret", is_flag=True, help="On a CPU, with Triton's interpreter.")
def kernels(
    out: Path | None, sizes: tuple[CaseSize, ...], only: str, quick: bool, interpret: bool
) -> int:
    """Check and time every kernel: on a GPU all implementations, on a CPU the references."""
    from pw_bench.kernels.run import measure_kernels
    from pw_bench.report.console import show
    from pw_bench.results import require_folder, write_result

    if out is not None:
        require_folder(out)

    def keep(result: Result) -> int:
        show(result)
        if out is not None:
            write_result(result, out)
        return DONE

    options = {"quick": quick, "interpret": interpret}
    return measured(partial(measure_kernels, sizes, only, **options, say=click.echo), keep)


@bench.command()
@click.option("--preset", type=PresetName(), required=True, help="As for `pw generate`.")
@weights_options
@click.option("--steps", type=click.IntRange(1), help="Maximum for each denoising stage.")
@click.option("--clips", type=click.IntRange(1), default=5, show_default=True)
@click.option("--cold", is_flag=True, help="Count the first clip too.")
@click.option(
    "--side",
    type=click.Choice([name for name in get_args(ProgramName) if name.startswith(OURS)]),
    default=OURS,
    show_default=True,
    help="Which of this runtime's programs makes the clips.",
)
@precision_option
@device_option
@click.option("--out", type=FILE, required=True, help="Results file.")
def stages(
    preset: str,
    checkpoint: Path | None,
    synthetic: SyntheticSize | None,
    steps: int | None,
    clips: int,
    cold: bool,
    side: ProgramName,
    precision: Precision | None,
    device: str,
    out: Path,
) -> int:
    """Measure every stage of a clip by itself, beside this machine's best rates."""
    from pw_bench.e2e.stages import measure_stages
    from pw_bench.results import require_folder

    require_folder(out)
    measure = partial(
        measure_stages,
        preset,
        checkpoint=checkpoint,
        synthetic=synthetic,
        steps=steps,
        clips=clips,
        cold=cold,
        side=side,
        precision=precision,
        device_name=device,
    )
    return measured(measure, partial(save, out=out))


@bench.command()
@click.option("--preset", type=PresetName(), required=True, help="As for `pw generate`.")
@click.option("--draft-only", is_flag=True, help="Stop after the draft, which is then the clip.")
@weights_options
@click.option(
    "--side",
    "programs",
    multiple=True,
    type=click.Choice(get_args(ProgramName)),
    help="Program; may be repeated. [default: all that can make the clip, without engines]",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Processes of each program.",
)
@click.option(
    "--warm",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="Clips of each process after its first.",
)
@precision_option
@device_option
@click.option("--out", type=FILE, required=True, help="Results file.")
def e2e(
    preset: str,
    draft_only: bool,
    checkpoint: Path | None,
    synthetic: SyntheticSize | None,
    programs: tuple[ProgramName, ...],
    rounds: int,
    warm: int,
    precision: Precision | None,
    device: str,
    out: Path,
) -> int:
    """Measure prompt to video, beside other programs: time, memory, equivalence."""
    from pw_bench.e2e.run import measure_e2e
    from pw_bench.results import require_folder

    require_folder(out)
    measure = partial(
        measure_e2e,
        preset,
        draft_only=draft_only,
        checkpoint=checkpoint,
        synthetic=synthetic,
        requested=programs,
        rounds=rounds,
        warm=warm,
        precision=precision,
        device_name=device,
    )
    return measured(measure, partial(save, out=out))


@bench.command()
@click.argument("old", type=FILE)
@click.argument("new", type=FILE)
def compare(old: Path, new: Path) -> int:
    """Compare the figures of NEW with those of OLD.

    The exit code is 3 where a figure is slower or larger, is missing or fell back. Only results of
    the same scope and machine can be compared.
    """
    require_packages("`pw bench compare`", "scipy")
    from pw_bench.report.console import show_comparison
    from pw_bench.report.regressions import compare_results
    from pw_bench.results import read_result

    before, after = read_result(old), read_result(new)
    comparison = compare_results(before, after)
    show_comparison(comparison)
    click.echo(f"commit {before.identity.commit} and {after.identity.commit}")
    return SOME_FAILED if comparison.is_worse else DONE


@bench.command()
@click.argument("files", nargs=-1, required=True, type=FILE, metavar="FILE...")
@click.option("--out", type=FILE, required=True, help="HTML page, which needs no other file.")
@click.option("--markdown", "markdown_file", type=FILE, help="Also write tables for a README.")
@click.option("--json-lines", "lines_file", type=FILE, help="Also write a line for every figure.")
def report(
    files: tuple[Path, ...], out: Path, markdown_file: Path | None, lines_file: Path | None
) -> int:
    """Present results files of `pw bench` on one page."""
    require_packages("`pw bench report`", "jinja2")
    from pw_bench.report import json_lines, markdown, write_html
    from pw_bench.results import read_result
    from pw_runtime.system.atomic_files import write_text

    outputs = [path for path in (out, markdown_file, lines_file) if path is not None]
    paths = [path.resolve() for path in (*files, *outputs)]
    for output in outputs:
        if paths.count(output.resolve()) > 1:
            raise BadRequest(
                f"{output} is named twice",
                wanted="another file for each of the results, the page, the tables and the lines",
                do="give one of them another name",
            )
    results = [read_result(file) for file in files]
    write_html(results, out)
    if markdown_file is not None:
        write_text(markdown_file, markdown(results))
    if lines_file is not None:
        write_text(lines_file, json_lines(results))
    return DONE


@bench.command("gpu-suite")
@click.option("--out", type=FOLDER, required=True, help="Folder of results files.")
@click.option("--minutes", default=9.0, show_default=True, help="Time for this call.")
@click.option(
    "--full",
    is_flag=True,
    help="Hours: our programs in rounds at 2K, whole clips of 4K; give it --minutes.",
)
def gpu_suite(out: Path, minutes: float, full: bool) -> int:
    """Measure kernels, stages and whole clips of 2K and 4K on a GPU; print the tables last."""
    import torch

    from pw_bench.gpu_suite import PARTS, run_parts
    from pw_bench.report.console import show
    from pw_bench.results import read_result

    if not torch.cuda.is_available():
        raise BadRequest(
            "`pw bench gpu-suite` measures a GPU, and PyTorch finds none",
            do="run `pw doctor` on the GPU machine",
        )
    missing = run_parts(out, minutes, full=full, gpus=torch.cuda.device_count(), say=click.echo)
    for file in (out / f"{part.name}.json" for part in PARTS):
        if not file.exists():
            continue
        click.echo(f"\n{file.name}")
        try:
            show(read_result(file))
        except BadRequest as error:  # the other tables still follow
            missing[file.stem] = str(error)
    for name, reason in missing.items():
        click.echo(f"not there yet: {name}: {reason}")
    return SOME_FAILED if missing else DONE


for command in (
    dit_peers,
    vae_peers,
    cpu_conv,
    generate_memory,
    decoder_memory,
    quality,
    approximations,
    linear_error,
    sparse_error,
    ranks,
    serve,
    kills,
):
    bench.add_command(command)


@click.command("compare")
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@click.option("--contact-sheet", "sheet", type=FILE, help="PNG of both and of their differences.")
@click.option("--json", "out", type=FILE, help="The same numbers as JSON.")
def compare_clips(a: Path, b: Path, sheet: Path | None, out: Path | None) -> int:
    """Compare clip A with clip B, or the clips of folder A with those of folder B."""
    require_packages("`pw compare`", "scikit-image", "scipy")
    from pw_bench.clips.compare import compare_clips as run

    run(a, b, sheet, out)
    return DONE
