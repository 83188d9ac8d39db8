# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
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
    included, the temporary file is gone and an earlier `path` is as it was. Two processes that
    write one path do not meet: the last one to finish wins.

    Raises WriteFailed when the system refuses the file; an OSError that names some other
    file passes through as it is.
    """
    partial = partial_name(path)
    try:
        for leftover in stale_partials(path):
            leftover.unlink()
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except OSError as error:
        if error.filename not in (None, str(partial), str(path), str(path.parent)):
            raise
        raise write_failed(path, error) from error
    finally:
        # Gone after a success; whatever else is wrong with it has been said by then.
        with suppress(OSError):
            partial.unlink()


def partial_name(path: Path) -> Path:
    """The name under which this process makes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def stale_partials(path: Path) -> list[Path]:
    """What killed processes left of `path`."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"(\d+)\.partial")
    found = []
    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        match = pattern.fullmatch(entry.name)
        if match and not _alive(int(match[1])):
            found.append(entry)
    return found


def _alive(pid: int) -> bool:
    # This process has made nothing yet; in containers a killed one often had the same number.
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all. Raises WriteFailed."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write contiguous tensors as safetensors, whole or not at all. Raises WriteFailed."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_file(path) as partial:
        try:
            save_file(dict(tensors), partial, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # its name for a full disk, too
            raise write_failed(path, error) from error
        # Safetensors lets only the owner read its files, whatever the umask.
        partial.chmod(path.parent.stat().st_mode & 0o666)


def write_failed(path: Path, error: Exception) -> WriteFailed:
    """Say that `path` could not be written, why, and what to do about it."""
    number = getattr(error, "errno", None)
    if number is None and (named := re.search(r"os error (\d+)", str(error))):
        number = int(named[1])  # safetensors has no other way to say it
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
