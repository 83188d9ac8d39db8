# SPDX-License-Identifier: Apache-2.0
"""The offer of a server: the jobs that a request becomes, or the nearest that can be had."""

from __future__ import annotations

import hashlib
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from pw_runtime.errors import BadRequest
from pw_runtime.presets import check_preset
from pw_runtime.prompts import check_text
from pw_runtime.server.api_error import ApiError
from pw_runtime.server.create_video import CreateVideo, fingerprint_of
from pw_runtime.server.messages import Fit
from pw_runtime.server.settings import Settings
from pw_runtime.server.store import Job, NewJob
from pw_runtime.server.video import ID, new_id, preset_numbers, preset_of, seconds_of
from pw_runtime.types import OFFICIAL_NEGATIVE, Preset, StageConfig

PRIORITIES: Final = (-100, 100)
MAX_SEED: Final = 2**62  # as pw_runtime.sampling.noise has it, which imports torch
_SIZE = re.compile(r"(\d{1,5})[x*](\d{1,5})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """The presets on offer now."""

    settings: Settings
    fits: Mapping[str, Fit]  # by preset; empty until a worker is ready

    def jobs(
        self,
        body: CreateVideo,
        client: str,
        key: str | None,
        draft: Job | None,
        picture: bytes | None = None,
    ) -> list[NewJob]:
        """Return the jobs of a request.

        Args:
            body: the request.
            client: who asks.
            key: its Idempotency-Key.
            draft: the job that `draft_id` names.
            picture: that the clips start from; of a draft, its own.

        Raises:
            ApiError: something cannot be had, with the nearest that can.
        """
        self._check_texts(body)
        self._check_numbers(body, key)
        if draft is not None:
            _require_finishable(body, draft)
        name, preset = self._preset(body, draft)
        self._require_fit(name, draft_only=body.draft_only)
        prompt = draft.prompt if draft is not None else (body.prompt or "").strip()
        seed = draft.seed if draft is not None else _seed(body)
        ids = [new_id() for _ in range(body.n)]
        negative = OFFICIAL_NEGATIVE if body.negative_prompt is None else body.negative_prompt
        return [
            NewJob(
                id=job_id,
                client=client,
                prompt=prompt,
                negative=draft.negative if draft is not None else negative,
                seed=seed + i,
                preset_name=name,
                preset=preset_numbers(preset),
                draft_only=body.draft_only,
                draft_id=None if draft is None else draft.id,
                draft_ready=False,
                priority=body.priority,
                siblings=[other for other in ids if other != job_id],
                key=key,
                fingerprint=fingerprint_of(body, None if draft is not None else picture),
                picture=None if picture is None else hashlib.sha256(picture).hexdigest(),
            )
            for i, job_id in enumerate(ids)
        ]

    def _check_texts(self, body: CreateVideo) -> None:
        if body.draft_id is None and not (body.prompt or "").strip():
            raise ApiError(400, "missing_prompt", "there is no prompt", param="prompt")
        most = self.settings.limits.prompt_characters
        for name in ("prompt", "negative_prompt"):
            text = getattr(body, name)
            if text is None:
                continue
            if len(text) > most:
                message = f"{name} has {len(text)} characters, and at most {most} are taken"
                raise ApiError(400, "too_long", message, param=name)
            try:
                check_text(name, text)
            except BadRequest as error:
                raise ApiError(400, "not_text", str(error), param=name) from error
        if body.model not in (None, self.settings.model_name):
            message = f"there is no model {body.model!a:.80}; this is {self.settings.model_name!a}"
            raise ApiError(404, "model_not_found", message, param="model")

    def _check_numbers(self, body: CreateVideo, key: str | None) -> None:
        most = self.settings.limits.clips_per_request
        seed = -1 if body.seed is None else body.seed
        for name, value, least, largest in (
            ("n", body.n, 1, most),
            ("priority", body.priority, *PRIORITIES),
            ("seed", seed, -1, MAX_SEED - most),
        ):
            if not least <= value <= largest:
                message = f"{name} is {str(value)[:40]}, wanted {least} to {largest}"
                raise ApiError(400, "out_of_range", message, param=name)
        if key is not None and not 1 <= len(key) <= 255:
            raise ApiError(400, "invalid_idempotency_key", "Idempotency-Key: 1 to 255 characters")

    def _preset(self, body: CreateVideo, draft: Job | None) -> tuple[str, Preset]:
        """Return the preset of a request, with its frames and their speed."""
        presets = self.settings.presets
        name = self._name(body, draft)
        preset = presets[name]
        if body.size is not None:
            _require_size(body, preset, presets)
        if draft is not None:
            return name, _finishing(preset, name, draft)
        video = preset.video
        if body.fps is not None:
            video = replace(video, fps=body.fps)
        if body.seconds is not None:
            frames = _frames(body.seconds, video.fps, preset.video.frames)
            video = replace(video, frames=frames)
        preset = replace(preset, video=video)
        try:
            check_preset(preset, "this request")
        except BadRequest as error:
            raise ApiError(400, "invalid_value", str(error), param="fps") from error
        return name, preset

    def _name(self, body: CreateVideo, draft: Job | None) -> str:
        presets = self.settings.presets
        if body.preset is not None:
            if body.preset not in presets:
                message = f"there is no preset {body.preset[:80]!a}: on offer are {_names(presets)}"
                raise ApiError(400, "unknown_preset", message, param="preset")
            return body.preset
        if body.size is not None:
            size = _pixels(body.size)
            for name, preset in presets.items():
                if size == _size(_last(preset, draft_only=body.draft_only)):
                    return name
            nearest = min(
                presets,
                key=lambda name: abs(math.log(_area(_last(presets[name])) / (size[0] * size[1]))),
            )
            width, height = _size(_last(presets[nearest], draft_only=body.draft_only))
            message = f"no preset has the size {body.size}: the nearest is {width}x{height}"
            message += f" ({nearest}); on offer are {_names(presets)}"
            raise ApiError(400, "unknown_size", message, param="size")
        if draft is not None:
            finishing = self._finishing_default(draft)
            if finishing is None:
                message = "no preset on offer can finish this draft"
                raise ApiError(400, "other_draft", message, param="draft_id")
            return finishing
        return next(iter(presets))

    def _finishing_default(self, draft: Job) -> str | None:
        """Return the draft's own preset, or the first that can finish it."""
        numbers = preset_of(draft).draft
        able = [
            name
            for name, preset in self.settings.presets.items()
            if preset.highres is not None and preset.draft == numbers
        ]
        return draft.preset_name if draft.preset_name in able else next(iter(able), None)

    def _require_fit(self, name: str, *, draft_only: bool) -> None:
        fit = self.fits.get(name)
        if fit is None or (fit.draft_fits if draft_only else fit.fits):
            return
        area = _area(_last(self.settings.presets[name]))
        able = [
            other
            for other, found in self.fits.items()
            if found.fits and other in self.settings.presets
        ]
        nearest = min(
            able,
            key=lambda other: abs(math.log(_area(_last(self.settings.presets[other])) / area)),
            default=None,
        )
        do = "no preset on offer fits" if nearest is None else f"the nearest that fits: {nearest}"
        message = f"the preset {name} does not fit into this server's memory; {do}. {fit.reason}"
        raise ApiError(400, "does_not_fit", message, param="preset")


def require_id(job_id: str, param: str) -> str:
    """Return an id that has the form of one. Raises ApiError."""
    if not ID.fullmatch(job_id):
        message = f"{job_id[:80]!a} is not the id of a video"
        raise ApiError(404 if param == "video_id" else 400, "not_found", message, param=param)
    return job_id


def _require_finishable(body: CreateVideo, draft: Job) -> None:
    """Raise ApiError where a draft is not there, or a field contradicts it."""
    if not draft.draft_ready:
        message = f"the draft of {draft.id} is not there yet: it is {draft.status}"
        raise ApiError(409, "draft_not_ready", message, param="draft_id")
    if body.draft_only or body.n != 1:
        raise ApiError(
            400,
            "contradiction",
            "draft_id finishes one draft: leave draft_only and n out",
            param="draft_only" if body.draft_only else "n",
        )
    video = draft.preset["video"]
    for name, given, had in (
        ("prompt", body.prompt, draft.prompt),
        ("negative_prompt", body.negative_prompt, draft.negative),
        ("seed", body.seed, draft.seed),
        ("fps", body.fps, video["fps"]),
    ):
        if given is not None and given != had:
            message = f"{name} is the draft's, {str(had)[:80]!a}: leave it out"
            raise ApiError(400, "contradiction", message, param=name)
    if body.seconds is not None and _number(body.seconds) != _number(
        seconds_of(video["frames"], video["fps"])
    ):
        raise ApiError(
            400, "contradiction", "seconds are the draft's: leave them out", param="seconds"
        )


def _finishing(preset: Preset, name: str, draft: Job) -> Preset:
    """Return a preset with the frames of a draft. Raises ApiError where its draft is another."""
    made = preset_of(draft)
    if preset.highres is None:
        raise ApiError(400, "no_highres", f"the preset {name} ends with the draft", param="preset")
    if preset.draft != made.draft or preset.compat != made.compat:
        message = f"the preset {name} has other drafts than {draft.preset_name}, which made this"
        raise ApiError(400, "other_draft", message, param="preset")
    return replace(preset, video=made.video)


def _frames(seconds: str | float, fps: int, most: int) -> int:
    """Return the frames (4n + 1) of a clip: 5 seconds at 24 a second are 121. Raises ApiError."""
    asked = _number(seconds)
    if asked is None or not 0 < asked <= 86_400:
        message = f"seconds is {str(seconds)[:40]!a}, wanted a number above 0, 86400 at most"
        raise ApiError(400, "invalid_value", message, param="seconds")
    if not 1 <= fps <= 1000:
        raise ApiError(400, "out_of_range", f"fps is {fps}, wanted 1 to 1000", param="fps")
    frames = 4 * max(0, round(asked * fps / 4)) + 1
    longest = (most - 1) / fps
    if frames > most:
        message = f"{asked:g} s at {fps} frames per second are {frames} frames, and the preset has "
        message += f"{most} at most: the nearest are {longest:.4g} s"
        raise ApiError(400, "too_long", message, param="seconds")
    if abs((frames - 1) / fps - asked) > 0.001 * max(1.0, asked):
        message = f"a clip has 4n + 1 frames: {asked:g} s at {fps} frames per second cannot be "
        message += f"made, the nearest are {max(frames - 1, 0) / fps:.4g} s"
        raise ApiError(400, "invalid_value", message, param="seconds")
    return frames


def _number(seconds: str | float) -> float | None:
    try:
        value = float(seconds)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _seed(body: CreateVideo) -> int:
    return secrets.randbelow(2**31) if body.seed in (None, -1) else int(body.seed or 0)


def _require_size(body: CreateVideo, preset: Preset, presets: Mapping[str, Preset]) -> None:
    """Raise ApiError where the size is not the preset's."""
    width, height = _size(_last(preset, draft_only=body.draft_only))
    if _pixels(body.size or "") != (width, height):
        message = f"the preset has the size {width}x{height}: leave size out, or choose another "
        message += f"preset ({_names(presets)})"
        raise ApiError(400, "contradiction", message, param="size")


def _pixels(size: str) -> tuple[int, int]:
    match = _SIZE.fullmatch(size)
    if match is None or not int(match[1]) or not int(match[2]):
        message = f"size is {size[:40]!a}, wanted WIDTHxHEIGHT, 2560x1440 for instance"
        raise ApiError(400, "invalid_value", message, param="size")
    return int(match[1]), int(match[2])


def _last(preset: Preset, *, draft_only: bool = False) -> StageConfig:
    return list(preset.stages(draft_only=draft_only).values())[-1]


def _size(stage: StageConfig) -> tuple[int, int]:
    return stage.width, stage.height


def _area(stage: StageConfig) -> int:
    return stage.width * stage.height


def _names(presets: Mapping[str, Preset]) -> str:
    return ", ".join(
        f"{name} ({stage.width}x{stage.height})"
        for name, stage in ((name, _last(preset)) for name, preset in presets.items())
    )
