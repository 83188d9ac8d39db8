# SPDX-License-Identifier: Apache-2.0
"""Producer and consumer in two threads: items are made in this one, used up in the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import copy_context
from typing import Final, Generic, TypeVar

Item = TypeVar("Item")

QUEUED: Final = 2  # items made or being made that the other thread has not taken yet


class _Stopped(BaseException):
    """The producer failed: unwinds the consumer's thread, and is not reported."""


class _Handoff(Generic[Item]):
    """State shared by the two threads."""

    def __init__(self) -> None:
        self.waiting: queue.SimpleQueue[Item | None] = queue.SimpleQueue()  # None: no more
        self.room = threading.Semaphore(0)  # how many items may be made
        self.stop = threading.Event()  # the producer failed
        self.over = threading.Event()  # the work ended, successfully or not
        self.failure: BaseException | None = None

    def items(self) -> Iterator[Item]:
        """Yield the items to the working thread; none is made before it asks for one."""
        self.room.release(QUEUED)
        while True:
            item = self.waiting.get()
            if self.stop.is_set():
                raise _Stopped
            if item is None:
                return
            self.room.release()
            yield item
            del item  # while waiting for the next item, this one must be free

    def run(self, work: Callable[[Iterator[Item]], None]) -> None:
        """Run the working thread."""
        try:
            work(self.items())
        except _Stopped:
            pass
        except BaseException as error:
            self.failure = error
        finally:
            self.over.set()
            self.room.release()


def overlap(items: Iterable[Item], work: Callable[[Iterator[Item]], None]) -> None:
    """Run `work(items)` in another thread, while this one makes the next items.

    At most three items are alive: the one that `work` holds and `QUEUED` more, including the one
    being made. The first one is made when `work` asks for it. Whatever `work` raises is raised here
    before another item is made. When making one fails, also by Ctrl-C, `work` is unwound from
    where it waits for the next. No thread is left either way.
    """
    handoff: _Handoff[Item] = _Handoff()
    inherited = copy_context()  # includes the trace that records
    thread = threading.Thread(target=inherited.run, args=(handoff.run, work), name="pw-overlap")
    iterator = iter(items)
    thread.start()
    try:
        while True:
            handoff.room.acquire()
            if handoff.over.is_set():
                break
            try:
                item = next(iterator)
            except StopIteration:
                break
            handoff.waiting.put(item)
            del item
        handoff.waiting.put(None)
        thread.join()
    except BaseException:
        handoff.stop.set()
        handoff.waiting.put(None)
        thread.join()
        raise
    if handoff.failure is not None:
        failure, handoff.failure = handoff.failure, None
        try:
            raise failure
        finally:
            del failure, iterator, items  # its traceback holds this frame, and that their memory
