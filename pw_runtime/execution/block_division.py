# SPDX-License-Identifier: Apache-2.0
"""Rules for engines that have the self-attention of a block inside (`--blocks`)."""

from __future__ import annotations

from pw_engines.tensorrt import rtx
from pw_runtime.errors import BadRequest
from pw_runtime.types import Blocks, LinearFormat, Precision, RunOptions


def require_attention_precision(blocks: Blocks, precision: Precision) -> None:
    """Raise BadRequest for a precision that a division of the block has no kernel for."""
    if blocks != "segments" and precision != "bf16":
        raise BadRequest(
            f"--blocks {blocks} computes attention inside engines, where bf16 alone has kernels",
            got=f"--precision {precision}",
            do="add --precision bf16, or leave --blocks out",
        )


def require_exact_attention(blocks: Blocks, linear: LinearFormat) -> None:
    """Raise BadRequest where quantized linear layers would be in engines with attention."""
    if blocks != "segments" and linear != "exact":
        raise BadRequest(
            f"--blocks {blocks} has no engines with quantized linear layers yet",
            got=f"--linear {linear}",
            do="leave one of them out",
        )


def require_attention_engines(options: RunOptions) -> None:
    """Raise BadRequest where engines with attention inside cannot run as these options say."""
    option = f"--blocks {options.blocks}"
    require_attention_precision(options.blocks, options.compute_precision)
    if reason := rtx.cannot_run(options.torch_device):
        raise BadRequest(
            f"{option} is for engines of TensorRT for RTX, which cannot run here",
            got=reason,
            do="leave --blocks out",
        )
    others = {
        "--policy eager": options.policy == "eager",
        f"--kernels {options.kernels}": options.kernels not in ("auto", "reference"),
        f"--attention {options.attention}": options.attention not in (None, "auto", "reference"),
    }
    if contradicting := [name for name, given in others.items() if given]:
        raise BadRequest(
            f"{option} runs attention and the rest of a block on engines",
            got=" ".join(contradicting),
            do=f"leave {option} out, or the other option",
        )
