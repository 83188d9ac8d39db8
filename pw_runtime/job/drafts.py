# SPDX-License-Identifier: Apache-2.0
"""Many drafts of a prompt, and the request that finishes some of them from what their files say."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Final

import torch

from pw_runtime.errors import BadRequest
from pw_runtime.job.contact_sheet import (
    Filmstrip,
    SheetRow,
    Thumb,
    make_thumb,
    sample_frames,
    write_contact_sheet,
)
from pw_runtime.job.latents import SUFFIX, read_provenance
from pw_runtime.job.provenance import Provenance
from pw_runtime.prompts import check_prompts
from pw_runtime.system.video_input import count_frames, video_frames
from pw_runtime.types import FrameChunk, PixelFormat, Preset, Prompt

THUMBS: Final = 6  # frames of each draft on the sheet
# Options that decide the draft's bits or that of its high-res stage, as the draft was made with.
DECIDED: Final = (
    *("precision", "kernels", "attention", "chunk", "linear", "step_cache", "draft_strength"),
)


def numbered_drafts(prompts: Sequence[Prompt], count: int) -> tuple[Prompt, ...]:
    """Return every prompt `count` times, with the ids ID-1, ID-2 and so on.

    The seeds follow from the position, as officially: those of a file that has all prompts, then
    all again. So the first draft of each is that of the prompts alone, and drafts stay the same
    where more of them are made later. They are in the order of the prompts.

    Raises BadRequest where an id is too long for that.
    """
    drafts = tuple(
        replace(
            prompt,
            id=f"{prompt.id}-{number}",
            position=prompt.position + (number - 1) * len(prompts),
        )
        for prompt in prompts
        for number in range(1, count + 1)
    )
    check_prompts(drafts)
    return drafts


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafts:
    """Drafts of one run, to be finished together.

    Attributes:
        folder: of their latents files.
        prompts: with the positions that they were made at.
        origin: of the first one; what all of them were made with is the same in each.
    """

    folder: Path
    prompts: tuple[Prompt, ...]
    origin: Provenance

    @property
    def preset(self) -> Preset:
        """The preset that the drafts were made for, high-res stage included."""
        return self.origin.preset


def read_drafts(names: Sequence[str], folder: Path | None) -> Drafts:
    """Return the drafts of some ids in a folder, or of some latents files.

    Raises BadRequest for a file that is missing or of no draft, two folders, and drafts that were
    made with different options.
    """
    paths = [_latents_of(name, folder) for name in names]
    origins = {path: read_provenance(path) for path in paths}
    first, origin = next(iter(origins.items()))
    for path, other in origins.items():
        if path.parent.resolve() != first.parent.resolve():
            raise BadRequest(
                "the drafts are in two folders",
                got=f"{first} and {path}",
                do="finish those of each folder by itself",
            )
        if other.prompt.id != path.name.removesuffix(SUFFIX):
            raise BadRequest(
                f"{path} has another name than its draft",
                got=f"the draft of prompt {other.prompt.id}",
                do=f"call it {other.prompt.id}{SUFFIX} again",
            )
        if other.noise_file is not None:
            raise BadRequest(
                f"the draft {path} began with noise of a file",
                got=other.noise_file,
                do="finish it with `pw generate --drafts FOLDER --noise FILE` and its options",
            )
        if differing := _differing(origin, other):
            raise BadRequest(
                "the drafts are of different runs",
                got=f"{path.name} and {first.name} have another {', '.join(differing)}",
                do="finish those of each run by itself",
            )
    return Drafts(
        folder=first.parent, prompts=tuple(x.prompt for x in origins.values()), origin=origin
    )


def _latents_of(name: str, folder: Path | None) -> Path:
    if name.endswith(SUFFIX):
        parent = Path(name).parent
        if folder is None:
            return Path(name)
        if parent == Path() or parent.resolve() == folder.resolve():
            return folder / Path(name).name
        raise BadRequest(
            f"{name} is not in the folder of --drafts",
            got=f"--drafts {folder}",
            do="leave --drafts out, or give the id alone",
        )
    if folder is None:
        raise BadRequest(
            f"{name} is no latents file, and no folder is named in which it could be an id",
            wanted=f"a path that ends in {SUFFIX}",
            do="add --drafts FOLDER, or give the path of its latents file",
        )
    path = folder / f"{name}{SUFFIX}"
    if not os.path.isfile(path):
        names: list[str] = []
        with suppress(OSError):  # no such folder, or none that may be read
            names = os.listdir(folder)
        there = sorted(x.removesuffix(SUFFIX) for x in names if x.endswith(SUFFIX))
        raise BadRequest(
            f"there is no draft {name} in {folder}",
            got=f"no {path.name}",
            wanted=f"one of {', '.join(there[:12])}" + ", ..." * (len(there) > 12)
            if there
            else "files that `pw gallery` left",
            do="check --drafts and the id",
        )
    return path


def _differing(left: Provenance, right: Provenance) -> list[str]:
    """Name what two drafts were made with that differs, where one run needs it to be the same."""
    pairs: dict[str, tuple[object, object]] = {
        "base seed": (left.seeds["base"], right.seeds["base"]),
        "negative prompt": (left.negative, right.negative),
        "preset": (left.preset, right.preset),
        "bundle": (left.bundle["digest"], right.bundle["digest"]),
        "LoRA": (left.loras, right.loras),
    }
    pairs |= {x: (getattr(left.options, x), getattr(right.options, x)) for x in DECIDED}
    return [name for name, (one, other) in pairs.items() if one != other]


def write_gallery(drafts: Sequence[tuple[Prompt, Path]], path: Path) -> None:
    """Draw frames of drafts that are finished videos: under each prompt a filmstrip for every id.

    Args:
        drafts: prompts, those of one text together, and the videos.
        path: of the PNG.

    Raises BadRequest for a video that cannot be read, WriteFailed.
    """
    rows = [
        SheetRow(
            caption=text, strips=tuple(_filmstrip(prompt.id, video) for prompt, video in drafts)
        )
        for text, drafts in groupby(drafts, key=lambda draft: draft[0].text)
    ]
    write_contact_sheet(rows, path)


def _filmstrip(name: str, video: Path) -> Filmstrip:
    """Return frames of a video that was written here, evenly spaced."""
    wanted, thumbs = set(sample_frames(count_frames(video), THUMBS)), list[Thumb]()
    for index, frame in enumerate(video_frames(video)):
        size = frame.width, frame.height
        if index in wanted:
            kind: PixelFormat = "yuv420p" if frame.format.name == "yuv420p" else "rgb24"
            pixels = torch.from_numpy(frame.to_ndarray(format=kind))[None]
            thumbs.append(
                make_thumb(FrameChunk(start=index, pixel_format=kind, frames=pixels), index)
            )
    return Filmstrip(name=name, width=size[0], height=size[1], thumbs=tuple(thumbs))
