# SPDX-License-Identifier: Apache-2.0
"""Folders whose content is believed, because nobody else can have put it there.

An engine is a program: whoever can write into the folder it is loaded from runs code as its user.
"""

from __future__ import annotations

import os
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PRIVATE: Final = 0o700
_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True)
class Fault:
    """Why others could have put files into a folder, and the command that mends it."""

    reason: str
    remedy: str


def make_private(folder: Path) -> None:
    """Create a folder and the one it stands in for their owner alone. Raises OSError."""
    for path in (folder.parent, folder):
        path.mkdir(mode=PRIVATE, parents=True, exist_ok=True)


def distrust(folder: Path) -> Fault | None:
    """Return why others could have put files into a folder, or None if they cannot.

    The folder, and the one it stands in, must belong to this user or to root, and nobody else may
    write there; a folder such as /tmp, in which others cannot rename, is good enough for the one
    above. A folder that does not exist is no fault, nor is anything on systems without users.
    """
    if not hasattr(os, "geteuid") or not folder.exists():
        return None
    for path in (folder, folder.parent):
        status = path.stat()
        if status.st_uid not in (0, os.geteuid()):
            return Fault(
                f"{path} belongs to user {status.st_uid}",
                f"chown -R {os.geteuid()} {shlex.quote(str(path))}",
            )
        shared = status.st_mode & _OTHERS
        if shared and not (path is not folder and status.st_mode & stat.S_ISVTX):
            return Fault(
                f"others can write into {path} (mode {stat.S_IMODE(status.st_mode):o})",
                f"chmod go-w {shlex.quote(str(path))}",
            )
    return None


def foreign(path: Path) -> str:
    """Return why a file or folder inside a trusted folder is another user's; empty if it is not."""
    if not hasattr(os, "geteuid"):
        return ""
    try:
        owner = path.stat().st_uid
    except OSError:  # who reads it next says what is wrong
        return ""
    return "" if owner in (0, os.geteuid()) else f"{path.name} belongs to user {owner}"
