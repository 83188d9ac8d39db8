# SPDX-License-Identifier: Apache-2.0
"""Names that the command line offers. Nothing heavy is imported here: `pw --help` reads it."""

from __future__ import annotations

from typing import Final, Literal

ProgramName = Literal[
    "ours",
    "ours-engines",
    "ours-reference",
    "ours-cudnn",
    "ours-triton",
    "ours-fast",
    "ours-sparse",
    "official",
    "diffusers",
    "diffusers-compiled",
]
OURS: Final = "ours"  # also the prefix of every program that is this runtime
ENGINES: Final = "ours-engines"
FAST: Final = "ours-fast"
SPARSE: Final = "ours-sparse"

SyntheticSize = Literal["nano", "medium", "large", "5b"]
CaseSize = Literal["tiny", "draft", "2k", "4k"]
