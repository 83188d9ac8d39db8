# SPDX-License-Identifier: Apache-2.0
"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pw_runtime.atomic import partial_name, stale_partials, write_failed
from pw_runtime.errors import BadRequest, WriteFailed

_GIB = 2**30
_ROOM_BYTES = 16 * 2**20  # for headers, indices and the file system's own use


@contextmanager
def folder_that_appears(out: Path, num_bytes: int, say: Callable[[str], None]) -> Iterator[Path]:
    """Yield a new folder beside `out` that becomes `out` when the block ends well.

    After any exception, Ctrl-C included, it is gone. What a process left that was killed
    meanwhile is removed by the next call for the same `out`, which says so. `num_bytes` is how
    much will be written. Everything in the folder must have been synced by the block.

    Raises BadRequest when `out` exists, WriteFailed when there is no room or the disk refuses.
    """
    out = out.absolute()
    refuse_existing(out)
    partial = partial_name(out)
    with _refusals(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out, say)
        _check_room(out, num_bytes)
    try:
        with _refusals(out):
            partial.mkdir()
            yield partial
            os.rename(partial, out)
            _sync(out.parent)
    finally:
        # why: nothing is left after the rename; what cannot be removed goes at the next start
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    """Raise BadRequest when there is anything at `out`."""
    if os.path.lexists(out):
        raise BadRequest(
            f"{out} exists already",
            got="a path in use",
            wanted="a new one; nothing is ever overwritten",
            do="choose another --out, or remove it yourself",
        )


def _sweep(out: Path, say: Callable[[str], None]) -> None:
    for folder in stale_partials(out):
        say(f"removing {folder.name}, left by a process that was killed")
        shutil.rmtree(folder)


def _check_room(out: Path, num_bytes: int) -> None:
    needed = num_bytes + _ROOM_BYTES
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise WriteFailed(
            f"there is not enough room for {out}",
            got=f"{free / _GIB:.2f} GiB free in {out.parent}",
            wanted=f"{needed / _GIB:.2f} GiB",
            do="free some space or choose another folder for --out",
        )


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_failed(path, error) from error


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
