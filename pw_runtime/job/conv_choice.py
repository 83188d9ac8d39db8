# SPDX-License-Identifier: Apache-2.0
"""Choose the decoder's convolutions on a CPU: decided by what the machine has, never by a clock.

A choice that was measured would make the bits of a clip depend on what else the machine did then.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

from pw_kernels.cpu_library import CPU_OPERATIONS
from pw_kernels.op import Implementation, using
from pw_runtime.errors import BadRequest
from pw_runtime.system.cpu_kernels import open_cpu_kernels
from pw_runtime.types import RunOptions


def computing_as(options: RunOptions) -> AbstractContextManager[None]:
    """Run a block with the implementations of the operations that settled options name."""
    assert options.kernels != "auto", "it was not settled"
    return using(options.kernels, **implementations(options))


def implementations(options: RunOptions) -> dict[str, Implementation]:
    """Return the implementations of single operations that options name, by operation."""
    attention = options.attention_kernel
    assert attention != "auto", "it was not settled"
    chosen: dict[str, Implementation] = {"attention": attention}
    if attention in ("triton", "gluon"):  # ours has a sparse kernel
        chosen["sparse_attention"] = "triton"
    elif options.kernels == "triton" and options.compute_precision != "bf16":  # which ours takes
        chosen["sparse_attention"] = "reference"
    if options.conv == "winograd":
        chosen |= dict.fromkeys(CPU_OPERATIONS, "cpu")
    return chosen


def settle_conv(options: RunOptions, say: Callable[[str], None]) -> RunOptions:
    """Return options whose `conv` says what will run: "auto" remains on a GPU alone.

    Raises BadRequest where what was asked for cannot run.
    """
    reason: str | None = None
    if options.torch_device.type != "cpu":
        if options.conv == "auto":
            return options
        raise BadRequest(
            f"--conv {options.conv} is for the decoder on a CPU",
            got=f"device {options.device}",
            do="leave --conv out, or add --device cpu",
        )
    if options.conv == "onednn":
        return options
    if options.vae_precision != "fp32":
        reason = f"it computes in fp32, and --vae-precision is {options.vae_precision}"
    else:
        reason = open_cpu_kernels(say)
    if reason is None:
        return replace(options, conv="winograd")
    if options.conv == "winograd":
        raise BadRequest(
            "the convolutions --conv winograd cannot run here",
            got=reason,
            do="mend that, or pass --conv onednn: frames then differ by rounding",
        )
    say(f"convolutions run on oneDNN, without our C++: {reason}")
    return replace(options, conv="onednn")
