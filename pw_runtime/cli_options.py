# SPDX-License-Identifier: Apache-2.0
"""What the verbs of the command line share: exit codes, kinds of paths, a default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

CHUNK = 8192  # as in pw_runtime.types, which needs torch
DONE, BAD_INPUT, SOME_FAILED, INTERRUPTED = 0, 2, 3, 130


class NonEmptyPath(click.Path):
    """A path; the empty one, which would mean the current folder, is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Turn the text of an option into a Path."""
        if value == "":
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


FOLDER = NonEmptyPath(path_type=Path)
FILE = NonEmptyPath(path_type=Path)
