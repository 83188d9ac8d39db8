# SPDX-License-Identifier: Apache-2.0
"""Finished tiles of a clip on the disk, from which a decode that was killed goes on.

`<name>.tiles` holds the pixels of every tile, of all its frames; it gets its full size when it is
made, so that a disk is full at once or never. `<name>.tiles.state` says what they are and which
tiles are complete, each with its SHA-256; it is replaced whenever another one is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from pw_runtime.errors import WriteFailed
from pw_runtime.system.atomic_files import require_room, write_failed, write_text
from pw_runtime.system.input_files import UnreadableInput, kind_of, parse_json

FORMAT: Final = 1
STATE: Final = ".state"  # after the name of the file of tiles
MAX_STATE: Final = 2**20  # bytes of a state file
_PIECE: Final = 2**24  # bytes read at once

Shape = tuple[int, ...]


class TileStore:
    """The finished tiles of one clip.

    Attributes:
        finished: how many tiles, from the first one on, are complete.
    """

    def __init__(self, path: Path, made_of: Mapping[str, str], say: Callable[[str], None]) -> None:
        """Touch nothing yet.

        Args:
            path: of the pixels.
            made_of: everything that the pixels depend on, in words or digests, by name.
            say: tells the user about tiles of an earlier decode.
        """
        self.finished = 0
        self._path, self._state = path, state_of(path)
        self._made_of, self._say = dict(made_of), say
        self._file: int | None = None
        self._digests: list[str] = []
        self._shapes: tuple[Shape, ...] = ()
        self._frames = self._written = 0
        self._hash = hashlib.sha256()

    def open(self, shapes: Sequence[Shape], frames: int) -> None:
        """Make the file, or go on with the one that an earlier decode left.

        Args:
            shapes: of the pixels of one frame, by tile.
            frames: of the clip.

        Raises:
            WriteFailed: there is no room, or the disk refuses.
        """
        self._shapes, self._frames = tuple(shapes), frames
        for file in (self._path, self._state):
            _require_own(file)
        try:
            self._digests = self._complete_tiles()
            self.finished = len(self._digests)
            fresh = os.O_TRUNC if self.finished == 0 else 0
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | fresh
            self._file = os.open(self._path, flags, 0o644)
            if fresh:
                self._state.unlink(missing_ok=True)
                require_room(self._path.parent, self._start(len(shapes)))
                self._allocate()
        except (OSError, WriteFailed) as error:
            self.close()
            if isinstance(error, WriteFailed):
                raise
            raise write_failed(self._path, error) from error
        self._begin_tile()

    def write(self, pixels: Tensor) -> None:
        """Append pixels of the next frames, uint8, to the tile in progress. Raises WriteFailed."""
        data = pixels.contiguous().view(-1).numpy().data
        self._hash.update(data)
        position = self._start(self.finished) + self._written
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._handle, data[done:], position + done)
        except OSError as error:
            raise write_failed(self._path, error) from error
        self._written += len(data)

    def finish(self) -> None:
        """Complete the tile in progress: then it is on the disk. Raises WriteFailed."""
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise write_failed(self._path, error) from error
        digests = [*self._digests, self._hash.hexdigest()]
        write_text(self._state, json.dumps({**self._description, "finished": digests}))
        self._digests, self.finished = digests, len(digests)
        self._begin_tile()

    def read(self, tile: int, start: int, count: int) -> Tensor:
        """Return pixels of `count` frames of a complete tile, uint8. Raises WriteFailed."""
        shape = self._shapes[tile]
        pixels = torch.empty((count, *shape), dtype=torch.uint8)
        position = self._start(tile) + start * math.prod(shape)
        try:
            self._read_into(pixels.view(-1).numpy().data, position)
        except OSError as error:
            raise WriteFailed(
                f"cannot read the finished tiles in {self._path}",
                got=error.strerror or error,
                do="check the disk, and finish the clip from its latents",
            ) from error
        return pixels

    def close(self) -> None:
        """Close the file; it stays where tiles are complete."""
        if self._file is not None and self.finished == 0:
            # why: after a failure, which is told; the next decode of the clip makes them anew
            with suppress(OSError):
                remove_tiles(self._path)
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @property
    def _handle(self) -> int:
        assert self._file is not None, "the store is open"
        return self._file

    @property
    def _description(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "tiles": [list(shape) for shape in self._shapes],
            "frames": str(self._frames),
            **self._made_of,
        }

    def _start(self, tile: int) -> int:
        """Return the position of a tile, or the size of all for their number."""
        return self._frames * sum(math.prod(shape) for shape in self._shapes[:tile])

    def _begin_tile(self) -> None:
        self._written, self._hash = 0, hashlib.sha256()

    def _allocate(self) -> None:
        """Give the file its full size, with room on the disk where the system can tell."""
        size = self._start(len(self._shapes))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._handle, 0, size)
        else:
            os.ftruncate(self._handle, size)

    def _complete_tiles(self) -> list[str]:
        """Return the digests of the tiles, from the first one on, that can be taken as they are."""
        if not self._state.exists():
            return []
        try:
            state = read_state(self._path)
            digests = state.pop("finished", None)
            known = {*state, *self._description}
            other = sorted(name for name in known if state.get(name) != self._description.get(name))
        except UnreadableInput as error:
            self._say(f"{self._state} cannot be read ({error}): the clip is decoded from the start")
            return []
        if other or not isinstance(digests, list) or len(digests) > len(self._shapes):
            what = ", ".join(other) or "the list of tiles"
            self._say(f"{self._path} is of another decode ({what}): decoding from the start")
            return []
        return self._sound(digests)

    def _sound(self, digests: list[Any]) -> list[str]:
        """Return the digests of the first tiles whose pixels are what was written."""
        sound: list[str] = []
        try:
            self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            if os.fstat(self._file).st_size == self._start(len(self._shapes)):
                for tile, digest in enumerate(digests):
                    if self._digest(tile) != digest:
                        break
                    sound.append(digest)
        except OSError as error:
            self._say(f"cannot read {self._path}: {error}")
        finally:
            self._close()
        if len(sound) < len(digests):
            self._say(f"{self._path} is damaged: {len(digests) - len(sound)} tiles are made again")
        if sound:
            self._say(f"{self._path} holds {len(sound)} of {len(self._shapes)} tiles: going on")
        return sound

    def _digest(self, tile: int) -> str:
        digest, position, end = hashlib.sha256(), self._start(tile), self._start(tile + 1)
        piece = memoryview(bytearray(_PIECE))
        while position < end:
            part = piece[: min(_PIECE, end - position)]
            self._read_into(part, position)
            digest.update(part)
            position += len(part)
        return digest.hexdigest()

    def _read_into(self, target: memoryview, position: int) -> None:
        """Fill `target` from the file. Raises OSError, also where the file ends before."""
        done = 0
        while done < len(target):
            count = os.preadv(self._handle, [target[done:]], position + done)
            if count == 0:
                raise OSError("the file was cut while it was in use")
            done += count


def state_of(path: Path) -> Path:
    """Return the path of the file that says which tiles of `path` are complete."""
    return path.with_name(path.name + STATE)


def read_state(path: Path) -> dict[str, Any]:
    """Return what the tiles of `path` are made of, as their state says. Raises UnreadableInput."""
    try:
        if state_of(path).stat().st_size > MAX_STATE:
            raise UnreadableInput(f"more than {MAX_STATE} bytes")
        state = parse_json(state_of(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnreadableInput(str(error)) from error
    if not isinstance(state, dict):
        raise UnreadableInput("not a JSON object")
    return state


def allocated_bytes(path: Path) -> int:
    """Return the bytes that a file of tiles has on the disk; 0 where there is none."""
    try:
        status = os.lstat(path)
    except OSError:
        return 0  # why: whoever opens it tells what is wrong
    return min(status.st_size, 512 * status.st_blocks)  # blocks are of 512 bytes by POSIX


def remove_tiles(path: Path) -> None:
    """Remove a file of tiles and its state, where they exist. Raises OSError."""
    for file in (state_of(path), path):  # without a state, pixels mean nothing
        file.unlink(missing_ok=True)


def _require_own(file: Path) -> None:
    """Raise WriteFailed where something stands that no store makes, a link included."""
    try:
        mode = os.lstat(file).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise write_failed(file, error) from error
    if not stat.S_ISREG(mode):
        raise WriteFailed(
            f"cannot write {file}",
            got="a link" if stat.S_ISLNK(mode) else kind_of(mode),
            wanted="a file of finished tiles, or a name that is free",
            do="move it away, and run the same command again",
        )
