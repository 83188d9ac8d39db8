# SPDX-License-Identifier: Apache-2.0
"""A thread that writes what is newest: whoever gives it something to write does not wait."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

Job = Callable[[], None]


class NewestWriter:
    """Runs jobs one after another in a thread of its own; of those that wait, only the newest."""

    def __init__(self) -> None:
        """Start no thread yet."""
        self._changed = threading.Condition()
        self._waiting: Job | None = None
        self._busy = False
        self._thread: threading.Thread | None = None
        self._closed = False

    def put(self, job: Job) -> None:
        """Let `job` run next, in place of one that waits.

        It handles the errors that it expects; another one is told as that of any thread, and the
        next job runs.
        """
        with self._changed:
            self._waiting = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pw-journal", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drop(self) -> None:
        """Drop the job that waits, and wait for the one in progress."""
        with self._changed:
            self._waiting = None
        self.wait()

    @property
    def idle(self) -> bool:
        """Tell whether nothing is left to run."""
        with self._changed:
            return self._waiting is None and not self._busy

    def wait(self) -> None:
        """Wait until nothing is left to run."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None and not self._busy)

    def close(self) -> None:
        """Run what waits, and end the thread."""
        self.wait()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                job, self._waiting = self._waiting, None
                if job is None:
                    return
                self._busy = True
            try:
                job()
            except Exception:
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), None)))
            finally:
                del job  # its tensors are free while it waits for the next
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
