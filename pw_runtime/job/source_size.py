# SPDX-License-Identifier: Apache-2.0
"""The size of a clip that suits the pictures and videos which its prompts start from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pw_runtime.errors import BadRequest
from pw_runtime.sizes import Size, best_size
from pw_runtime.system.frame_pixels import read_look, read_turn
from pw_runtime.system.picture_input import picture_size
from pw_runtime.system.video_input import opened
from pw_runtime.types import Preset, Prompt

_SHOWN: Final = 8  # files that an error names


def size_of_sources(preset: Preset, prompts: Sequence[Prompt]) -> Size:
    """Return the one size, of the preset's area, that suits every source by the official rule.

    Prompts without a picture or a video take the size of the others.

    Raises BadRequest where no prompt has any, a file cannot be read, or the sizes differ.
    """
    stage = preset.highres or preset.draft
    area = stage.width * stage.height
    found: dict[Path, Size] = {}
    for prompt in prompts:
        for kind, path in prompt.sources.items():
            if path not in found:
                shown = picture_size(path) if kind == "image" else _video_size(path)
                found[path] = best_size(*shown, area)
    if not found:
        raise BadRequest(
            "--size picture needs a picture or a video, and no prompt has one",
            do="add --image or --draft-video, or name the size: --size 1440x2560 for instance",
        )
    sizes = dict.fromkeys(found.values())
    if len(sizes) > 1:
        listed = [f"{path} {w}x{h}" for path, (w, h) in found.items()]
        more = [f"and {len(listed) - _SHOWN} more"] * (len(listed) > _SHOWN)
        raise BadRequest(
            "the pictures of this run suit clips of different sizes, and a run has one",
            got=", ".join(listed[:_SHOWN] + more),
            do="make a run for each size, or name one size for all: --size WxH",
        )
    return next(iter(sizes))


def _video_size(path: Path) -> Size:
    """Return the size in which a video's first frame is shown. Raises BadRequest."""
    with opened(path, "give a complete video file") as container:
        frame = next(container.decode(video=0), None)
        if frame is None:
            raise BadRequest(f"{path} is not a video", got="a file without pictures")
        turn = read_turn(frame, path)
        look = read_look(frame, container.streams.video[0].sample_aspect_ratio, turn, path)
    width, height = round(look.width * look.aspect), look.height
    return (height, width) if look.sideways else (width, height)
