# SPDX-License-Identifier: Apache-2.0
"""The driver's side of the output folder: it alone puts clips there, each complete and once."""

from __future__ import annotations

import hashlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pw_runtime.errors import WriteFailed
from pw_runtime.fleet.messages import StagedFile
from pw_runtime.system.atomic_files import atomic_file, write_failed
from pw_runtime.system.folder_lock import locked_folder

STAGING = ".fleet"  # folder of workers that see the output folder; its name names no clip
VISIBLE_SECONDS = 60.0  # a network file system may show a new file that much later elsewhere


class StagedFileLost(Exception):
    """A file that a worker announced is not there, or not as it was announced."""


class OutputFolder:
    """Takes files from workers' folders, or from the workers themselves, into the output folder."""

    def __init__(self, out: Path) -> None:
        """Name the folder; it exists."""
        self.out, self.staging = out, out / STAGING
        self.token = secrets.token_hex(16)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep other runs out, with an empty staging folder that has the token, inside the block.

        What a driver that was killed left there is removed.

        Raises:
            BadRequest: another run writes into the folder.
            WriteFailed: the staging folder cannot be made.
        """
        with locked_folder(self.out):
            try:
                shutil.rmtree(self.staging, ignore_errors=True)
                self.staging.mkdir()
                (self.staging / "token").write_text(self.token, encoding="utf-8")
            except OSError as error:
                raise write_failed(self.staging, error) from error
            try:
                yield
            finally:
                shutil.rmtree(self.staging, ignore_errors=True)

    def publish(self, folder: Path, files: Sequence[StagedFile]) -> Path:
        """Move complete files from a folder of the same file system; return the last one's path.

        Each appears whole, in the order given: the receipt before the video.

        Raises:
            StagedFileLost: a file is not in the folder, or of another size.
            WriteFailed: the output folder refuses a file.
        """
        for file in files:
            _wait_for(folder / file.name, file.bytes)
        path = self.out
        for file in files:
            path = self.out / file.name
            with atomic_file(path) as partial:
                shutil.move(folder / file.name, partial)
        return path

    def receive(
        self, worker: str, files: Sequence[StagedFile], read: Callable[[str, int], bytes]
    ) -> Path:
        """Copy files from a worker that does not see the folder; return the folder they are in.

        Args:
            worker: its name.
            files: to copy.
            read: returns the next piece of a file, by its name and the bytes read so far.

        Raises:
            StagedFileLost: the bytes are not those that were announced.
            WriteFailed: the staging folder refuses a file.
        """
        folder = self.staging / worker
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise write_failed(folder, error) from error
        for file in files:
            with atomic_file(folder / file.name) as partial:
                digest = _copy(file, read, partial)
            if digest != file.sha256:
                raise StagedFileLost(f"{file.name} arrived with SHA-256 {digest[:12]}...")
        return folder

    def remove(self, name: str) -> None:
        """Remove a file that is not needed any more. Raises WriteFailed."""
        path = self.out / name
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise WriteFailed(f"cannot remove {path}", got=error.strerror) from error


def _copy(file: StagedFile, read: Callable[[str, int], bytes], path: Path) -> str:
    """Write a file piece by piece; return its SHA-256."""
    digest, offset = hashlib.sha256(), 0
    with path.open("wb") as target:
        while offset < file.bytes:
            piece = read(file.name, offset)
            if not piece:
                raise StagedFileLost(f"{file.name} ends at {offset} of {file.bytes} bytes")
            target.write(piece)
            digest.update(piece)
            offset += len(piece)
    return digest.hexdigest()


def _wait_for(path: Path, size: int) -> None:
    """Wait until a file is visible in full. Raises StagedFileLost where it is not."""
    end = time.monotonic() + VISIBLE_SECONDS
    while True:
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            found = None
        if found == size:
            return
        if time.monotonic() > end:
            raise StagedFileLost(f"{path} has {found} bytes, wanted {size}")
        time.sleep(0.2)
