# SPDX-License-Identifier: Apache-2.0
"""`pw generate`: one clip per prompt."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, get_args

import click

from pw_runtime.cli.json_output import document_of_refusal, one_document
from pw_runtime.cli.launch import (
    devices_of,
    devices_option,
    dit_fsdp_option,
    place_of_this_process,
    processes_option,
    rank_timeout_option,
    require_alone,
    run_as_rank,
    start_ranks,
    t5_fsdp_option,
    ulysses_option,
)
from pw_runtime.cli.log import logging_options
from pw_runtime.cli.options import (
    CODECS,
    FILE,
    FOLDER,
    MODEL,
    PresetName,
    blocks_option,
    chunk_option,
    conv_option,
    device_option,
    exit_code,
    fragmented_option,
    gpu_memory_option,
    guidance_reuse_option,
    host_memory_option,
    json_option,
    linear_option,
    lora_highres_option,
    lora_option,
    precision_option,
    set_option,
    sparse_attention_option,
    step_cache_option,
    trace_option,
    traced,
    vae_precision_option,
    with_chosen_loras,
)
from pw_runtime.cli.request import open_model, read_request, require_lora_stages
from pw_runtime.cli.sizes import size_options
from pw_runtime.cli.source_options import source_options
from pw_runtime.cli.stopping import command_again, stopping
from pw_runtime.cli.trained_size import beyond_training
from pw_runtime.system.packages import require_packages
from pw_runtime.types import AttentionKernel, EnginePolicy, Kernels, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pw_runtime.checkpoint.bundle import Bundle
    from pw_runtime.system.progress import Reporter
    from pw_runtime.system.ranks import Ranks
    from pw_runtime.types import Outcome

# The summary of --json, where nothing was made.
NO_CLIPS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "out": None,
        "seed": None,
        "seconds": None,
        "finished": 0,
        "failed": 0,
        "error": None,
        "clips": [],
    }
)


@click.command()
@click.option(
    "--model",
    type=MODEL,
    help="Bundle made by `pw convert`, or ORG/NAME in the local cache of Hugging Face's hub.",
)
@click.option(
    "--prompts", "--prompt_file", "prompt_file", type=FILE, help="Prompt file, .txt or .jsonl."
)
@click.option("--prompt", "prompt_texts", multiple=True, help="A prompt; may be repeated.")
@click.option(
    "--preset",
    "--resolution",
    type=PresetName(),
    required=True,
    help="draft, 2k, 4k, 4k-5step, 2k-portrait, 2k-square, 4k-portrait, 4k-square, nano, nano-hd, "
    "nano-portrait, nano-square, or a preset file (.toml).",
)
@set_option
@size_options
@click.option("--out", "--video_dir", type=FOLDER, required=True, help="Output folder.")
@click.option(
    "--seed",
    "--base_seed",
    type=int,
    default=0,
    show_default=True,
    help="Base seed; negative: a random one.",
)
@click.option("--negative", help='Negative prompt; "" is an empty one. [default: the official one]')
@source_options
@lora_option
@lora_highres_option
@click.option(
    "--noise",
    type=FILE,
    help="Safetensors file with draft_noise and highres_noise, kept latents of another machine for "
    "instance, in place of what the seed draws.",
)
@click.option(
    "--codec",
    type=CODECS,
    help="ffv1 is lossless RGB in .mkv; png takes one frame. [default: h264, or png for one frame]",
)
@fragmented_option
@click.option(
    "--drafts",
    type=FOLDER,
    help="Finish the drafts in this folder, which --draft-only --save-latents left there.",
)
@click.option("--overwrite", is_flag=True, help="Replace files of other clips.")
@click.option(
    "--fresh", is_flag=True, help="Make clips again that are finished, or that were begun."
)
@click.option("--spill-dir", type=FOLDER, help="Folder for latents that the output folder refuses.")
@click.option(
    "--wait-for-disk", is_flag=True, help="Wait while the disk is full or away, instead of ending."
)
@click.option("--save-latents", is_flag=True, help="Keep <id>.latents.safetensors at the end.")
@click.option("--draft-only", is_flag=True, help="Stop after the draft; the clip shows it.")
@click.option("--contact-sheet", is_flag=True, help="Also write contact_sheet.png.")
@precision_option
@linear_option
@step_cache_option
@guidance_reuse_option
@click.option(
    "--fast",
    is_flag=True,
    help="The approximations that measurements recommend here, where no option says otherwise "
    "(`pw docs numerics`).",
)
@sparse_attention_option
@vae_precision_option
@gpu_memory_option
@host_memory_option
@device_option
@processes_option
@devices_option
@rank_timeout_option
@click.option(
    "--kernels",
    type=click.Choice(get_args(Kernels)),
    default="auto",
    show_default=True,
    help="Implementation of the operations. auto: on a GPU ours (triton), with the fastest "
    "attention there, measured once; on a CPU the reference.",
)
@click.option(
    "--attention",
    type=click.Choice(get_args(AttentionKernel)),
    help="Implementation of attention alone; all but reference need CUDA and bf16. "
    "[default: as --kernels]",
)
@conv_option
@click.option(
    "--policy",
    type=click.Choice(get_args(EnginePolicy)),
    default="auto",
    show_default=True,
    help="auto: use engines made by `pw build` if there are any; engines: require them for the "
    "transformers; eager: use none.",
)
@blocks_option
@chunk_option
@trace_option
@logging_options
@json_option
@click.option("--quiet", is_flag=True, help="Print only warnings, errors and finished clips.")
@click.option(
    "--ckpt_dir", type=MODEL, help="Official flag: checkpoint folder, converted on first use."
)
@click.option("--lr_ckpt", type=MODEL, help="Official flag: draft checkpoint, with --ckpt_dir.")
@click.option("--hr_ckpt", type=MODEL, help="Official flag: high-res checkpoint, with --ckpt_dir.")
@ulysses_option
@dit_fsdp_option
@t5_fsdp_option
def generate(**options: Any) -> int:
    """Make one clip per prompt: <id>.mp4 and its receipt <id>.json."""
    return make_clips("generate", options, read_request)


def make_clips(
    verb: str,
    options: dict[str, Any],
    read: Callable[[dict[str, Any], Callable[[str], None]], Request],
    then: Callable[[Request, Sequence[Outcome], Reporter], None] | None = None,
) -> int:
    """Make clips, with all that surrounds that on a command line; return the exit code.

    Args:
        verb: of `pw`.
        options: those of `pw generate`.
        read: turns them into a request; its second argument warns the user.
        then: is called with the result, by the process that tells the user of it.

    Raises what ends the program.
    """
    place = place_of_this_process()
    with document_of_refusal(NO_CLIPS, enabled=options["as_json"] and place is None):
        devices = devices_of(options) if place is None else None
    if devices is not None and len(devices) > 1:
        return start_ranks(devices)
    first = place is None or place.rank == 0
    with one_document(NO_CLIPS, enabled=options["as_json"] and first) as document:
        run = _run(options, document, then)
        require_packages(f"`pw {verb}`", "tokenizers")  # used after minutes
        if place is not None:
            return run_as_rank(place, options, partial(_prepared, read, quiet=not first), run)
        require_alone(options)
        request, bundle = _prepared(read, options | ({"device": devices[0]} if devices else {}))
        return run(request, bundle, None)


def _prepared(
    read: Callable[[dict[str, Any], Callable[[str], None]], Request],
    options: dict[str, Any],
    *,
    quiet: bool = False,
) -> tuple[Request, Bundle]:
    """Read the request and open the bundle; a quiet one says nothing about either."""
    from pw_runtime.system.progress import Reporter

    reporter = Reporter(quiet=options["quiet"] or quiet)
    request = read(options, reporter.say if quiet else reporter.warn)
    bundle = with_chosen_loras(open_model(options, reporter), options)
    require_lora_stages(options, request)
    return request, bundle


def _run(
    options: dict[str, Any],
    document: dict[str, Any],
    then: Callable[[Request, Sequence[Outcome], Reporter], None] | None,
) -> Callable[[Request, Bundle, Ranks | None], int]:
    """Return the program of a process that runs alone, or that is the first of several.

    With --json it fills the document.
    """
    from pw_runtime.cli.summary import SummaryReporter, summarised
    from pw_runtime.pipeline import generate
    from pw_runtime.system.progress import Reporter
    from pw_runtime.system.stop import StopRequest

    def run(request: Request, bundle: Bundle, ranks: Ranks | None) -> int:
        reporter = (SummaryReporter if options["as_json"] else Reporter)(quiet=options["quiet"])
        if options["seed"] < 0:
            seed = request.seed
            reporter.say(f"seed {seed} was drawn: --seed {seed} makes this clip again")
        if warning := beyond_training(request, bundle):
            reporter.warn(warning)
        if ranks is not None and options["t5_fsdp"]:
            reporter.say("--t5_fsdp: the text encoder is on rank 0 alone, and gone before the rest")
        drawn = request.seed if options["seed"] < 0 else None

        def made() -> Sequence[Outcome]:
            stop = StopRequest()
            with stopping(stop, reporter, partial(command_again, drawn)):
                outcomes = generate(request, bundle, reporter, ranks, stop=stop)
            if then is not None:
                then(request, outcomes, reporter)
            return outcomes

        make: Callable[[], Sequence[Outcome]] = made
        if isinstance(reporter, SummaryReporter):
            make = summarised(made, request, reporter, document)
        return traced(partial(exit_code, make, reporter), options["trace"], request.device)

    return run
