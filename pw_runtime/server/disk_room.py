# SPDX-License-Identifier: Apache-2.0
"""Room for the files of jobs: once the disk has refused one, no job is begun without room."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

ROOM: Final = 2**30  # bytes without which a disk counts as full, once it has refused a file
Room = Literal["free", "with its files", "none"]
LONGEST_PAUSE: Final = 60.0  # seconds


class DiskRoom:
    """Tells whether the disk of a folder takes files, as far as jobs have found out.

    Attributes:
        trouble: the reason why no job is begun; None where they are.
    """

    def __init__(
        self, root: Path, pause: float, say: Callable[[str], None], found: Callable[[], None]
    ) -> None:
        """Wait `pause` seconds before the first look for room; call `found` when there is some."""
        self.trouble: str | None = None
        self._root, self._say, self._found = root, say, found
        self._first = self._pause = pause
        self._refused = asyncio.Event()

    async def refused(self, unfinished: int) -> Room:
        """Take in that a job was refused a file for want of room; return where there is room.

        Args:
            unfinished: bytes of the job's files, which could be removed.
        """
        free = await asyncio.to_thread(self._free)
        self.trouble = f"a job found the disk full; {free / 2**30:.2f} GiB are free"
        self._refused.set()
        if free >= ROOM:
            return "free"
        return "with its files" if free + unfinished >= ROOM else "none"

    def taken(self) -> None:
        """Take in that the files of a job were taken: the next look for room comes soon again."""
        self._pause = self._first

    async def watch(self) -> None:
        """Look for room after every refusal, ever more rarely while there is none."""
        while True:
            await self._refused.wait()
            self._say(f"no job is begun until {ROOM / 2**30:g} GiB are free: {self.trouble}")
            free = 0
            while free < ROOM:
                await asyncio.sleep(self._pause)
                self._pause = min(2 * self._pause, LONGEST_PAUSE)
                free = await asyncio.to_thread(self._free)
            self.trouble = None
            self._refused.clear()
            self._found()

    def _free(self) -> int:
        """Return the bytes that are free; none where the disk is gone."""
        try:
            return shutil.disk_usage(self._root).free
        except OSError:
            return 0
