# SPDX-License-Identifier: Apache-2.0
"""What can be refused is refused before anything is computed."""

from __future__ import annotations

import importlib.util
import os

import torch

from pw_kernels.attention.libraries import available
from pw_kernels.library import library, status
from pw_runtime.errors import BadRequest
from pw_runtime.job.latents import SUFFIX
from pw_runtime.stages.codecs import check_codec
from pw_runtime.types import Precision, Request


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU. Raises BadRequest."""
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


def default_precision(wanted: Precision | None, device: torch.device) -> Precision:
    """That of --precision, else what fits the device."""
    return wanted or ("fp32" if device.type == "cpu" else "bf16")


def check_request(request: Request) -> None:
    """Check codec, kernels and the output folder, which is made. Raises BadRequest."""
    check_codec(request.codec, fragmented=request.fragmented)
    _check_names(request)
    if (request.kernels, request.attention_kernel) != ("reference", "reference"):
        _check_kernels(request)
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(
            f"cannot make the output folder {request.out}",
            got=error.strerror,
            do="choose another --out",
        ) from error
    if not os.access(request.out, os.W_OK | os.X_OK):
        raise BadRequest(
            f"cannot write into {request.out}",
            got="no permission",
            do="choose another --out",
        )


def _check_names(request: Request) -> None:
    """Raise BadRequest where one file of the run would take the place of another, or of --noise."""
    ids = {prompt.id for prompt in request.prompts}
    for one in sorted(ids):
        if request.fragmented and f"{one}.partial" in ids:
            raise BadRequest(
                f"with --fragmented the clip {one} grows under the name of the clip {one}.partial",
                do="change one of the two ids",
            )
        if request.noise and request.noise.absolute() == (request.out / (one + SUFFIX)).absolute():
            raise BadRequest(
                f"the run would replace its noise file {request.noise} by latents of its own",
                do="choose another --out, or give a copy of the file to --noise",
            )


def _check_kernels(request: Request) -> None:
    """Raise BadRequest where kernels are asked for that could not run."""
    attention = request.attention_kernel
    if request.device.type != "cuda":
        raise BadRequest(
            "kernels other than the reference need a CUDA device",
            got=f"device {request.device}",
            do="leave --kernels and --attention out: the reference runs everywhere",
        )
    if attention != "reference" and request.precision != "bf16":
        raise BadRequest(
            f"attention as {attention} computes in bf16",
            got=f"precision {request.precision}",
            do="add --precision bf16, or --attention reference",
        )
    if request.kernels == "triton" and request.preset.compat.bf16_einsum:
        raise BadRequest(
            "the kernel of the solver's step does not round as compat.bf16_einsum asks",
            got="--kernels triton with a preset that sets it",
            do="leave --kernels out; --attention alone may stay",
        )
    if request.kernels == "triton" and request.policy == "engines":
        raise BadRequest(
            "engines do not take our kernels of single operations",
            got="--kernels triton with --policy engines",
            do="leave one of them out; --attention goes with engines",
        )
    if not available(attention):
        raise BadRequest(
            f"{attention} is not installed", do=f"pip install {attention}, or choose another one"
        )
    if not {request.kernels, attention} & {"triton", "gluon"}:
        return
    try:
        compiled = library()
    except RuntimeError as error:
        raise BadRequest(str(error), do="unset it, or build the library again") from error
    if compiled is None and importlib.util.find_spec("triton") is None:
        raise BadRequest(
            "there is neither a compiled library of kernels nor Triton",
            got=status(),
            do="pip install 'pixelwizard-runtime[cuda]', or leave --kernels out",
        )
