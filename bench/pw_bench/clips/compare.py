# SPDX-License-Identifier: Apache-2.0
"""`pw compare A B`: how far the clips of two runs are apart, by number and as a picture.

For two configurations of the runtime: exact and engines, tiled and not, bf16 and fp32. Both runs
get the same prompts, seeds and, for differences of the runtime alone, `--codec ffv1`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import av
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from pw_bench.clips.equivalence import FrameDifference, compare_frames
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
from pw_runtime.system.atomic_files import write_text
from pw_runtime.types import FrameChunk

VIDEOS: Final = (".mp4", ".mkv")
THUMBS: Final = 5
LOUDER: Final = 8  # differences are drawn that many times as large
# Of receipts: what a run was asked for, not what became of it.
ASKED: Final = ("preset", "options", "engines", "seeds", "noise", "bundle", "prompt", "negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two clips of one name. Latents: relative L2 by name, of the files that both runs kept."""

    name: str
    settings: Mapping[str, tuple[Any, Any]]  # that differ, by their receipts
    frames: FrameDifference
    latents: Mapping[str, float]


def compare_pair(name: str, one: Path, other: Path) -> Pair:
    """Compare a clip with the one it should equal. Raises BadResult where they are not alike."""
    return Pair(
        name=name,
        settings=_settings(one, other),
        frames=compare_frames(one, other),
        latents=_latents(one, other),
    )


def find_pairs(one: Path, other: Path) -> dict[str, tuple[Path, Path]]:
    """Clips by name: two files, or the clips that two folders have in common. Raises BadRequest."""
    for path in (one, other):
        if not path.exists():
            raise BadRequest(f"{path} is not there", do="name two clips, or two folders of clips")
    if one.is_file() and other.is_file():
        return {one.name: (one, other)}
    if one.is_file() or other.is_file():
        raise BadRequest(
            "a clip and a folder", got=f"{one} and {other}", wanted="two clips, or two folders"
        )
    left, right = (
        {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in VIDEOS}
        for folder in (one, other)
    )
    if lonely := left.keys() ^ right.keys():
        raise BadRequest(
            "the folders do not hold the same clips",
            got=f"{', '.join(sorted(lonely))} in one of them alone",
            do="compare clips by themselves, or make the missing ones",
        )
    if not left:
        raise BadRequest(f"no clips in {one}", wanted=f"files ending in {' or '.join(VIDEOS)}")
    return {name: (left[name], right[name]) for name in left}


def _settings(one: Path, other: Path) -> dict[str, tuple[Any, Any]]:
    """What two receipts disagree about, by dotted name; nothing where one is missing."""
    found = []
    for video in (one, other):
        receipt = video.with_suffix(".json")
        if not receipt.exists():
            return {}
        content = json.loads(receipt.read_text())
        found.append(dict(_flat({key: content.get(key) for key in ASKED})))
    left, right = found
    keys = dict.fromkeys((*left, *right))
    return {k: (left.get(k), right.get(k)) for k in keys if left.get(k) != right.get(k)}


def _flat(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _flat(value, f"{name}.{key}" if name else key)
    else:
        yield name, content


def _latents(one: Path, other: Path) -> dict[str, float]:
    files = [video.with_name(video.stem + SUFFIX) for video in (one, other)]
    if not all(file.exists() for file in files):
        return {}
    with safe_open(files[0], "pt") as left, safe_open(files[1], "pt") as right:
        names = [name for name in left.keys() if name.endswith("_latent")]  # noqa: SIM118
        found = {}
        for name in sorted(set(names) & set(right.keys())):
            x, y = (file.get_tensor(name).double() for file in (left, right))
            if x.shape == y.shape:
                found[name] = ((x - y).norm() / y.norm()).item()
    return found


def difference_row(name: str, one: Path, other: Path) -> SheetRow:
    """Frames of both clips and, under them, what they differ by, made louder."""
    with av.open(str(one)) as container:
        total = sum(1 for packet in container.demux(video=0) if packet.size)
    wanted = sample_frames(total, THUMBS)
    strips: dict[str, list[Thumb]] = {"A": [], "B": [], f"A - B, {LOUDER} times": []}
    size = (0, 0)
    with av.open(str(one)) as first, av.open(str(other)) as second:
        pairs = zip(first.decode(video=0), second.decode(video=0), strict=True)
        for number, pair in enumerate(pairs):
            if number not in wanted:
                continue
            x, y = (frame.to_ndarray(format="rgb24") for frame in pair)
            apart = np.abs(x.astype(np.int16) - y).clip(max=255 // LOUDER) * LOUDER
            size = (x.shape[1], x.shape[0])
            for strip, picture in zip(strips.values(), (x, y, apart.astype(np.uint8)), strict=True):
                pixels = torch.from_numpy(picture)[None]
                chunk = FrameChunk(start=number, pixel_format="rgb24", frames=pixels)
                strip.append(make_thumb(chunk, number))
    return SheetRow(
        caption=name,
        strips=tuple(
            Filmstrip(name=what, width=size[0], height=size[1], thumbs=tuple(thumbs))
            for what, thumbs in strips.items()
        ),
    )


def compare_clips(a: Path, b: Path, sheet: Path | None, out: Path | None) -> None:
    """Tell how far clip A, or the clips in folder A, are from B: frames, and latents if kept.

    Args:
        a: a clip, or a folder of clips.
        b: as that.
        sheet: PNG to write, of frames of both and of their differences.
        out: JSON file to write, the same numbers.

    Raises BadRequest, BadResult where the clips cannot be compared, WriteFailed.
    """
    pairs = find_pairs(a, b)
    found = [compare_pair(name, *paths) for name, paths in pairs.items()]
    table = Table("clip", "PSNR", "SSIM", "flicker", "latents, relative L2")
    for one in found:
        frames = one.frames
        table.add_row(
            one.name,
            "no byte differs" if frames.psnr is None else f"{frames.psnr:.2f} dB",
            f"{frames.ssim:.5f}",
            "still" if frames.flicker_ratio is None else f"{frames.flicker_ratio:.3f}",
            ", ".join(f"{key.removesuffix('_latent')} {x:.1e}" for key, x in one.latents.items()),
        )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    console.print(table)
    settings = {name: values for one in found for name, values in one.settings.items()}
    for name, (left, right) in settings.items():
        console.print(f"{name}: {left} and {right}")
    if sheet is not None:
        write_contact_sheet([difference_row(name, *paths) for name, paths in pairs.items()], sheet)
    if out is not None:
        write_text(out, json.dumps([asdict(one) for one in found], indent=1) + "\n")
