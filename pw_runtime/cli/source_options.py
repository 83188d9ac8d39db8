# SPDX-License-Identifier: Apache-2.0
"""--image, --draft-video, and what belongs to them: clips that start from a picture or a video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from pw_runtime.cli.options import FILE

Command = TypeVar("Command", bound=Callable[..., Any] | click.Command)

_OPTIONS: Final = (
    click.option("--image", type=FILE, help="Picture that is the first frame of every clip."),
    click.option(
        "--image-highres",
        is_flag=True,
        help="Fix the first frame in the high-res stage, too: its network was not trained for "
        "that.",
    ),
    click.option("--draft-video", type=FILE, help="Video that takes the place of the draft."),
    click.option(
        "--draft-strength",
        type=float,
        default=0.0,
        show_default=True,
        help="Noise level, 0 to 1, at which the draft begins with --draft-video; at 0 the video is "
        "the draft, at 1 nothing of it is left.",
    ),
)


def source_options(command: Command) -> Command:
    """Add the options to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
