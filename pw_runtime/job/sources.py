# SPDX-License-Identifier: Apache-2.0
"""Pictures and videos that clips start from: their digests, taken before anything is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Final

from pw_runtime.errors import BadRequest
from pw_runtime.job.clip import Clip
from pw_runtime.sampling.schedule import make_schedule, steps_left
from pw_runtime.system.input_files import UnreadableInput, open_input
from pw_runtime.system.picture_input import Picture, decode_picture, read_bytes, read_picture
from pw_runtime.system.printable import printable
from pw_runtime.system.sound_copy import find_sound, why_left_out
from pw_runtime.system.video_source import examine_video
from pw_runtime.types import PATCH, VAE_STRIDE, Prompt, Request, Source

_MADE: Final = (".mp4", ".mkv", ".png", ".partial.mp4")  # endings of what a clip becomes


def read_sources(prompts: Iterable[Prompt]) -> Mapping[Path, Source]:
    """Return name and digest of every file that the prompts start from, each read once.

    Raises BadRequest for one that cannot be read.
    """
    paths = {path for prompt in prompts for path in prompt.sources.values()}
    return {path: source_of(path) for path in sorted(paths)}


def source_of(path: Path) -> Source:
    """Return name and digest of a file. Raises BadRequest where it cannot be read."""
    try:
        with open_input(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (UnreadableInput, OSError) as error:
        counted = "" if path.is_absolute() else ", which counts from the current folder"
        raise BadRequest(
            f"cannot read {path}", got=error, do=f"check the path of the picture or video{counted}"
        ) from error
    return Source(file=path.name, sha256=digest)


def examine_pictures(clips: Iterable[Clip]) -> None:
    """Decode the pictures that will be encoded, once. Raises BadRequest for one that cannot be."""
    ahead = (clip for clip in clips if clip.needs not in (None, "decode"))
    for path in sorted({clip.prompt.image for clip in ahead if clip.prompt.image is not None}):
        read_picture(path)


def unchanged_picture(path: Path, source: Source) -> Picture:
    """Decode a picture whose digest was taken. Raises BadRequest where it is another by now."""
    content = read_bytes(path)
    if hashlib.sha256(content).hexdigest() != source.sha256:
        raise BadRequest(
            f"the picture {path} was changed while the run was going on",
            do="run the command again: it takes the picture as it is now",
        )
    return decode_picture(content, str(path))


def started_from(
    prompts: Iterable[Prompt], *, image: Path | None, draft_video: Path | None
) -> tuple[Prompt, ...]:
    """Return the prompts, those that start from no file of their own from these."""
    return tuple(
        prompt if prompt.sources else replace(prompt, image=image, draft_video=draft_video)
        for prompt in prompts
    )


def located(prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
    """Return the prompts with the paths that their pictures and videos have from everywhere."""
    return tuple(
        replace(prompt, **{kind: path.absolute() for kind, path in prompt.sources.items()})  # type: ignore[arg-type]
        for prompt in prompts
    )


def require_usable_sources(request: Request) -> None:
    """Raise BadRequest for pictures and videos that exclude each other, or options without them."""
    prompts, options = request.prompts, request.options
    for prompt in prompts:
        if len(prompt.sources) > 1:
            raise BadRequest(
                f"prompt {prompt.id} has a picture as its first frame and a video as its draft",
                got=", ".join(map(str, prompt.sources.values())),
                do="give one of --image and --draft-video",
            )
    if any(prompt.image for prompt in prompts):
        _require_frames_after_a_picture(request)
    unused = not request.partial  # an option that concerns none of the prompts
    if options.image_highres and unused and not any(prompt.image for prompt in prompts):
        raise BadRequest(
            "--image-highres fixes the first frame, and no clip starts from a picture",
            do="add --image, or leave --image-highres out",
        )
    if options.image_highres and "highres" not in request.stages:
        raise BadRequest(
            "--image-highres is about the high-res stage, and this run has none",
            do="leave --image-highres out",
        )
    strength, draft = options.draft_strength, request.preset.draft
    if not 0 <= strength <= 1:
        raise BadRequest("--draft-strength is a noise level", got=strength, wanted="0 to 1")
    if strength and unused and not any(prompt.draft_video for prompt in prompts):
        raise BadRequest(
            "--draft-strength is about a draft that begins with a video, and no clip has one",
            got=strength,
            do="add --draft-video, or leave --draft-strength out",
        )
    if strength and not steps_left(draft, strength):
        lowest = make_schedule(draft.solver, draft.steps, draft.shift).sigmas[-2]
        raise BadRequest(
            "no step of the draft begins at so little noise",
            got=f"--draft-strength {strength:g}",
            wanted=f"0, or {lowest:.3f} to 1 with {draft.steps} steps",
            do="choose another one, or leave it out: at 0 the video is the draft",
        )
    if not strength and request.preset.highres is None and any(p.draft_video for p in prompts):
        raise BadRequest(
            "the video is the draft, and the preset has no high-res stage that would go on from it",
            do="choose another preset, or give a --draft-strength above 0",
        )
    for prompt in prompts:
        for path in prompt.sources.values():
            if path.resolve() in {(request.out / f"{prompt.id}{x}").resolve() for x in _MADE}:
                raise BadRequest(
                    f"{path} has the name of a clip of prompt {prompt.id}, which starts from it",
                    got=f"--out {request.out}",
                    do="choose another --out",
                )
    given = not strength and any(prompt.draft_video for prompt in prompts)
    if request.drafts is not None and given:
        raise BadRequest(
            "--drafts and --draft-video both give the draft",
            do="leave one of them out; `pw upscale` goes on from a video",
        )


def examine_videos(clips: Iterable[Clip]) -> None:
    """Decode the videos that will be encoded, once. Raises BadRequest for one that cannot be."""
    for clip in clips:
        path, request = clip.prompt.draft_video, clip.request
        ahead = clip.needs not in (None, "decode") and clip.draft is None
        if path is None or not ahead or not request.encoded(clip.prompt):
            continue
        draft = request.stages["draft"]
        clip.video_source = examine_video(path, request.preset.video, draft.width, draft.height)


def told_of_sources(clip: Clip) -> list[str]:
    """Return what the user is told about the video that a clip starts from."""
    path, request = clip.prompt.draft_video, clip.request
    if path is None or clip.needs in (None, "decode") or clip.draft is not None:
        return []
    name, strength = printable(path.name), request.options.draft_strength
    if clip.video_source is None:
        return [f"nothing is left of {name} at --draft-strength {strength:g}: it is not read"]
    found = list(clip.video_source.notices)
    if strength:
        draft = request.stages["draft"]
        first = draft.steps - clip.draft_steps
        sigma = make_schedule(draft.solver, draft.steps, draft.shift).sigmas[first]
        found.append(f"the draft begins with it at step {first + 1} of {draft.steps}")
        found[-1] += f", where {sigma:.1%} are noise"
    return [f"{name}: {'; '.join(found)}"] if found else []


def require_unchanged_video(clip: Clip) -> None:
    """Raise BadRequest where the video is another by now than the one whose digest was taken."""
    path = clip.prompt.draft_video
    assert path is not None
    if source_of(path).sha256 != clip.provenance.sources["draft_video"].sha256:
        raise BadRequest(
            f"the video {path} was changed while the run was going on",
            do="run the command again: it takes the video as it is now",
        )


def sound_of(clip: Clip) -> tuple[Path | None, str | None]:
    """Return the file whose sound a clip gets, and what the user is told about it.

    It is that of the video that the clip starts from, where it ends with the clip and fits into its
    file.
    """
    path, video = clip.prompt.draft_video, clip.request.preset.video
    if path is None or clip.request.options.draft_strength == 1:
        return None, None
    name, seconds = printable(path.name), Fraction(video.frames, video.fps)
    try:
        if source_of(path) != clip.provenance.sources["draft_video"]:
            return None, f"{name}: its sound, if it has any, is left out: the file has changed"
        sound = find_sound(path, seconds)
    except BadRequest as error:
        return None, f"{name}: its sound, if it has any, is left out: {error.what} ({error.got})"
    if sound is None:
        return None, None
    if reason := why_left_out(sound, seconds, clip.target.suffix):
        return None, f"{name}: {reason}"
    more = f", the first of {sound.tracks} tracks" if sound.tracks > 1 else ""
    return path, f"{name}: its sound is copied ({sound.codec}{more})"


def _require_frames_after_a_picture(request: Request) -> None:
    """Raise BadRequest for a clip in which a picture cannot be the first frame."""
    options, preset = request.options, request.preset
    if options.blocks == "whole":
        raise BadRequest(
            "--blocks whole has no engines for a clip that starts from a picture: its first latent "
            "frame has a timestep of its own",
            do="leave --blocks out, or choose attention; or leave the picture out",
        )
    if preset.video.frames <= VAE_STRIDE[0]:
        raise BadRequest(
            "a clip that starts from a picture needs frames after it",
            got=f"{preset.video.frames} frame",
            wanted=f"{VAE_STRIDE[0] + 1} or more",
            do="--frames 17, for instance",
        )
    token = VAE_STRIDE[1] * PATCH
    for name, config in request.stages.items():
        if config.width * config.height <= token**2:
            raise BadRequest(
                "a clip that starts from a picture needs two tokens in a frame",
                got=f"{name}.width {config.width}, {name}.height {config.height}",
                wanted=f"{token}x{2 * token} or larger",
            )
