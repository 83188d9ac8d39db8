# SPDX-License-Identifier: Apache-2.0
"""Room for the files of jobs: once the disk has refused one, no job is begun without room."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pw_runtime.errors import WriteFailed
from pw_runtime.system.atomic_files import require_room

ROOM: Final = 2**30  # bytes without which a disk counts as full, once it has refused a file
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

    async def refused(self, reason: str) -> bool:
        """Take in that a file was refused; return whether there is room all the same."""
        lack = await asyncio.to_thread(self._lack)
        self.trouble = lack or reason
        self._refused.set()
        return lack is None

    def taken(self) -> None:
        """Take in that the files of a job were taken: the next look for room comes soon again."""
        self._pause = self._first

    async def watch(self) -> None:
        """Look for room after every refusal, ever more rarely while there is none."""
        while True:
            await self._refused.wait()
            self._say(f"no job is begun until there is room on the disk: {self.trouble}")
            lack: str | None = ""
            while lack is not None:
                await asyncio.sleep(self._pause)
                self._pause = min(2 * self._pause, LONGEST_PAUSE)
                lack = await asyncio.to_thread(self._lack)
                self.trouble = lack
            self._refused.clear()
            self._found()

    def _lack(self) -> str | None:
        """Return how much room is free and how much is wanted; None where there is enough."""
        try:
            require_room(self._root, ROOM)
        except WriteFailed as error:
            return str(error)
        return None
