# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pw_runtime.errors import WriteFailed

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it becomes `path`.

    The file and its folder are on the disk when this returns. After any exception, Ctrl-C
    included, the temporary file is gone and an earlier `path` is as it was.

    Raises WriteFailed when the system refuses the file; an OSError that names some other
    file passes through as it is.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except OSError as error:
        if error.filename not in (None, str(partial), str(path), str(path.parent)):
            raise
        raise write_failed(path, error) from error
    finally:
        # After a success, or where the folder does not exist, there is nothing to remove.
        with suppress(FileNotFoundError, NotADirectoryError):
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all. Raises WriteFailed."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous tensors as safetensors, whole or not at all. Raises WriteFailed."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_file(path) as partial:
        try:
            save_file(dict(tensors), partial, metadata={"format": "pt"})
        except SafetensorError as error:  # its name for a full disk, too
            raise write_failed(path, error) from error
        # Safetensors lets only the owner read its files, whatever the umask.
        partial.chmod(path.parent.stat().st_mode & 0o666)


def write_failed(path: Path, error: Exception) -> WriteFailed:
    """Say that `path` could not be written, why, and what to do about it."""
    number = getattr(error, "errno", None)
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if number in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        reason = f"{reason}, {free / 2**20:.1f} MiB free"
        remedy = "free some space or choose another folder"
    elif number in (errno.ENOENT, errno.ENOTDIR):
        remedy = f"create the folder {path.parent}"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR):
        remedy = "choose a place you may write to"
    else:
        remedy = "mend the cause and run the same command again"
    return WriteFailed(f"cannot write {path}", got=reason, do=remedy)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
