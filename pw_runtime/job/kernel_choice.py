# SPDX-License-Identifier: Apache-2.0
"""Settle `auto` of --kernels and --attention: on a GPU by a measurement, kept for the next run.

A CPU always runs the references. What was settled is in the options of receipts and latents files,
so a clip can be made again with the same kernels whatever another measurement would find.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import torch
from pydantic import TypeAdapter, ValidationError

from pw_engines.tensorrt.driver import driver_version
from pw_kernels.attention.sparse import HEAD_WIDTHS
from pw_kernels.attention.trials import NO_TIME, Trial, candidates, fastest, measure
from pw_kernels.library import Library, library, source_digest
from pw_runtime.errors import BadRequest
from pw_runtime.system.atomic_files import write_text
from pw_runtime.system.input_files import MAX_JSON, UnreadableInput, read_text
from pw_runtime.system.places import MEASURED, cache_root
from pw_runtime.system.trace import span
from pw_runtime.system.trusted_folder import trusted_folder
from pw_runtime.types import AttentionKernel, DitConfig, Request, RunOptions, StageName

SECONDS: Final = 20.0  # most that a measurement takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The implementations of attention on one GPU at one size, and the one that runs."""

    made_of: dict[str, str]  # what the times depend on
    tokens: int
    heads: int
    width: int
    trials: tuple[Trial, ...]
    choice: AttentionKernel


_MEASURED = TypeAdapter(Measured)
_of_this_process: dict[Path, Measured] = {}  # by the file that they would have if they were kept


def settle_kernels(
    request: Request,
    configs: Mapping[StageName, DitConfig],
    say: Callable[[str], None],
    *,
    measure_here: bool = True,
) -> RunOptions:
    """Return options whose `kernels` and `attention` say what will run, beside engines or without.

    The choice is that of all stages, also where a run makes the draft alone or computes no draft:
    a draft and the clip that another run makes of it are then those of one run.

    Args:
        request: its options have a device and a precision.
        configs: of the transformers of all stages that the preset has, by stage.
        say: reports what was chosen, and why.
        measure_here: False leaves `attention` at "auto" where another rank measures it.

    Raises BadRequest where a kernel that was asked for cannot run.
    """
    options = request.options
    no_kernel = _why_no_sparse_kernel(options, configs)
    if options.kernels == "auto":
        reason = _why_reference(request) or no_kernel
        options = replace(
            options,
            kernels="triton" if reason is None else "reference",
            attention=options.attention_kernel,
        )
        if reason is not None:
            say(f"operations run on PyTorch: {reason}")
    elif options.kernels == "triton" and no_kernel is not None:
        raise BadRequest(
            "--kernels triton cannot run --sparse-attention with this model",
            got=no_kernel,
            do="leave --kernels out, or leave --sparse-attention out",
        )
    if options.attention_kernel != "auto":
        return options
    stages = {stage: request.preset.stages()[stage] for stage in configs}
    exact = options.blocks != "segments" or options.compute_precision != "bf16"
    if exact or not request.computed:
        return replace(options, attention="reference")
    if not measure_here:
        return options
    stage = max(stages, key=lambda name: stages[name].tokens(request.preset.video))
    tokens = stages[stage].tokens(request.preset.video)
    with span("measure attention"):
        measured = measured_attention(request.device, tokens, configs[stage], say)
    say(f"attention runs on {measured.choice}, the fastest measured at {tokens:,} tokens")
    return replace(options, attention=measured.choice)


def measured_attention(
    device: torch.device,
    tokens: int,
    config: DitConfig,
    say: Callable[[str], None],
    *,
    again: bool = False,
) -> Measured:
    """Return the measurement for a GPU and a size: that of an earlier run, or a new one.

    One for which the time was too short is kept for this process alone, and that is said.

    Raises BadRequest, WriteFailed where the cache folder cannot be used.
    """
    made_of = facts(device)
    key = json.dumps([made_of, tokens, config.num_heads, config.head_dim], sort_keys=True)
    name = f"attention-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    path = trusted_folder(cache_root() / MEASURED) / name
    found = read_measured(path) or _of_this_process.get(path)
    if found is not None and not again:
        return found
    say(f"measuring attention at {tokens:,} tokens, once on this GPU: at most {SECONDS:.0f} s")
    heads, width = config.num_heads, config.head_dim
    trials = measure(device, tokens=tokens, heads=heads, width=width, seconds=SECONDS)
    choice = fastest(trials)
    assert choice != "cpu", "it is no implementation of attention"
    measured = Measured(
        made_of=made_of, tokens=tokens, heads=heads, width=width, trials=trials, choice=choice
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the plan counts what is free
    if left_out := [trial.implementation for trial in trials if trial.refused == NO_TIME]:
        say(f"this measurement is not kept: no time was left for {', '.join(left_out)}")
        _of_this_process[path] = measured
        return measured
    write_text(path, _MEASURED.dump_json(measured, indent=2).decode() + "\n")
    return measured


def read_measured(path: Path) -> Measured | None:
    """Return a measurement of an earlier run; None where there is none that can be read."""
    try:
        return _MEASURED.validate_json(read_text(path, MAX_JSON))
    except (UnreadableInput, ValidationError):
        return None  # why silent: it is measured again, which is said


def facts(device: torch.device) -> dict[str, str]:
    """Return what the times of kernels depend on: GPU, driver, libraries, our sources.

    Raises BadRequest where PW_KERNELS_LIBRARY names a file that cannot be used.
    """
    compiled = _library()
    manifest = None if compiled is None else json.dumps(compiled.manifest, sort_keys=True).encode()
    named = {
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "kernels": source_digest()[:16],
        "machine code": "Triton" if manifest is None else hashlib.sha256(manifest).hexdigest()[:16],
        "candidates": " ".join(candidates(device)),
    }
    named |= {package: _version(package) for package in ("triton", "flash-attn", "flash-attn-4")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        named |= {
            "gpu": properties.name,
            "driver": driver_version(),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
        }
    return {name: str(value) for name, value in named.items()}


def _why_reference(request: Request) -> str | None:
    """Return why our kernels do not run; None where they do."""
    if request.device.type != "cuda":
        return "our kernels are for GPUs"
    if request.options.blocks != "segments":
        return "engines of whole blocks have kernels of their own"
    quirks = [name for name, on in asdict(request.preset.compat).items() if on]
    if quirks:
        return f"the preset repeats the official rounding (compat.{', compat.'.join(quirks)})"
    if _library() is not None or importlib.util.find_spec("triton") is not None:
        return None
    return "neither Triton nor a compiled library is installed: pip install triton"


def _why_no_sparse_kernel(
    options: RunOptions, configs: Mapping[StageName, DitConfig]
) -> str | None:
    """Return why sparse attention has no kernel for heads this wide; None where it needs none."""
    highres = configs.get("highres")
    if options.sparse_attention is None or options.compute_precision != "bf16" or highres is None:
        return None
    width = highres.head_dim
    if width in HEAD_WIDTHS:
        return None
    return (
        "sparse attention has kernels for heads of width "
        f"{' or '.join(map(str, HEAD_WIDTHS))}, and those of the high-res network have {width}"
    )


def _library() -> Library | None:
    """Return the compiled library, if there is one. Raises BadRequest for one that is unusable."""
    try:
        return library()
    except RuntimeError as error:
        raise BadRequest(str(error), do="unset it, or rebuild the library") from error


def _version(package: str) -> str | None:
    """Return the version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
