# SPDX-License-Identifier: Apache-2.0
"""Several processes that run one `pw generate` together: started here, or by torchrun."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from pw_runtime.cli.exit_codes import DONE, SOME_FAILED
from pw_runtime.errors import BadRequest, PixelWizardError
from pw_runtime.system.own_program import own_program

if TYPE_CHECKING:
    import subprocess

    from pw_runtime.checkpoint.bundle import Bundle
    from pw_runtime.system.rank_meeting import Place
    from pw_runtime.system.ranks import Ranks
    from pw_runtime.types import Request

MOST: Final = 64  # ranks on one machine
RANK_TIMEOUT: Final = 600.0  # seconds
LONGEST: Final = 1e6  # seconds of --rank-timeout

processes_option = click.option(
    "--processes",
    type=click.IntRange(1, MOST),
    help="Make each clip on this many devices of this machine, with a process each: GPUs 0 to N-1, "
    "or on a CPU its cores (`pw docs parallel`).",
)
devices_option = click.option("--devices", help="The same on these GPUs, for instance 0,1,2,3.")
ulysses_option = click.option(
    "--ulysses_size",
    type=click.IntRange(1),
    help="Official flag: how many devices share the tokens of a pass, at most one per slice of "
    "--chunk tokens; officially all of them. [default: as is fastest]",
)
dit_fsdp_option = click.option(
    "--dit_fsdp",
    is_flag=True,
    help="Official flag: divide the transformers' weights among the devices. [default: where they "
    "do not fit otherwise]",
)
t5_fsdp_option = click.option(
    "--t5_fsdp",
    is_flag=True,
    help="Official flag, accepted: the text encoder is on the first device alone, and gone before "
    "the transformers come.",
)
rank_timeout_option = click.option(
    "--rank-timeout",
    type=click.FloatRange(1, LONGEST),
    default=RANK_TIMEOUT,
    show_default=True,
    help="Seconds that one device waits for the data of another, before the run ends.",
)


def devices_of(options: dict[str, Any]) -> list[str] | None:
    """Return the devices of --devices or --processes, one per rank; None for neither.

    Raises BadRequest.
    """
    processes, text = options["processes"], options["devices"]
    if text is None:
        return None if processes is None else _first_devices(processes, options["device"])
    if processes is not None or options["device"] != "auto":
        raise BadRequest("--devices says already which devices", do="leave the other option out")
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdecimal() for number in numbers) or len(set(numbers)) < len(numbers):
        raise BadRequest(
            "--devices cannot be read",
            got=text,
            wanted="numbers of different GPUs",
            do="write for instance --devices 0,1,2,3; on a CPU use --processes",
        )
    import torch

    count = torch.cuda.device_count()
    if missing := [number for number in numbers if int(number) >= count]:
        raise BadRequest(
            f"there is no GPU {', '.join(missing)}", got=f"{count} GPUs", do="see `pw doctor`"
        )
    return [f"cuda:{number}" for number in numbers]


def _first_devices(count: int, device: str) -> list[str]:
    import torch

    found = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and found == 0):
        return ["cpu"] * count
    if device not in ("auto", "cuda"):
        raise BadRequest(
            f"--processes {count} takes a device for each",
            got=f"--device {device}",
            do="name them: --devices 0,1 for instance",
        )
    if count > found:
        raise BadRequest(
            f"--processes {count} takes as many GPUs",
            got=f"{found}",
            do=f"take at most {found}, or --device cpu",
        )
    return [f"cuda:{number}" for number in range(count)]


def place_of_this_process() -> Place | None:
    """Return the place of this process among the ranks that a launcher started, if one did."""
    if "WORLD_SIZE" not in os.environ:
        return None  # without importing torch
    from pw_runtime.system.rank_meeting import place_from_environment

    return place_from_environment()


def require_alone(options: dict[str, Any]) -> None:
    """Raise BadRequest for flags of several processes in a run of one."""
    given = [name for name in ("dit_fsdp", "t5_fsdp") if options[name]]
    given += ["ulysses_size"] if options["ulysses_size"] not in (None, 1) else []
    given += ["rank-timeout"] if options["rank_timeout"] not in (None, RANK_TIMEOUT) else []
    if given:
        raise BadRequest(
            f"--{given[0]} is for several devices, and this is one process",
            do="add --processes N, 2 or more, or start with torchrun (`pw docs parallel`)",
        )


def start_ranks(devices: Sequence[str]) -> int:
    """Run this program's command line once per device; return the exit code of rank 0.

    A signal goes to rank 0 alone, which ends the others.
    """
    from pw_runtime.system.rank_processes import rank_processes

    threads = None
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, _cores() // len(devices))
    program = [*own_program("pw_runtime"), *sys.argv[1:]]
    with rank_processes(program, len(devices), threads=threads) as ranks:
        code = _ended(ranks[0])
    return 128 - code if code < 0 else code


def _ended(rank: subprocess.Popen[bytes]) -> int:
    """Wait for rank 0, and pass on signals to it."""
    from pw_runtime.cli.main import Terminated

    while True:
        try:
            return rank.wait()
        except KeyboardInterrupt:
            rank.send_signal(signal.SIGINT)
        except Terminated as ended:
            rank.send_signal(ended.number)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_as_rank(
    place: Place,
    options: dict[str, Any],
    prepare: Callable[[dict[str, Any]], tuple[Request, Bundle]],
    run: Callable[[Request, Bundle, Ranks], int],
) -> int:
    """Take part in a run: rank 0 runs the program, the others follow it.

    Args:
        place: of this process among the ranks.
        options: of `pw generate`.
        prepare: reads the request and opens the bundle.
        run: the program of rank 0.
    """
    from pw_runtime.job.take_part import take_part, tells
    from pw_runtime.system.progress import Reporter

    if place.rank:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 gets it too, and ends this one

    def prepared() -> tuple[Request, Bundle]:
        if (options["ulysses_size"] or 1) > place.size:
            raise BadRequest(
                "--ulysses_size is more than there are processes",
                got=f"{options['ulysses_size']}, of {place.size}",
                do="leave it out, or start as many with torchrun --nproc-per-node or --processes",
            )
        devices = devices_of(options)
        if devices and place.local >= len(devices):
            raise BadRequest(
                f"rank {place.rank} has no device of its own",
                got=f"{len(devices)} named, and it is process {place.local} of its machine",
                do="leave --processes and --devices out: torchrun has started the processes",
            )
        mine = devices[place.local] if devices else _device_of(place, options["device"])
        return prepare({**options, "device": mine})

    reporter = Reporter(quiet=options["quiet"] or place.rank > 0)
    try:
        code = take_part(place, prepared, run, say=reporter.say, deadline=options["rank_timeout"])
    except PixelWizardError as error:
        if tells(place.rank, error):
            raise
        return SOME_FAILED  # it is told by another rank
    return DONE if code is None else code


def _device_of(place: Place, device: str) -> str:
    """Return the device of a rank that torchrun started. Raises BadRequest."""
    import torch

    count = torch.cuda.device_count()
    if device not in ("auto", "cuda") or (device == "auto" and count == 0):
        return device
    if place.local >= count:
        raise BadRequest(
            f"rank {place.rank} has no GPU of its own",
            got=f"{count} GPUs, and it is process {place.local} of its machine",
            do="start at most as many processes per machine, or see CUDA_VISIBLE_DEVICES",
        )
    return f"cuda:{place.local}"
