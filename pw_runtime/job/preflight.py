# SPDX-License-Identifier: Apache-2.0
"""Everything that is checked, selected and planned before anything is computed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial

import torch

from pw_kernels.attention.libraries import available
from pw_kernels.launcher import tally
from pw_kernels.library import library, status
from pw_runtime.checkpoint.bundle import Bundle, verify
from pw_runtime.checkpoint.loader import check_networks, require_dit
from pw_runtime.errors import BadRequest
from pw_runtime.execution.decoder_lookup import select_decoder_engines
from pw_runtime.execution.engine_lookup import EngineSet, select_engines
from pw_runtime.execution.engine_report import describe_engines
from pw_runtime.execution.sparse_stage import require_sparse_attention
from pw_runtime.job.clip import start_clip
from pw_runtime.job.conv_choice import computing_as, settle_conv
from pw_runtime.job.existing import settle_existing
from pw_runtime.job.failures import report_on_abort
from pw_runtime.job.follow import common_budget
from pw_runtime.job.kernel_choice import settle_kernels
from pw_runtime.job.latents import SUFFIX
from pw_runtime.job.provenance import require_storable
from pw_runtime.job.run import Run
from pw_runtime.models.quantized_linear import require_quantizable
from pw_runtime.planning.exactness import approximations
from pw_runtime.planning.oom_fallback import plan_run
from pw_runtime.planning.warm_networks import WarmNetworks
from pw_runtime.prompts import check_prompts, check_text
from pw_runtime.sampling.guidance_reuse import require_reusable
from pw_runtime.sampling.noise import load_noise
from pw_runtime.sampling.step_cache import require_cacheable
from pw_runtime.stages.codecs import check_codec
from pw_runtime.system.folder_lock import locked_folder
from pw_runtime.system.progress import Reporter
from pw_runtime.system.ranks import Ranks
from pw_runtime.system.trace import Stopwatch, span
from pw_runtime.types import Network, Precision, Request, RunOptions


def pick_device(name: str) -> torch.device:
    """Return the named device; `auto` is the first CUDA device, or else the CPU.

    Raises BadRequest for a device that is unknown or absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadRequest(
            "unknown device", got=name, wanted="auto, cpu, cuda or cuda:N", do="see `pw doctor`"
        ) from error
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


@contextmanager
def prepare(
    request: Request,
    bundle: Bundle,
    reporter: Reporter,
    ranks: Ranks | None = None,
    warm: WarmNetworks | None = None,
) -> Iterator[Run]:
    """Check a request, select its engines and plan it; yield the run to compute inside the block.

    With `ranks`, this process is the first of several that make each clip together. `warm` has what
    earlier runs of a process that makes them alone kept loaded.

    Raises:
        BadRequest, BadWeights: the request or the bundle cannot work.
    """
    pick_device(request.options.device)
    request = replace(request, options=request.options.resolved())
    check_request(request)
    with locked_folder(request.out):
        run = _planned(request, bundle, reporter, ranks, warm)
        with computing(run.request.options), report_on_abort(run.clips, reporter):
            yield run


def _planned(
    request: Request,
    bundle: Bundle,
    reporter: Reporter,
    ranks: Ranks | None,
    warm: WarmNetworks | None,
) -> Run:
    """Select the engines, plan the run and verify the bundle. Raises BadRequest, BadWeights."""
    options, noise = request.options, {}
    if request.noise is not None:
        noise = load_noise(request.noise, request.stages, request.preset.video)
    with span("check networks"):
        check_networks(bundle, request.stages, options.attention_kernel)
        for stage in request.stages:
            require_quantizable(require_dit(bundle, stage), options.linear)
    tally.clear()
    with span("engines"):
        engines = selected(request, bundle, warm)
    reporter.say(describe_engines(engines, bundle, request.preset, options))
    if approximate := approximations(options):
        reporter.say(f"approximate: {'; '.join(approximate)}")
    request = replace(request, options=settled(request, bundle, engines, reporter.say))
    with span("plan"):
        count, budget = 1, None
        if ranks is not None:
            _require_divisible(options, divide_weights=request.divide_weights)
            count, budget = ranks.size, common_budget(ranks, request)
        fallback = plan_run(
            request, bundle, reporter.say, engines, ranks=count, budget=budget, warm=warm
        )
    tiling = fallback.plan.decode.tiling
    with span("noise"):
        clips = tuple(
            start_clip(request, prompt, noise, bundle, engines, tiling)
            for prompt in request.prompts
        )
    for clip in clips:
        require_storable(clip.provenance)
    settle_existing(clips, request)
    for clip in clips:
        if clip.video is not None:
            reporter.say(f"prompt {clip.prompt.id}: skipped, {clip.video} is finished")
            reporter.finished(clip.video)
    reporter.say(f"checking the files of {bundle.root}")
    if ranks is not None:
        ranks.command("verify")
    with span("check files"):
        verify(bundle)
    loading = Stopwatch(request.device)
    run = Run(request, bundle, clips, reporter, engines, fallback, loading, ranks, warm)
    if noise and len(clips) > 1:
        text = f"every prompt of this run starts from the noise in {request.noise}"
        run.add_notice(clips, "noise", text)
    return run


def _require_divisible(options: RunOptions, *, divide_weights: bool) -> None:
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


def selected(
    request: Request, bundle: Bundle, warm: WarmNetworks | None = None
) -> dict[Network, EngineSet]:
    """Select the engines of all networks, or return those that an earlier run selected."""
    options, preset = request.options, request.preset
    select: dict[Network, Callable[[], EngineSet]] = {
        stage: partial(select_engines, bundle, stage, options, preset) for stage in request.stages
    }
    select["vae"] = partial(select_decoder_engines, bundle, preset, options)
    if warm is None:
        return {network: choose() for network, choose in select.items()}
    made_of = (bundle.digest, options, preset)
    return {network: warm.engines(network, made_of, choose) for network, choose in select.items()}


def settled(
    request: Request,
    bundle: Bundle,
    engines: Mapping[Network, EngineSet],
    say: Callable[[str], None],
) -> RunOptions:
    """Return the request's options with nothing left to choose. Raises BadRequest."""
    with span("CPU kernels"):
        options = settle_conv(request.options, say)
    configs = {stage: require_dit(bundle, stage) for stage in request.stages}
    return settle_kernels(replace(request, options=options), configs, engines, say)


@contextmanager
def computing(options: RunOptions) -> Iterator[None]:
    """Compute without gradients, with the implementations of the operations that were chosen."""
    with torch.inference_mode(), computing_as(options):
        yield


def check_request(request: Request) -> None:
    """Check codec, kernels and the output folder, which is created. Raises BadRequest."""
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
    check_codec(options.codec, fragmented=request.fragmented)
    _check_names(request)
    require_cacheable(request.preset.draft, options.step_cache)
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
    """Create the output folder. Raises BadRequest where that or the spill folder is unusable."""
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(
            f"cannot create the output folder {request.out}",
            got="a file of that name" if request.out.is_file() else error.strerror,
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
    if options.kernels == "triton" and options.policy == "engines":
        raise BadRequest(
            "engines cannot contain the kernels of single operations",
            got="--kernels triton with --policy engines",
            do="leave one of them out; --attention works with engines",
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
