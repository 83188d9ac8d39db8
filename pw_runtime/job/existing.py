# SPDX-License-Identifier: Apache-2.0
"""Files of earlier runs in the output folder: finished, to go on with, to replace, or refused."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pw_runtime.errors import BadRequest
from pw_runtime.job.clip import FRAMES, STEPS, TILES, Clip
from pw_runtime.job.contact_sheet import SHEET
from pw_runtime.job.identity import Fields, differences, of_clip, of_latents, of_receipt
from pw_runtime.job.latents import SUFFIX, is_resumable, read_provenance, stages_of
from pw_runtime.job.provenance import Provenance
from pw_runtime.job.receipt import read_receipt
from pw_runtime.job.restore import restore
from pw_runtime.sampling.noise import tensor_digest
from pw_runtime.stages.codecs import PICTURE, VIDEOS
from pw_runtime.system.atomic_files import require_replaceable
from pw_runtime.system.tile_store import remove_tiles
from pw_runtime.types import Request

_SHOWN = 8  # files, and fields of each, that an error names


def settle_existing(
    clips: Iterable[Clip],
    request: Request,
    say: Callable[[str], None] = lambda text: None,
    *,
    elsewhere: Collection[str] | None = None,
) -> None:
    """Take over what earlier runs left of the same clips, before anything is computed.

    A finished clip gets its video, and is not computed; an unfinished one gets what was computed
    for it. `request.fresh` takes over nothing, `request.overwrite` replaces other clips.

    Args:
        clips: of the run.
        request: that they are of.
        say: told what is computed anew, and why.
        elsewhere: options that other machines settle, which compute all and take over no unfinished
            clip; None: this one computes.

    Raises:
        BadRequest: a file would be replaced that may not be, with every field that differs.
    """
    clips, standing = tuple(clips), _Standing()
    journals: dict[Path, tuple[Clip, Provenance]] = {}
    for clip in clips:
        for path in _files_of(clip):
            require_replaceable(path)
        if request.overwrite:
            require_one_container(clip)
        try:
            _settle_video(clip, request, standing, elsewhere or ())
            journal = None
            if clip.video is None:
                journal = _journal_of(clip, request, standing, say, elsewhere)
            if journal is not None and elsewhere is None:
                journals[journal[0]] = (clip, journal[1])
        except BadRequest as error:
            if not request.overwrite:
                raise
            say(f"prompt {clip.prompt.id}: replaced, because {error.what} ({error.got})")
    _settle_sheet(clips, request, standing)
    if standing.files:
        raise standing.refusal(request)
    for clip in clips:
        if request.fresh:
            _drop_steps(clip)
        elif clip.video is not None:
            _remove_leftovers(clip)
    for path, (clip, provenance) in journals.items():
        restore(clip, path, provenance, say)


@dataclass(slots=True)
class _Standing:
    """Files of earlier runs that this one may not replace, and why."""

    files: dict[Path, list[str]] = field(default_factory=dict)
    damaged: bool = False  # the same clip's, which --fresh may replace

    def refusal(self, request: Request) -> BadRequest:
        shown = list(self.files.items())[:_SHOWN]
        names = "; ".join(
            f"{path.name}" + (f": {', '.join(why[:_SHOWN])}" if why else "") for path, why in shown
        )
        more = f" and {len(self.files) - _SHOWN} more" if len(self.files) > _SHOWN else ""
        ways = ["--overwrite replaces them"]
        if self.damaged:
            ways.append("--fresh makes damaged clips again")
        latents = [path for path in self.files if path.name.endswith(SUFFIX)]
        if resumable := [path for path in latents if is_resumable(path)]:
            files = shlex.join(map(str, resumable[:_SHOWN]))
            ways.append(f"`pw decode {files} --model BUNDLE` finishes what has latents")
        return BadRequest(
            f"{request.out} contains files of an earlier run, which this one would not make",
            got=names + more,
            do="; ".join([*ways, "or choose another --out"]),
        )


def _files_of(clip: Clip) -> list[Path]:
    """List the existing files that the clip would replace, links to nothing included."""
    endings = (*_endings(clip), ".json", SUFFIX, STEPS, FRAMES, ".partial.mp4")
    return [path for ending in endings if os.path.lexists(path := clip.path(ending))]


def _endings(clip: Clip) -> tuple[str, ...]:
    """Return the endings that a video of the clip may have.

    A picture is one only where the clip will be, or where a receipt is beside it: a folder may hold
    other pictures, such as that which the clip starts from.
    """
    picture = clip.target.suffix == PICTURE or os.path.lexists(clip.path(".json"))
    return (*VIDEOS, PICTURE) if picture else VIDEOS


def require_one_container(clip: Clip) -> None:
    """Raise BadRequest where a video in another container would stay, and lose its receipt."""
    for ending in _endings(clip):
        other = clip.path(ending)
        if other != clip.target and os.path.lexists(other):
            raise BadRequest(
                f"{other} would stay beside {clip.target.name}, described by no receipt",
                got=f"a clip of another codec than {clip.request.options.codec}",
                do=f"remove {other.name}, or choose another --out",
            )


def _settle_video(
    clip: Clip, request: Request, standing: _Standing, unsettled: Collection[str]
) -> None:
    """Take a finished video of the same clip; note what is of another one.

    Raises BadRequest where its receipt cannot be read.
    """
    path = clip.path(".json")
    videos = [video for ending in _endings(clip) if os.path.lexists(video := clip.path(ending))]
    if not os.path.lexists(path):
        if not request.overwrite:
            standing.files |= {video: ["a video without a receipt"] for video in videos}
        return
    if not path.exists():
        standing.files[path] = ["a link to nothing"]
        return
    receipt = read_receipt(path)
    try:
        found, wanted = of_receipt(receipt), of_clip(clip)
        differing = differences(_without(found, unsettled), _without(wanted, unsettled))
        video_bytes = receipt["video"]["bytes"]
    except KeyError as error:
        raise BadRequest(
            f"{path} is not a receipt that can be compared",
            got=f"no {error}",
            do="pass --overwrite to replace the clip, or choose another --out",
        ) from error
    if differing:
        if not request.overwrite:
            standing.files[videos[0] if videos else path] = differing
        return
    if not clip.target.exists():
        return  # it was about to appear
    size = clip.target.stat().st_size
    if size == video_bytes:
        clip.video = None if request.fresh else clip.target
    elif not (request.overwrite or request.fresh):
        standing.files[clip.target] = [f"{size} bytes, and its receipt says {video_bytes}"]
        standing.damaged = True


def _journal_of(
    clip: Clip,
    request: Request,
    standing: _Standing,
    say: Callable[[str], None],
    elsewhere: Collection[str] | None,
) -> tuple[Path, Provenance] | None:
    """Find the most that was computed for the same clip; note what is of another one."""
    if request.fresh:
        return None
    found: list[tuple[Path, Provenance]] = []
    folders = filter(None, (request.out, request.spill))
    for path in (folder / clip.path(SUFFIX).name for folder in folders):
        if not path.exists():
            if os.path.lexists(path) and not request.overwrite:
                standing.files[path] = ["a link to nothing"]
            continue
        try:
            stored = read_provenance(path)
        except BadRequest as error:
            say(f"prompt {clip.prompt.id} is computed anew: {error}")
            continue
        differing = _differences(clip, stored, elsewhere)
        if not differing:
            found.append((path, stored))
        elif not request.overwrite:
            standing.files[path] = differing
    if found:  # a disk that was full in between has the earlier stages
        return max(found, key=lambda journal: len(stages_of(journal[0])))
    partial_video = clip.path(".partial.mp4")
    if os.path.lexists(partial_video) and not (request.overwrite or standing.files):
        standing.files[partial_video] = ["a partial video without latents"]
    return None


def _differences(clip: Clip, stored: Provenance, elsewhere: Collection[str] | None) -> list[str]:
    """Describe how a clip differs from the one that an earlier run has begun."""
    anywhere = elsewhere is not None
    given = {stage: tensor_digest(x) for stage, x in clip.noise.items()}
    begun: Fields = {stage: x for stage, x in stored.noise.items() if stage in given or not given}
    found = of_latents(stored, anywhere=anywhere)
    wanted = of_latents(clip.provenance, anywhere=anywhere)
    found["noise file"] = {} if stored.noise_file is None else begun
    wanted["noise file"] = {stage: given[stage] for stage in begun if stage in given}
    return differences(_without(found, elsewhere or ()), _without(wanted, elsewhere or ()))


def _without(fields: Fields, unsettled: Collection[str]) -> Fields:
    """Leave out options that are not settled here."""
    options = {name: x for name, x in fields["options"].items() if name not in unsettled}
    return {**fields, "options": options}


def _settle_sheet(clips: tuple[Clip, ...], request: Request, standing: _Standing) -> None:
    """Note a contact sheet that would be replaced by one of the clips that are missing."""
    sheet = request.out / SHEET
    if not (request.contact_sheet and os.path.lexists(sheet)):
        return
    require_replaceable(sheet)
    if any(clip.video is None for clip in clips) and not request.overwrite:
        standing.files[sheet] = ["it would show the clips of this run alone"]


def _remove_leftovers(clip: Clip) -> None:
    """Remove what a run that was killed just after it had finished the clip would have removed.

    Raises BadRequest where that fails.
    """
    _drop_steps(clip)
    latents = clip.path(SUFFIX)
    try:
        stored = read_provenance(latents)
    except BadRequest:
        return  # why silent: there is none, or none of ours
    if clip.keeps_latents or stored.options.save_latents:
        return
    if not _differences(clip, stored, elsewhere=()):
        latents.unlink()


def _drop_steps(clip: Clip) -> None:
    """Remove steps, frames and tiles of a clip. Raises BadRequest where that fails."""
    try:
        for ending in (STEPS, FRAMES):
            clip.path(ending).unlink(missing_ok=True)
        remove_tiles(clip.path(TILES))
    except OSError as error:
        raise BadRequest(
            f"cannot remove {error.filename}", got=error.strerror, do="remove it yourself"
        ) from error
