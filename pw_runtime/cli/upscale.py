# SPDX-License-Identifier: Apache-2.0
"""`pw upscale`: `pw generate --draft-video` for files that are there, named after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import click

from pw_runtime.cli.generate import generate, make_clips
from pw_runtime.cli.options import FILE
from pw_runtime.cli.request import read_request
from pw_runtime.errors import BadRequest

if TYPE_CHECKING:
    from pathlib import Path

    from pw_runtime.types import Prompt, Request

# Options of `pw generate` that have no meaning here, as they are where they are not given.
_LEFT_OUT: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "prompt_file": None,
        "image": None,
        "image_highres": False,
        "draft_video": None,
        "drafts": None,
        "draft_only": False,
    }
)


def _upscale(clips: tuple[Path, ...], prompt_texts: tuple[str, ...], **options: Any) -> int:
    """Paint each CLIP anew at the preset's size: <name>.mp4 and its receipt <name>.json.

    The clip takes the place of the draft. --prompt says what it shows; one is for all clips, or
    there is one for each, in their order.
    """

    def read(options: dict[str, Any], warn: Callable[[str], None]) -> Request:
        return read_request(options, warn, prompts=_prompts(clips, prompt_texts))

    return make_clips("upscale", {**options, **_LEFT_OUT}, read)


def _prompts(clips: tuple[Path, ...], texts: tuple[str, ...]) -> tuple[Prompt, ...]:
    """Return a prompt for each clip, with the name of its file. Raises BadRequest."""
    from dataclasses import replace

    from pw_runtime.prompts import make_prompts

    if not texts or any(not text.strip() for text in texts):
        raise BadRequest(
            "no --prompt says what the clips show, by which the network paints them",
            do='add for instance --prompt "A dog runs along a beach at sunset."',
        )
    if len(texts) not in (1, len(clips)):
        raise BadRequest(
            "there must be one --prompt for all clips, or one for each",
            got=f"{len(texts)} for {len(clips)} clips",
        )
    names = [clip.stem for clip in clips]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadRequest(
            "the new clips have the names of the files, and several have the same",
            got=", ".join(twice),
            do="run `pw upscale` for each, with an --out of its own",
        )
    each = texts if len(texts) == len(clips) else texts * len(clips)
    made = make_prompts([(name, text.strip()) for name, text in zip(names, each, strict=True)])
    return tuple(replace(p, draft_video=clip) for p, clip in zip(made, clips, strict=True))


upscale: Final = click.Command(
    "upscale",
    callback=_upscale,
    help=_upscale.__doc__,
    params=[
        click.Argument(["clips"], type=FILE, nargs=-1, required=True),
        *(param for param in generate.params if param.name not in _LEFT_OUT),
    ],
)
