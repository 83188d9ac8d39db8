# SPDX-License-Identifier: Apache-2.0
"""One conversion at a time for one bundle; whoever comes second waits for the first."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pw_export.checkpoints.layouts import source_files
from pw_runtime.errors import BadRequest
from pw_runtime.system.atomic_files import write_failed


def fingerprint(wan: Path, draft: Path | None, highres: Path | None) -> str:
    """Return a digest of name, path, size and modification time of all that may be converted."""
    digest = hashlib.sha256()
    for role, source in (("wan", wan), ("draft", draft), ("highres", highres)):
        if source is None:
            continue
        for file in source_files(source) if source.is_dir() else [source]:
            with suppress(OSError):  # gone since it was listed, or named by whoever opens it
                state = file.stat()
                names = f"{role}\0{file.relative_to(source)}\0{file.resolve()}"
                digest.update(f"{names}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:20]


@contextmanager
def one_conversion(out: Path, sources: str, say: Callable[[str], None]) -> Iterator[None]:
    """Run the block while no other process makes the bundle `out`; wait for one that does.

    The lock is a file beside `out`; the system releases it when its holder ends, however it ends.

    Args:
        out: the bundle.
        sources: what it is made from, as a text of any length.
        say: called with a line before waiting.

    Raises BadRequest where the other process makes it from other sources,
    WriteFailed where the lock cannot be created.
    """
    path = out.absolute().with_name(f".{out.absolute().name}.lock")
    digest = hashlib.sha256(sources.encode()).hexdigest()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path, out, digest, say)
    except OSError as error:
        raise write_failed(out.absolute(), error) from error
    try:
        yield
    finally:
        # Removed while it is held: whoever opened it before finds that its name is gone.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _locked(path: Path, out: Path, sources: str, say: Callable[[str], None]) -> int:
    """Return the descriptor of the locked file: it holds our number and the digest `sources`."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _require_same(
                    os.pread(descriptor, 100, 0).decode(errors="replace"), out, sources, say
                )
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_current(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} {sources}".encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it before we got the lock


def _require_same(owner: str, out: Path, sources: str, say: Callable[[str], None]) -> None:
    """Say whom we wait for. Raises BadRequest where they convert something else."""
    process, _, theirs = owner.partition(" ")
    if theirs and theirs != sources:
        raise BadRequest(
            f"process {process} is making {out} from another checkpoint",
            got="one name for two bundles",
            wanted="a new one",
            do="choose another --out, or wait and use that bundle",
        )
    say(f"waiting for {f'process {process}' if process else 'a process'}, which is making {out}")


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
