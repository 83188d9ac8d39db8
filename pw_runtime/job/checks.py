# SPDX-License-Identifier: Apache-2.0
"""Requests that cannot work, refused before anything is computed."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import asdict

import torch

from pw_kernels.attention.libraries import available
from pw_kernels.library import library, status
from pw_runtime.errors import BadRequest, WriteFailed
from pw_runtime.execution.sparse_stage import require_sparse_attention
from pw_runtime.job.contact_sheet import SHEET
from pw_runtime.job.latents import SUFFIX
from pw_runtime.job.sources import require_usable_sources
from pw_runtime.planning.workload import computed_draft
from pw_runtime.prompts import check_prompts, check_text
from pw_runtime.sampling.guidance_reuse import require_reusable
from pw_runtime.sampling.step_cache import require_cacheable
from pw_runtime.stages.codecs import check_codec, check_limits
from pw_runtime.system.folder_lock import FULL
from pw_runtime.types import Precision, Request, RunOptions


def pick_device(name: str) -> torch.device:
    """Return the named device; `auto` is the first CUDA device, or else the CPU.

    Raises BadRequest for a device that is unknown or absent.
    """
    name = str(name)  # of a torch.device, too
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadRequest(
            "unknown device", got=name, wanted="auto, cpu, cuda or cuda:N", do="see `pw doctor`"
        ) from error
    if str(device) != name or name.startswith("cpu:"):  # torch wraps large numbers around
        raise BadRequest(
            "unknown device", got=name, wanted="auto, cpu, cuda or cuda:N", do="see `pw doctor`"
        )
    if device.type not in ("cpu", "cuda"):
        raise BadRequest(
            "unsupported device", got=name, wanted="auto, cpu, cuda or cuda:N", do="see `pw doctor`"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadRequest(
            f"there is no device {name}",
            got=f"{torch.cuda.device_count()} CUDA devices",
            do="use --device cpu, or see `pw doctor`",
        )
    return device


def default_precision(requested: Precision | None, device: torch.device) -> Precision:
    """Return the requested precision, or else the device's default."""
    return RunOptions(precision=requested, device=str(device)).compute_precision


def check_request(request: Request) -> None:
    """Check codec, kernels and the output folder, which is created.

    Raises BadRequest; WriteFailed where the disk takes no further file.
    """
    check_content(request)
    options = request.options
    if not {options.kernels, options.attention_kernel} <= {"auto", "reference"}:
        _check_kernels(request)
    make_output_folder(request)


def check_content(request: Request) -> None:
    """Check what can be checked on any machine: texts, names, codec. Raises BadRequest."""
    options = request.options
    check_prompts(request.prompts)
    check_text("the negative prompt", request.negative)
    frames = request.preset.video.frames
    check_codec(options.codec, frames=frames, fragmented=request.fragmented)
    if not request.in_memory:
        last = [*request.stages.values()][-1]
        fps = request.preset.video.fps
        check_limits(options.codec, width=last.width, height=last.height, fps=fps)
    if request.drafts is not None and "highres" not in request.stages:
        raise BadRequest(
            "--drafts names drafts to finish, and this run has no high-res stage",
            do="leave --draft-only out, choose a preset that has one, or leave --drafts out",
        )
    _check_names(request)
    require_usable_sources(request)
    draft = request.preset.draft
    if not request.partial:
        draft = computed_draft(draft, request.prompts, options.draft_strength)
    require_cacheable(draft, options.step_cache)
    require_reusable(request.stages.get("highres"), options.guidance_reuse)
    quirks = [name for name, on in asdict(request.preset.compat).items() if on]
    require_sparse_attention(options, request.preset)
    for flag, on in (
        (f"--linear {options.linear}", options.linear != "exact"),
        (f"--step-cache {options.step_cache}", options.step_cache is not None),
        (f"--guidance-reuse {options.guidance_reuse}", options.guidance_reuse > 0),
    ):
        if on and quirks:
            raise BadRequest(
                f"{flag} approximates, and the preset repeats the official rounding",
                got=f"compat.{', compat.'.join(quirks)}",
                do=f"leave {flag.split()[0]} out, or choose a preset without them",
            )


