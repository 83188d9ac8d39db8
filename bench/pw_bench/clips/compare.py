# SPDX-License-Identifier: Apache-2.0
"""`pw compare A B`: the difference between the clips of two runs, in numbers and as a picture.

For two configurations of the runtime: exact and engines, tiled and not, bf16 and fp32. Give both
runs the same prompts and seeds and, to see differences of the runtime alone, `--codec ffv1`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pw_bench.clips.equivalence import FrameDifference, compare_frames
from pw_engines.engine import relative_l2
from pw_runtime.errors import BadRequest
from pw_runtime.job.contact_sheet import (
    Filmstrip,
    SheetRow,
    Thumb,
    make_thumb,
    sample_frames,
    write_contact_sheet,
)
from pw_runtime.job.latents import SUFFIX
from pw_runtime.job.receipt import read_receipt
from pw_runtime.planning.exactness import Exactness
from pw_runtime.stages.codecs import PICTURE, VIDEOS
from pw_runtime.system.atomic_files import write_text
from pw_runtime.system.input_files import UnreadableInput, kind_of
from pw_runtime.system.printable import printable
from pw_runtime.system.tensor_file import TensorFile
from pw_runtime.system.video_input import count_frames, video_frames
from pw_runtime.types import FrameChunk

THUMBNAILS: Final = 5
GAIN: Final = 8  # of the differences in the contact sheet
_EXACTNESS: Final[TypeAdapter[Exactness]] = TypeAdapter(Exactness)
# Keys of a receipt that hold what was requested, not what came of it.
REQUESTED: Final = (
    "preset", "options", "engines", "seeds", "noise", "bundle", "prompt", "negative",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two clips with one name. Latents: relative L2 by name, where both runs kept the file."""

    name: str
    labels: tuple[str | None, str | None]  # of both, by their receipts; None: it does not say
    settings: Mapping[str, tuple[Any, Any]]  # those that differ, according to the receipts
    frames: FrameDifference
    latents: Mapping[str, float]


def compare_pair(name: str, clip: Path, reference: Path) -> Pair:
    """Compare a clip with its reference. Raises BadResult where they differ in length or size."""
    return Pair(
        name=name,
        labels=(label_of(clip), label_of(reference)),
        settings=_changed_settings(clip, reference),
        frames=compare_frames(clip, reference),
        latents=latent_differences(clip, reference),
    )


def find_pairs(a: Path, b: Path) -> dict[str, tuple[Path, Path]]:
    """Return pairs of clips by name: two files, or the clips of two folders. Raises BadRequest."""
    for path in (a, b):
        if not os.path.exists(path):
            raise BadRequest(f"{path} does not exist", do="give two clips, or two folders of clips")
        if not (path.is_file() or path.is_dir()):
            raise BadRequest(
                f"{path} is not a clip",
                got=kind_of(path.stat().st_mode),
                wanted="two clips, or two folders of clips",
            )
    if a.is_file() and b.is_file():
        return {a.name: (a, b)}
    if a.is_file() or b.is_file():
        raise BadRequest(
            "cannot compare a clip with a folder",
            got=f"{a} and {b}",
            wanted="two clips, or two folders",
        )
    left, right = (
        {x.stem: x for x in sorted(folder.iterdir()) if _is_clip(x)} for folder in (a, b)
    )
    if unpaired := left.keys() ^ right.keys():
        raise BadRequest(
            "the folders do not hold the same clips",
            got=f"only in one of them: {', '.join(sorted(unpaired))}",
            do="compare single clips, or make the missing ones",
        )
    if not left:
        raise BadRequest(
            f"no clips in {a}", wanted=f"files ending in {' or '.join((*VIDEOS, PICTURE))}"
        )
    return {name: (left[name], right[name]) for name in left}


def _is_clip(path: Path) -> bool:
    """Tell whether a file is a clip; a picture is one where it has a receipt."""
    picture = path.suffix == PICTURE and path.with_suffix(".json").is_file()
    return (path.suffix in VIDEOS or picture) and path.is_file()


def label_of(clip: Path) -> str | None:
    """Return how exact a clip is, as its receipt says; None without one, or where it is older."""
    receipt = clip.with_suffix(".json")
    said = read_receipt(receipt).get("exactness") if receipt.exists() else None
    if said is None:
        return None
    try:
        return _EXACTNESS.validate_python(said).text
    except ValidationError as error:
        raise BadRequest(
            f"{receipt} is not the receipt of a clip",
            got=f"exactness: {error.errors()[0]['msg']}",
            do="compare the clip without its receipt, or make it again",
        ) from error


