# SPDX-License-Identifier: Apache-2.0
"""The options of `pw generate` -> the request and the bundle of a run."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pw_runtime.cli.fast import fast_options
from pw_runtime.cli.sizes import preset_of
from pw_runtime.errors import BadRequest
from pw_runtime.types import OFFICIAL_NEGATIVE, Request, RunOptions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from pw_runtime.checkpoint.bundle import Bundle
    from pw_runtime.system.progress import Reporter
    from pw_runtime.types import Preset, Prompt


def read_request(
    options: dict[str, Any],
    warn: Callable[[str], None],
    device: torch.device | None = None,
    prompts: tuple[Prompt, ...] = (),
) -> Request:
    """Turn the options of `pw generate` into a Request.

    With `device`, which may be absent here, the run is for that one instead of --device; `prompts`
    are in place of those of --prompts or --prompt.

    Raises BadRequest.
    """
    from pw_runtime.job.checks import pick_device
    from pw_runtime.job.source_size import size_of_sources
    from pw_runtime.job.sources import started_from
    from pw_runtime.planning.workload import computed_draft

    prompts = prompts or _prompts(options, warn)
    prompts = started_from(prompts, image=options["image"], draft_video=options["draft_video"])
    device = device or pick_device(options["device"])
    preset = preset_of(options, partial(size_of_sources, prompts=prompts))
    if options["fast"]:
        draft = computed_draft(preset.draft, prompts, options["draft_strength"])
        options = options | fast_options(options, replace(preset, draft=draft), device)
    return request_of(options, prompts, preset, device)


def request_of(
    options: dict[str, Any], prompts: tuple[Prompt, ...], preset: Preset, device: torch.device
) -> Request:
    """Return the request of the options of `pw generate`, --fast expanded. Raises BadRequest."""
    from pw_runtime.job.checks import default_precision
    from pw_runtime.sampling.noise import resolve_base_seed

    precision = default_precision(options["precision"], device)
    codec = options["codec"] or preset.video.usual_codec
    resolved = options | {"device": str(device), "precision": precision, "codec": codec}
    return Request(
        prompts=prompts,
        preset=preset,
        out=options["out"],
        negative=OFFICIAL_NEGATIVE if options["negative"] is None else options["negative"],
        seed=resolve_base_seed(options["seed"]),
        noise=options["noise"],
        options=RunOptions(**{field.name: resolved[field.name] for field in fields(RunOptions)}),
        drafts=options["drafts"],
        overwrite=options["overwrite"],
        fresh=options["fresh"],
        spill=options["spill_dir"],
        wait_for_disk=options["wait_for_disk"],
        fragmented=options["fragmented"],
        contact_sheet=options["contact_sheet"],
        divide_weights=options["dit_fsdp"],
        sequence=options["ulysses_size"],
        gpu_memory=options["gpu_memory"],
        host_memory=options["host_memory"],
    )


def _prompts(options: dict[str, Any], warn: Callable[[str], None]) -> tuple[Prompt, ...]:
    """Read the prompts of --prompts or --prompt. Raises BadRequest."""
    from pw_runtime.prompts import make_prompts, read_prompts

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
    if texts:
        return make_prompts([(str(i), text.strip()) for i, text in enumerate(texts)])
    return read_prompts(options["prompt_file"], warn)


def open_model(options: dict[str, Any], reporter: Reporter) -> Bundle:
    """Open the bundle of --model, or the one converted for the official flags.

    Raises BadRequest, BadWeights.
    """
    from pw_runtime.checkpoint.bundle import open_bundle

    model, checkpoint = options["model"], options["ckpt_dir"]
    draft, highres = options["lr_ckpt"], options["hr_ckpt"]
    if model is not None and checkpoint is None and _is_cached_checkpoint(model):
        model, checkpoint = None, model
    if (model is None) == (checkpoint is None):
        raise BadRequest(
            "no model is named" if model is None else "--model and --ckpt_dir both name a model",
            do="give --model BUNDLE, a folder made by `pw convert`, or else --ckpt_dir CHECKPOINT",
        )
    if model is None:
        from pw_export.bundle_cache import cached_bundle

        model = cached_bundle(wan=checkpoint, draft=draft, highres=highres, say=reporter.say)
    elif draft or highres:
        raise BadRequest(
            "--lr_ckpt and --hr_ckpt belong to --ckpt_dir: a bundle has its weights already",
            do="leave --lr_ckpt and --hr_ckpt out, or give --ckpt_dir instead of --model",
        )
    return open_bundle(model)


def _is_cached_checkpoint(model: Path) -> bool:
    """Tell whether a model is in the hub's cache, and as a published checkpoint, not a bundle."""
    from pw_runtime.checkpoint.bundle import MANIFEST
    from pw_runtime.system.hub_cache import in_hub_cache

    return in_hub_cache(model) and not (model / MANIFEST).exists()


def require_lora_stages(options: dict[str, Any], request: Request) -> None:
    """Raise BadRequest for --lora-highres in a run without that stage."""
    if options["loras_highres"] and "highres" not in request.stages:
        raise BadRequest(
            "--lora-highres is for the high-res stage, and this run has none",
            got="--draft-only" if options["draft_only"] else "a preset with a draft alone",
            do="leave --lora-highres out",
        )
