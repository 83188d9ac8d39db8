# SPDX-License-Identifier: Apache-2.0
"""Exit codes of `pw`, which are those of every verb (docs/exit_codes.md)."""

from __future__ import annotations

from pw_runtime.errors import RankFailed, WriteFailed

DONE, BAD_INPUT, SOME_FAILED, INTERRUPTED = 0, 2, 3, 130


def exit_code_of(error: Exception) -> int:
    """Return the exit code of an error that is meant for the user."""
    return SOME_FAILED if isinstance(error, WriteFailed | RankFailed) else BAD_INPUT