def _changed_settings(clip: Path, reference: Path) -> dict[str, tuple[Any, Any]]:
    """Return settings that differ, by dotted name; none where a receipt is missing."""
    settings = []
    for video in (clip, reference):
        receipt = video.with_suffix(".json")
        if not receipt.exists():
            return {}
        content = read_receipt(receipt)
        settings.append(dict(_flatten({key: content.get(key) for key in REQUESTED})))
    left, right = settings
    keys = dict.fromkeys((*left, *right))
    return {k: (left.get(k), right.get(k)) for k in keys if left.get(k) != right.get(k)}


def _flatten(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _flatten(value, f"{name}.{key}" if name else key)
    else:
        yield name, content


def latent_differences(clip: Path, reference: Path) -> dict[str, float]:
    """Return the relative L2 of two clips' latents, by name; empty where one kept no file."""
    files = [video.with_name(video.stem + SUFFIX) for video in (clip, reference)]
    if not all(file.exists() for file in files):
        return {}
    try:
        left, right = (TensorFile(file).tensors() for file in files)
    except UnreadableInput as error:
        raise BadRequest(
            f"cannot read the latents {files[0]} and {files[1]}",
            got=error,
            do="remove them to compare the frames alone",
        ) from error
    return {
        name: relative_l2(left[name], right[name])
        for name in sorted(left.keys() & right.keys())
        if name.endswith("_latent") and left[name].shape == right[name].shape
    }


def difference_row(name: str, clip: Path, reference: Path) -> SheetRow:
    """Return frames of both clips and, below them, their difference times GAIN."""
    sampled = sample_frames(count_frames(clip), THUMBNAILS)
    strips: dict[str, list[Thumb]] = {"A": [], "B": [], f"A - B, {GAIN} times": []}
    size = (0, 0)
    for number, pair in enumerate(zip(video_frames(clip), video_frames(reference), strict=True)):
        if number not in sampled:
            continue
        x, y = (frame.to_ndarray(format="rgb24") for frame in pair)
        difference = np.abs(x.astype(np.int16) - y).clip(max=255 // GAIN) * GAIN
        size = (x.shape[1], x.shape[0])
        pictures = (x, y, difference.astype(np.uint8))
        for strip, picture in zip(strips.values(), pictures, strict=True):
            pixels = torch.from_numpy(picture)[None]
            chunk = FrameChunk(start=number, pixel_format="rgb24", frames=pixels)
            strip.append(make_thumb(chunk, number))
    return SheetRow(
        caption=name,
        strips=tuple(
            Filmstrip(name=title, width=size[0], height=size[1], thumbs=tuple(thumbnails))
            for title, thumbnails in strips.items()
        ),
    )


def compare_clips(a: Path, b: Path, sheet: Path | None, out: Path | None) -> None:
    """Print how far clip A, or the clips in folder A, are from B: frames, and latents if kept.

    Args:
        a: a clip, or a folder of clips.
        b: the clip, or folder, to compare it with.
        sheet: PNG to write, with frames of both and their differences.
        out: JSON file to write, with the same numbers.

    Raises BadRequest or BadResult where the clips cannot be compared, WriteFailed.
    """
    paths = find_pairs(a, b)
    pairs = [compare_pair(name, *clips) for name, clips in paths.items()]
    table = Table("clip", "PSNR", "SSIM", "flicker", "latents, relative L2")
    for pair in pairs:
        frames = pair.frames
        table.add_row(
            escape(printable(pair.name)),
            "no byte differs" if frames.psnr is None else f"{frames.psnr:.2f} dB",
            f"{frames.ssim:.5f}",
            "static" if frames.flicker_ratio is None else f"{frames.flicker_ratio:.3f}",
            ", ".join(f"{key.removesuffix('_latent')} {x:.1e}" for key, x in pair.latents.items()),
        )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    console.print(table)
    for side, labels in zip("AB", zip(*(pair.labels for pair in pairs), strict=True), strict=True):
        for label in dict.fromkeys(labels):
            said = label or "no label, for there is no receipt, or an older one"
            console.print(printable(f"{side}: {said}"), markup=False)
    settings = {name: values for pair in pairs for name, values in pair.settings.items()}
    for name, (left, right) in settings.items():
        console.print(printable(f"{name}: {left} and {right}"), markup=False)
    if sheet is not None:
        write_contact_sheet([difference_row(name, *clips) for name, clips in paths.items()], sheet)
    if out is not None:
        write_text(out, json.dumps([asdict(pair) for pair in pairs], indent=1) + "\n")
