# SPDX-License-Identifier: Apache-2.0
"""Folders that the program uses beside its output: the cache and the system's temporary folder.

Imports the standard library alone, as the doctor does.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from pw_runtime.errors import BadRequest

MEASURED = "kernels"  # folder of the cache with measurements of kernels


def cache_root() -> Path:
    """Return the folder of built engines and converted bundles: $PW_CACHE, or the user's cache."""
    named = os.environ.get("PW_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(base) / "pixelwizard"


def check_cache(folder: Path | None = None) -> None:
    """Raise BadRequest where a folder of the cache, or the cache, has a file in its place.

    Nothing in it would be found, as if nothing had been built.
    """
    folder = (folder or cache_root()).absolute()
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise BadRequest(
                f"the cache folder {folder} cannot be used",
                got=f"{path} is a file",
                wanted="a folder, or a path where one can be made",
                do="set PW_CACHE to another folder, or move that file away",
            )


def temporary_folder() -> Path:
    """Return the folder for temporary files.

    Raises BadRequest where TMPDIR names no folder that can be written, and where there is none.
    """
    named = os.environ.get("TMPDIR")
    if named and not (os.path.isdir(named) and os.access(named, os.W_OK | os.X_OK)):
        fault = "not writable" if os.path.isdir(named) else "no folder"
        raise BadRequest(
            "the folder for temporary files cannot be used",
            got=f"TMPDIR={named}, which is {fault}",
            do="create that folder, or set TMPDIR to another one",
        )
    return Path(named or _default_temporary())


def _default_temporary() -> str:
    """Return /tmp or its like; tempfile remembers its first answer, and tries to write there."""
    try:
        return tempfile.gettempdir()
    except FileNotFoundError as error:
        raise BadRequest(
            "there is no folder for temporary files",
            got=error.strerror or str(error),
            do="free space in one of these, or set TMPDIR to a folder with room",
        ) from error


def require_temporary_room(num_bytes: int, purpose: str) -> None:
    """Raise BadRequest where the folder for temporary files has less room than `num_bytes`.

    Args:
        num_bytes: room that is needed.
        purpose: what needs it, such as "building engines".
    """
    folder = temporary_folder()
    free = free_bytes(folder)
    if free < num_bytes:
        raise BadRequest(
            f"not enough room for temporary files in {folder}",
            got=f"{free / 2**20:.1f} MiB free",
            wanted=f"{num_bytes / 2**20:.0f} MiB for {purpose}",
            do="free some space there, or set TMPDIR to a folder on another disk",
        )


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that holds `path`, or that would if it were made."""
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
