# SPDX-License-Identifier: Apache-2.0
"""The Video object of the API, made of a job and of how far it is."""

from __future__ import annotations

import re
import secrets
from typing import Any, Final, Literal

from pydantic import BaseModel, TypeAdapter

from pw_runtime.server.messages import Advanced, Stage
from pw_runtime.server.store import Job
from pw_runtime.types import Preset

ID: Final = re.compile(r"video_[0-9a-f]{32}")
_PRESET: TypeAdapter[Preset] = TypeAdapter(Preset)


class VideoError(BaseModel):
    """The reason why there is no video."""

    code: str
    message: str


class Files(BaseModel):
    """Files that can be fetched now."""

    video: bool
    draft: bool
    receipt: bool


class Video(BaseModel):
    """A job, in OpenAI's fields and, from `stage` on, in ours."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    seconds: str
    size: str
    remixed_from_video_id: str | None = None
    error: VideoError | None
    stage: Stage | None
    step: float | None
    steps: int | None
    seconds_left: float | None
    preset: str
    negative_prompt: str
    seed: int
    fps: int
    frames: int
    draft_only: bool
    draft_id: str | None
    draft_ready: bool
    queue_position: int | None
    client: str
    priority: int
    siblings: list[str]
    picture: str | None  # SHA-256 of the first frame's file
    files: Files


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """The answer to a deletion."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


def new_id() -> str:
    """Return the id of a new job."""
    return f"video_{secrets.token_hex(16)}"


def preset_numbers(preset: Preset) -> dict[str, Any]:
    """Return a preset as it is stored."""
    numbers: dict[str, Any] = _PRESET.dump_python(preset, mode="json")
    return numbers


def preset_of(job: Job) -> Preset:
    """Return the preset of a job."""
    return _PRESET.validate_python(job.preset)


def seconds_of(frames: int, fps: int) -> str:
    """Return the seconds of a clip as a request names them: 121 frames at 24 a second are "5"."""
    return f"{(frames - 1) / fps:.4g}"


def ends_with_draft(job: Job) -> bool:
    """Tell whether a job's draft is its video."""
    return job.draft_only or job.preset.get("highres") is None


def video_of(
    job: Job,
    *,
    model: str,
    advanced: Advanced | None = None,
    position: int | None = None,
    keep_seconds: float | None = None,
) -> Video:
    """Describe a job.

    Args:
        job: the job.
        model: id of the model.
        advanced: the last that its worker said.
        position: in the queue.
        keep_seconds: time after which a finished job is removed; None: never for its age.
    """
    draft, video = job.preset["draft"], job.preset["video"]
    stage = draft if ends_with_draft(job) else job.preset["highres"]
    complete = job.status == "completed"
    running = advanced if job.status == "in_progress" else None
    expires = None
    if keep_seconds is not None and job.completed_at is not None:
        expires = job.completed_at + int(keep_seconds)
    error = None
    if job.error_code is not None:
        error = VideoError(code=job.error_code, message=job.error_message or "")
    return Video(
        id=job.id,
        model=model,
        status=job.status,  # type: ignore[arg-type]
        progress=100 if complete else min(99, int(100 * running.fraction)) if running else 0,
        created_at=job.created_at,
        completed_at=job.completed_at if complete else None,
        expires_at=expires,
        prompt=job.prompt,
        seconds=seconds_of(video["frames"], video["fps"]),
        size=f"{stage['width']}x{stage['height']}",
        error=error,
        stage=running.stage if running else None,
        step=running.step if running else None,
        steps=running.steps if running else None,
        seconds_left=running.seconds_left if running else None,
        preset=job.preset_name,
        negative_prompt=job.negative,
        seed=job.seed,
        fps=video["fps"],
        frames=video["frames"],
        draft_only=job.draft_only,
        draft_id=job.draft_id,
        draft_ready=job.draft_ready,
        queue_position=position,
        client=job.client,
        priority=job.priority,
        siblings=job.siblings,
        picture=job.picture,
        files=Files(video=complete, draft=job.draft_ready, receipt=complete),
    )
