# SPDX-License-Identifier: Apache-2.0
"""A lock on a folder: one run at a time writes into it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from pw_runtime.errors import BadRequest, WriteFailed
from pw_runtime.system.input_files import kind_of

NAME = ".pw.lock"
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})  # of a disk that takes no file


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of an existing folder while the block runs.

    The system releases the lock when its holder ends, however it ends.

    Raises:
        BadRequest: another run holds it, or the folder cannot be locked.
        WriteFailed: the disk takes no further file.
    """
    path = folder / NAME
    descriptor = _acquire(path)
    try:
        with suppress(OSError):  # why silent: a full disk; it only names the holder to others
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        # Removed while it is held: whoever opened it before finds that its name is gone.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """Return the descriptor of the locked file."""
    while True:
        _require_own_file(path)
        try:
            # A link is not followed: its target would be emptied.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(path, flags, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise BadRequest(
                f"another run is writing into {path.parent}",
                got=owner,
                do="wait until it has ended, or choose another folder",
            ) from error
        except OSError as error:
            kind = WriteFailed if error.errno in FULL else BadRequest
            raise kind(
                f"cannot lock the output folder {path.parent}",
                got=error.strerror,
                do="choose an --out on a file system that supports locks, and that you may write",
            ) from error
        if _is_current(descriptor, path):
            return descriptor
        os.close(descriptor)  # its holder removed it before we got the lock


def _require_own_file(path: Path) -> None:
    """Raise BadRequest where something stands at the lock's name that is no file."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:  # not there; or opening it says what is wrong
        return
    if not stat.S_ISREG(mode):
        raise BadRequest(
            f"cannot lock the output folder {path.parent}",
            got=f"{path.name}, which is {'a link' if stat.S_ISLNK(mode) else kind_of(mode)}",
            do="remove it, or choose another --out",
        )


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
