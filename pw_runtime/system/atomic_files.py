# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pw_runtime.errors import BadRequest, WriteFailed
from pw_runtime.system.input_files import kind_of

if TYPE_CHECKING:
    from torch import Tensor

_GIB = 2**30
_PARTIAL = re.compile(r"\.(.+)\.(\d+)(?:\.folder)?\.partial", re.DOTALL)  # `partial_name`
_ROOM_BYTES = 16 * 2**20  # for headers, indices and the file system's own use


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it becomes `path`.

    The file and its folder are on the disk when this returns. After any exception, Ctrl-C
    included, the temporary file is gone and an earlier `path` is as it was. Two processes that
    write one path do not meet: the last one to finish wins. A link is followed, as a shell's `>`
    follows it: the link stays, and the file that it names is replaced.

    Raises WriteFailed when the system refuses the file, or something stands there that is no file;
    an OSError that names some other file passes through as it is.
    """
    final = _replaceable(path)
    partial = partial_name(final)
    try:
        for leftover in stale_partials(final):
            remove(leftover)
        yield partial
        _sync(partial)
        _replaceable(final)  # it may have changed while the file was made
        os.replace(partial, final)
        _sync(final.parent)
    except OSError as error:
        if error.filename not in (None, str(partial), str(final), str(final.parent)):
            raise
        raise write_failed(path, error) from error
    finally:
        # Gone after a success; any other error has been raised by then.
        with suppress(OSError):
            partial.unlink()


@contextmanager
def atomic_folder(out: Path, num_bytes: int, say: Callable[[str], None]) -> Iterator[Path]:
    """Yield a new folder beside `out` that becomes `out` when the block ends well.

    After any exception, Ctrl-C included, it is gone. What a process left that was killed
    meanwhile is removed by the next call for the same `out`, which says so. `num_bytes` is how
    much will be written. Everything in the folder must have been synced by the block.

    Raises BadRequest when `out` exists, WriteFailed when there is no room or the disk refuses.
    """
    out = out.absolute()
    require_absent(out)
    partial = partial_name(out)
    with _as_write_failed(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out, say)
        require_room(out.parent, num_bytes)
    try:
        with _as_write_failed(out):
            partial.mkdir()
            yield partial
            os.rename(partial, out)
            _sync(out.parent)
    finally:
        # why: nothing is left after the rename; what cannot be removed goes at the next start
        shutil.rmtree(partial, ignore_errors=True)


def require_replaceable(path: Path) -> None:
    """Raise BadRequest where `path` could not be written, because of what stands there.

    Its folder must exist and be writable.
    """
    try:
        final = _replaceable(path)
    except WriteFailed as error:
        raise BadRequest(str(error)) from error
    folder = final.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadRequest(
            f"cannot write {path}",
            got=f"no permission to write into {folder}" if folder.is_dir() else "no such folder",
            do="choose another place" if folder.is_dir() else f"create the folder {folder}",
        )


def _replaceable(path: Path) -> Path:
    """Return the path of the file to write: `path`, or the one that a link of that name leads to.

    Raises WriteFailed for a folder, a device, a pipe and a socket: replacing them by a file would
    take them from everyone; and for a link of another user, who could choose what is replaced.
    """
    with _as_write_failed(path):
        try:
            own = os.lstat(path)
            status = os.stat(path)
        except FileNotFoundError:  # nothing is there, or nothing where a link points
            return _target_of_link(path) if path.is_symlink() else path
    if stat.S_ISLNK(own.st_mode) and hasattr(os, "geteuid") and own.st_uid not in (0, os.geteuid()):
        raise WriteFailed(
            f"cannot write {path}",
            got="a link that belongs to another user",
            do="remove the link, or choose another place",
        )
    if not stat.S_ISREG(status.st_mode):
        raise WriteFailed(
            f"cannot write {path}",
            got=kind_of(status.st_mode),
            wanted="a file, or a name that is free",
            do="choose another name; nothing but a file is ever replaced",
        )
    return Path(os.path.realpath(path)) if stat.S_ISLNK(own.st_mode) else path


def _target_of_link(link: Path) -> Path:
    """Return the new file that a link names. Raises WriteFailed where its folder is not there."""
    target = Path(os.path.realpath(link))
    if not target.parent.is_dir():
        raise WriteFailed(
            f"cannot write {link}",
            got=f"a link to {target}, whose folder does not exist",
            do=f"remove the link, or create the folder {target.parent}",
        )
    return target


def require_absent(out: Path) -> None:
    """Raise BadRequest when there is anything at `out`."""
    if os.path.lexists(out):
        raise BadRequest(
            f"{out} exists already",
            got="a path in use",
            wanted="a new one; nothing is ever overwritten",
            do="choose another path, or remove it yourself",
        )


def _remove_stale(out: Path, say: Callable[[str], None]) -> None:
    for folder in stale_partials(out):
        say(f"removing {folder.name}, left by a process that was killed")
        shutil.rmtree(folder)


def require_room(folder: Path, num_bytes: int) -> None:
    """Raise WriteFailed where a folder's disk has less room than that."""
    needed = num_bytes + _ROOM_BYTES
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise WriteFailed(
            f"{folder} cannot be used", got=error.strerror, do="create it again, or choose another"
        ) from error
    if free < needed:
        lacking = WriteFailed(
            f"not enough room in {folder}",
            got=f"{_in_units(free)} free",
            wanted=_in_units(needed),
            do="free some space, or choose a folder on another disk",
        )
        lacking.disk_full = True
        raise lacking


def _in_units(num_bytes: int) -> str:
    """Return a size in GiB, or in MiB where that would show little but zeros."""
    if num_bytes < _GIB:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / _GIB:.2f} GiB"


@contextmanager
def _as_write_failed(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_failed(path, error) from error


def partial_name(path: Path) -> Path:
    """Return the temporary name under which this process writes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def stale_partials(path: Path) -> list[Path]:
    """List the temporary files and folders of `path` that killed processes left."""
    stale = []
    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        match = _PARTIAL.fullmatch(entry.name)
        if match and match[1] == path.name and not _alive(int(match[2])):
            stale.append(entry)
    return stale


def partial_of(name: str) -> str | None:
    """Return the name that a temporary file or folder would get; None for any other name."""
    match = _PARTIAL.fullmatch(name)
    return match[1] if match else None


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    # This process has written nothing yet; in containers a killed one often had the same number.
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

    # In a folder of its own: safetensors writes a temporary file of an unknown name beside its
    # target, which would stay for ever after a kill.
    with atomic_file(path) as partial:
        folder = partial.with_suffix(".folder.partial")
        try:
            folder.mkdir()
            file = folder / path.name
            save_file(dict(tensors), file, metadata={"format": "pt", **(metadata or {})})
            # Safetensors lets only the owner read its files; the new folder has the umask's mode.
            file.chmod(folder.stat().st_mode & 0o666)
            file.rename(partial)
        except (OSError, SafetensorError) as error:  # the latter also for a full disk
            raise write_failed(path, error) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_failed(path: Path, error: Exception) -> WriteFailed:
    """Return the error that `path` could not be written, with the reason and what to do."""
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
        remedy = "fix the cause and run the same command again"
    failed = WriteFailed(f"cannot write {path}", got=reason, do=remedy)
    failed.disk_full = number in (errno.ENOSPC, errno.EDQUOT)
    return failed


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
