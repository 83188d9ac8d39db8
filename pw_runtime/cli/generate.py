# SPDX-License-Identifier: Apache-2.0
"""`pw generate`: one clip per prompt."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import click

from pw_runtime.cli.fast import fast_options
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
from pw_runtime.cli.options import (
    CODECS,
    FILE,
    FOLDER,
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
    linear_option,
    precision_option,
    sparse_attention_option,
    step_cache_option,
    trace_option,
    traced,
    vae_precision_option,
)
from pw_runtime.cli.trained_size import beyond_training
from pw_runtime.errors import BadRequest
from pw_runtime.system.packages import require_packages
from pw_runtime.system.places import cache_root, check_cache
from pw_runtime.types import (
    OFFICIAL_NEGATIVE,
    AttentionKernel,
    EnginePolicy,
    Existing,
    Kernels,
    Request,
    RunOptions,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from pw_runtime.checkpoint.bundle import Bundle
    from pw_runtime.system.progress import Reporter
    from pw_runtime.system.ranks import Ranks


@click.command()
@click.option("--model", type=FOLDER, help="Bundle made by `pw convert`.")
@click.option(
    "--prompts", "--prompt_file", "prompt_file", type=FILE, help="Prompt file, .txt or .jsonl."
)
@click.option("--prompt", "prompt_texts", multiple=True, help="A prompt; may be repeated.")
@click.option(
    "--preset",
    "--resolution",
    type=PresetName(),
    required=True,
    help="draft, 2k, 4k, 4k-5step, nano, nano-hd, or a preset file (.toml).",
)
@click.option("--out", "--video_dir", type=FOLDER, required=True, help="Output folder.")
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
@click.option("--overwrite", is_flag=True, help="Replace files of an earlier run.")
@click.option(
    "--skip-existing", is_flag=True, help="Skip clips whose receipt describes the same clip."
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
    "(docs/numerics.md).",
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
@click.option("--quiet", is_flag=True, help="Print only warnings, errors and finished clips.")
@click.option(
    "--ckpt_dir", type=FOLDER, help="Official flag: checkpoint folder, converted on first use."
)
@click.option("--lr_ckpt", type=FILE, help="Official flag: draft checkpoint, with --ckpt_dir.")
@click.option("--hr_ckpt", type=FILE, help="Official flag: high-res checkpoint, with --ckpt_dir.")
@ulysses_option
@dit_fsdp_option
@t5_fsdp_option
def generate(**options: Any) -> int:
    """Make one clip per prompt: <id>.mp4 and its receipt <id>.json."""
    place = place_of_this_process()
    devices = devices_of(options) if place is None else None
    if devices is not None and len(devices) > 1:
        return start_ranks(devices)
    run = _run(options)
    require_packages("`pw generate`", "tokenizers")  # used after minutes
    if place is not None:
        return run_as_rank(place, options, partial(_prepared, quiet=place.rank > 0), run)
    require_alone(options)
    request, bundle = _prepared(options | ({"device": devices[0]} if devices else {}))
    return run(request, bundle, None)


def _prepared(options: dict[str, Any], *, quiet: bool = False) -> tuple[Request, Bundle]:
    """Read the request and open the bundle; a quiet one says nothing about either."""
    from pw_runtime.system.progress import Reporter

    reporter = Reporter(quiet=options["quiet"] or quiet)
    request = read_request(options, reporter.say if quiet else reporter.warn)
    return request, open_model(options, reporter)


def _run(options: dict[str, Any]) -> Callable[[Request, Bundle, Ranks | None], int]:
    """Return the program of a process that runs alone, or that is the first of several."""
    from pw_runtime.pipeline import generate
    from pw_runtime.system.progress import Reporter

    def run(request: Request, bundle: Bundle, ranks: Ranks | None) -> int:
        reporter = Reporter(quiet=options["quiet"])
        if options["seed"] < 0:
            seed = request.seed
            reporter.say(f"seed {seed} was drawn: --seed {seed} makes this clip again")
        if warning := beyond_training(request, bundle):
            reporter.warn(warning)
        if ranks is not None and options["t5_fsdp"]:
            reporter.say("--t5_fsdp: the text encoder is on rank 0 alone, and gone before the rest")
        made = partial(generate, request, bundle, reporter, ranks)
        return traced(partial(exit_code, made, reporter), options["trace"], request.device)

    return run


def read_request(
    options: dict[str, Any], warn: Callable[[str], None], device: torch.device | None = None
) -> Request:
    """Turn the options of `pw generate` into a Request.

    With `device`, which may be absent here, the run is for that one instead of --device.

    Raises BadRequest.
    """
    from pw_runtime.job.preflight import default_precision, pick_device
    from pw_runtime.presets import find_preset
    from pw_runtime.prompts import make_prompts, read_prompts
    from pw_runtime.sampling.noise import resolve_base_seed

    texts: tuple[str, ...] = options["prompt_texts"]
    if (options["prompt_file"] is None) == (not texts):
        raise BadRequest(
            "there are prompts on the command line and in a file"
            if texts
            else "there is no prompt",
            do="give one of --prompts FILE and --prompt TEXT, which may be repeated",
        )
    if any(not text.strip() for text in texts):
        raise BadRequest("--prompt is empty", do="describe what the clip should show")
    prompts = (
        make_prompts([(str(i), text.strip()) for i, text in enumerate(texts)])
        if texts
        else read_prompts(options["prompt_file"], warn)
    )
    if options["overwrite"] and options["skip_existing"]:
        raise BadRequest(
            "--overwrite and --skip-existing contradict each other", do="leave one of them out"
        )
    existing: Existing = "refuse"
    if options["overwrite"] or options["skip_existing"]:
        existing = "overwrite" if options["overwrite"] else "skip"
    device, preset = device or pick_device(options["device"]), find_preset(options["preset"])
    if options["fast"]:
        options = options | fast_options(options, preset, device)
    precision = default_precision(options["precision"], device)
    resolved = options | {"device": str(device), "precision": precision}
    return Request(
        prompts=prompts,
        preset=preset,
        out=options["out"],
        negative=OFFICIAL_NEGATIVE if options["negative"] is None else options["negative"],
        seed=resolve_base_seed(options["seed"]),
        noise=options["noise"],
        options=RunOptions(**{field.name: resolved[field.name] for field in fields(RunOptions)}),
        existing=existing,
        spill=options["spill_dir"],
        wait_for_disk=options["wait_for_disk"],
        fragmented=options["fragmented"],
        contact_sheet=options["contact_sheet"],
        divide_weights=options["dit_fsdp"],
        sequence=options["ulysses_size"],
        gpu_memory=options["gpu_memory"],
        host_memory=options["host_memory"],
    )


def open_model(options: dict[str, Any], reporter: Reporter) -> Bundle:
    """Open the bundle of --model, or the one converted for the official flags.

    Raises BadRequest, BadWeights.
    """
    from pw_runtime.checkpoint.bundle import open_bundle

    model, checkpoint = options["model"], options["ckpt_dir"]
    draft, highres = options["lr_ckpt"], options["hr_ckpt"]
    if (model is None) == (checkpoint is None):
        raise BadRequest(
            "no model is named" if model is None else "--model and --ckpt_dir both name a model",
            do="give --model BUNDLE, a folder made by `pw convert`, or else --ckpt_dir CHECKPOINT",
        )
    if model is None:
        from pw_export.bundle_cache import cached_bundle

        check_cache(cache_root() / "bundles")
        model = cached_bundle(wan=checkpoint, draft=draft, highres=highres, say=reporter.say)
    elif draft or highres:
        raise BadRequest(
            "--lr_ckpt and --hr_ckpt belong to --ckpt_dir: a bundle has its weights already",
            do="leave --lr_ckpt and --hr_ckpt out, or give --ckpt_dir instead of --model",
        )
    return open_bundle(model)
