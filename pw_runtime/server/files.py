# SPDX-License-Identifier: Apache-2.0
"""Files of the jobs below the server's root, found by ids that were checked before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

from pw_runtime.server.api_error import ApiError
from pw_runtime.server.store import Job
from pw_runtime.server.video import ID, ends_with_draft
from pw_runtime.system.atomic_files import atomic_file, write_failed

Variant = Literal["video", "draft", "thumbnail"]
CLIP: Final = "0"  # id of a job's one prompt
LATENTS: Final = f"{CLIP}.latents.safetensors"
THUMBNAIL: Final = "thumbnail.jpg"
PICTURE: Final = "picture"  # that the clip starts from, in any format


def folder_of(root: Path, job_id: str) -> Path:
    """Return the folder of a job."""
    assert ID.fullmatch(job_id), "ids are checked where they come in"
    return root / "jobs" / job_id


def never_accepted(root: Path, accepted: Collection[str]) -> list[str]:
    """Return the ids of folders of requests that a kill cut short before they were accepted.

    They have a picture or nothing. Others without a record are of a queue that was lost.
    """
    folders = [path for path in (root / "jobs").iterdir() if ID.fullmatch(path.name)]
    return [
        path.name
        for path in folders
        if path.name not in accepted and all(PICTURE in file.name for file in path.iterdir())
    ]


def content(root: Path, job: Job, variant: Variant) -> Path:
    """Return the path of a variant of a job's video, whether or not it is there."""
    folder = folder_of(root, job.id)
    if variant == "thumbnail":
        return folder / THUMBNAIL
    last = "draft" if variant == "draft" or ends_with_draft(job) else "final"
    return folder / last / f"{CLIP}.mp4"


def receipt(root: Path, job: Job) -> Path:
    """Return the path of the receipt of a job's video."""
    return content(root, job, "video").with_suffix(".json")


def picture_of(root: Path, job: Job) -> bytes | None:
    """Return the picture that a job starts from. Raises ApiError where it is gone."""
    if job.picture is None:
        return None
    try:
        return (folder_of(root, job.id) / PICTURE).read_bytes()
    except OSError as error:
        message = f"the picture that {job.id} starts from is gone"
        raise ApiError(404, "file_gone", message, param="draft_id") from error


def keep_picture(root: Path, job_ids: Iterable[str], content: bytes) -> None:
    """Write the picture that jobs start from into their folders. Raises WriteFailed."""
    for job_id in job_ids:
        try:
            folder_of(root, job_id).mkdir(exist_ok=True)
        except OSError as error:
            raise write_failed(folder_of(root, job_id), error) from error
        with atomic_file(folder_of(root, job_id) / PICTURE) as partial:
            partial.write_bytes(content)


def adopt_draft(root: Path, source_id: str, job_id: str) -> bool:
    """Give a job the draft of another one, which may be removed afterwards.

    False where some of it could not be given; the job then computes the draft again.
    """
    source, target = folder_of(root, source_id), folder_of(root, job_id)
    names = [f"draft/{CLIP}.mp4", f"draft/{CLIP}.json", f"draft/{LATENTS}", THUMBNAIL]
    try:
        (target / "draft").mkdir(parents=True, exist_ok=True)
        for name in names:
            _link(source / name, target / name)
    except OSError:
        shutil.rmtree(target / "draft", ignore_errors=True)
        (target / THUMBNAIL).unlink(missing_ok=True)
        with suppress(OSError):  # its picture is there
            target.rmdir()
        return False
    return True


def _link(source: Path, target: Path) -> None:
    with suppress(FileExistsError):
        try:
            os.link(source, target)
        except FileNotFoundError:
            raise
        except OSError:  # a file system without links
            partial = target.with_name(f".{target.name}.partial")
            shutil.copyfile(source, partial)
            os.replace(partial, target)


def size_of(root: Path, job_id: str) -> int:
    """Return the bytes of a job's files."""
    return _bytes_below(folder_of(root, job_id))


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            status = path.lstat()
            total += status.st_blocks * 512
    return total


def unfinished_bytes(root: Path, job_id: str) -> int:
    """Return the bytes of what `drop_unfinished` would remove, but for a draft."""
    return _bytes_below(folder_of(root, job_id) / "final")


def drop_unfinished(root: Path, job_id: str, *, draft_ready: bool) -> None:
    """Remove what a job that has failed had computed, but for a draft that is ready."""
    folder = folder_of(root, job_id)
    shutil.rmtree(folder / "final", ignore_errors=True)
    if not draft_ready:
        shutil.rmtree(folder / "draft", ignore_errors=True)


def remove(root: Path, job_id: str) -> None:
    """Remove a job's files. Raises OSError."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder_of(root, job_id))