def make_output_folder(request: Request) -> None:
    """Create the output folder.

    Raises:
        BadRequest: that or the spill folder is unusable.
        WriteFailed: the disk takes no further file.
    """
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        kind = WriteFailed if error.errno in FULL else BadRequest
        raise kind(
            f"cannot create the output folder {request.out}",
            got="a file of that name" if os.path.isfile(request.out) else error.strerror,
            do="choose another --out",
        ) from error
    for folder in filter(None, (request.out, request.spill)):
        if not folder.is_dir():
            raise BadRequest(
                f"cannot write into {folder}",
                got="no folder, but a file" if folder.exists() else "no such folder",
                do="create it, or choose another folder",
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise BadRequest(
                f"cannot write into {folder}", got="no permission", do="choose another folder"
            )


def _check_names(request: Request) -> None:
    """Raise BadRequest where one file of the run would replace another, or the noise file."""
    ids = {prompt.id for prompt in request.prompts}
    for prompt_id in sorted(ids):
        if request.fragmented and f"{prompt_id}.partial" in ids:
            raise BadRequest(
                f"with --fragmented, the partial video of prompt {prompt_id} has the name of the "
                f"clip {prompt_id}.partial",
                do="change one of the two ids",
            )
        if request.contact_sheet and request.options.codec == "png" and f"{prompt_id}.png" == SHEET:
            raise BadRequest(
                f"the contact sheet has the name of the clip {prompt_id}", do="change its id"
            )
        latents = request.out / (prompt_id + SUFFIX)
        if request.noise and request.noise.resolve() == latents.resolve():
            raise BadRequest(
                f"the run would replace its noise file {request.noise} with latents of its own",
                do="choose another --out, or give --noise a copy of the file",
            )


def _check_kernels(request: Request) -> None:
    """Raise BadRequest for kernels that could not run."""
    options = request.options
    attention = options.attention_kernel
    if request.device.type != "cuda":
        raise BadRequest(
            "kernels other than the reference need a CUDA device",
            got=f"device {request.device}",
            do="leave --kernels and --attention out: the reference runs everywhere",
        )
    if attention not in ("auto", "reference") and options.compute_precision != "bf16":
        raise BadRequest(
            f"attention as {attention} computes in bf16",
            got=f"precision {options.compute_precision}",
            do="add --precision bf16, or --attention reference",
        )
    if options.kernels == "triton" and request.preset.compat.bf16_einsum:
        raise BadRequest(
            "the solver's kernel does not round as compat.bf16_einsum demands",
            got="--kernels triton with a preset that sets it",
            do="leave --kernels out; --attention alone may stay",
        )
    if attention != "auto" and not available(attention):
        raise BadRequest(
            f"{attention} is not installed", do=f"pip install {attention}, or choose another one"
        )
    if not {options.kernels, attention} & {"triton", "gluon"}:
        return
    try:
        compiled = library()
    except RuntimeError as error:
        raise BadRequest(str(error), do="unset it, or rebuild the library") from error
    if compiled is None and importlib.util.find_spec("triton") is None:
        raise BadRequest(
            "neither a compiled kernel library nor Triton is installed",
            got=status(),
            do="pip install 'pixelwizard-runtime[cuda]', or leave --kernels out",
        )


def require_divisible(options: RunOptions, *, divide_weights: bool) -> None:
    """Raise BadRequest for options that several ranks cannot share."""
    if options.blocks != "segments":
        raise BadRequest(
            f"--blocks {options.blocks} has attention inside its engines, where it is not divided",
            do="leave --blocks out, or make the clip on one device",
        )
    if options.guidance_reuse:
        raise BadRequest(
            "--guidance-reuse leaves out passes, which several ranks may have divided among them",
            got=f"--guidance-reuse {options.guidance_reuse}",
            do="leave it out, or make the clip on one device",
        )
    if divide_weights and options.linear != "exact":
        raise BadRequest(
            "--dit_fsdp divides weights as the bundle has them",
            got=f"--linear {options.linear}",
            do="leave one of them out",
        )
