# SPDX-License-Identifier: Apache-2.0
"""Cache folders: only what this user put there is used."""

from __future__ import annotations

from pathlib import Path

from pw_runtime.errors import BadRequest, WriteFailed


def trusted_folder(folder: Path) -> Path:
    """Return a cache folder, created for this user alone if it was not there.

    Raises:
        BadRequest: others own it or can write into it.
        WriteFailed: it cannot be created.
    """
    from pw_engines.trust import distrust, make_private  # imports torch

    try:
        make_private(folder)
    except OSError as error:
        raise WriteFailed(
            f"cannot create the cache folder {folder}",
            got=error.strerror,
            do="set PW_CACHE to another folder",
        ) from error
    if fault := distrust(folder):
        raise BadRequest(
            f"the cache folder {folder} is not used",
            got=fault.reason,
            wanted="a folder that only you can write to",
            do=f"look at what is in it, then `{fault.remedy}`, or set PW_CACHE to another folder",
        )
    return folder
