# SPDX-License-Identifier: Apache-2.0
"""Rules for block-sparse self-attention (`--sparse-attention`): the stage that has it, and when."""

from __future__ import annotations

from dataclasses import asdict

from pw_kernels.attention.sparse import kept_of
from pw_kernels.attention.sparse_variants import BLOCK, blocks_of
from pw_runtime.errors import BadRequest
from pw_runtime.types import Preset, RunOptions, StageName


def kept_fraction(options: RunOptions, stage: StageName) -> float | None:
    """Return the fraction of blocks that self-attention of a stage keeps; None: it is exact.

    The draft has a few thousand tokens, where there is nothing to gain.
    """
    return options.sparse_attention if stage == "highres" else None


def sparse_approximation(keep: float, tokens: int) -> str:
    """Describe what is approximate, for receipts and messages."""
    blocks, kept = blocks_of(tokens), kept_of(tokens, keep)
    if kept == blocks:
        return f"sparse attention keeps all {blocks} blocks of {BLOCK} keys: nothing is dropped"
    return (
        f"approximate: self-attention keeps {kept} of {blocks} blocks of {BLOCK} keys, "
        "and the means of the others"
    )


def require_sparse_attention(options: RunOptions, preset: Preset) -> None:
    """Raise BadRequest for sparse attention that cannot be, or that nothing would have."""
    keep = options.sparse_attention
    if keep is None:
        return
    if not 0 < keep < 1:
        raise BadRequest(
            "--sparse-attention is the fraction of the keys that are kept",
            got=keep,
            wanted="a number between 0 and 1, 0.5 for instance",
            do="mend it, or leave --sparse-attention out: attention is then exact",
        )
    if "highres" not in preset.stages(draft_only=options.draft_only):
        raise BadRequest(
            "--sparse-attention is for the high-res stage, and this run has none",
            got="--draft-only" if options.draft_only else "a preset with a draft alone",
            do="leave --sparse-attention out",
        )
    if options.blocks != "segments":
        raise BadRequest(
            f"--blocks {options.blocks} computes exact attention inside engines",
            got=f"--sparse-attention {keep}",
            do="leave one of them out",
        )
    if quirks := [name for name, on in asdict(preset.compat).items() if on]:
        raise BadRequest(
            "--sparse-attention approximates, and the preset repeats the official rounding",
            got=f"compat.{', compat.'.join(quirks)}",
            do="leave --sparse-attention out, or choose a preset without them",
        )
