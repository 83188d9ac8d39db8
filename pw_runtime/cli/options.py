# SPDX-License-Identifier: Apache-2.0
"""What the verbs of the command line share: exit codes, kinds of paths, options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pw_runtime.errors import BadResult, WriteFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from pw_runtime.system.progress import Reporter
    from pw_runtime.types import Outcome

CHUNK = 8192  # as in pw_runtime.types, which needs torch
DONE, BAD_INPUT, SOME_FAILED, INTERRUPTED = 0, 2, 3, 130


class NonEmptyPath(click.Path):
    """A path; the empty one, which would mean the current folder, is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Turn the text of an option into a Path."""
        if value == "":
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class Bytes(click.ParamType):  # type: ignore[type-arg]
    """A size in bytes: 24GiB, 24G, 512MiB; powers of two."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Turn the text of an option into bytes."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", value.strip().lower())
        size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
        if size <= 0:
            self.fail(f"{value!r} is no size: write 24GiB or 512MiB", param, ctx)
        return size


gpu_memory_option = click.option(
    "--gpu-memory", type=Bytes(), help="Most GPU memory to take. [default: what is free]"
)
host_memory_option = click.option(
    "--host-memory", type=Bytes(), help="Most host memory to take. [default: what is free]"
)
FOLDER = NonEmptyPath(path_type=Path)
FILE = NonEmptyPath(path_type=Path)
CODECS = click.Choice(["h264", "hevc", "av1", "ffv1"])

chunk_option = click.option(
    "--chunk",
    type=click.IntRange(min=16),
    default=CHUNK,
    show_default=True,
    help="Most tokens that a segment works on at a time: the same for building and generating.",
)
precision_option = click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    help="Of matrix products. [default: fp32 on a CPU, bf16 on a GPU]",
)
vae_precision_option = click.option(
    "--vae-precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="bf16: half the memory of the decode; an approximation (docs/numerics.md).",
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)
fragmented_option = click.option(
    "--fragmented",
    is_flag=True,
    help="Also write <id>.partial.mp4, which plays while it grows; gone when <id>.mp4 is there.",
)


trace_option = click.option(
    "--trace",
    type=FILE,
    help="Write what took how long there, for Perfetto or chrome://tracing; spans are NVTX ranges.",
)


def traced(run: Callable[[], int], file: Path | None, device: torch.device) -> int:
    """Run it, with a trace file where one is wanted, also of a run that fails."""
    if file is None:
        return run()
    from pw_runtime.system.trace import Trace

    trace = Trace(device)
    try:
        with trace.recording():
            return run()
    finally:
        trace.write(file)


def exit_code(run: Callable[[], Sequence[Outcome]], reporter: Reporter) -> int:
    """Run it and return the code for what became of its prompts; those that failed are named."""
    try:
        outcomes = run()
    except (WriteFailed, BadResult) as error:  # what was finished until then is kept
        reporter.warn(f"error: {error}")
        return SOME_FAILED
    failed = [outcome.prompt.id for outcome in outcomes if outcome.error is not None]
    if failed:
        reporter.warn(f"{len(failed)} of {len(outcomes)} prompts failed: {', '.join(failed)}")
    return SOME_FAILED if failed else DONE
