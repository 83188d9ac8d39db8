# SPDX-License-Identifier: Apache-2.0
"""Items made in this thread, used up in another one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import copy_context
from typing import Final, Generic, TypeVar

Item = TypeVar("Item")

QUEUED: Final = 2  # items made or in the making that the other thread has not taken yet


class _Stopped(BaseException):
    """The maker of the items failed: the other thread unwinds, and nobody hears of this."""


class _Belt(Generic[Item]):
    """What the two threads share."""

    def __init__(self) -> None:
        self.waiting: queue.SimpleQueue[Item | None] = queue.SimpleQueue()  # None: no more
        self.room = threading.Semaphore(0)  # how many items may be made
        self.stop = threading.Event()  # the maker failed
        self.over = threading.Event()  # the work ended, well or not
        self.failure: BaseException | None = None

    def taken(self) -> Iterator[Item]:
        """The items as the working thread gets them; none is made before it asks for one."""
        self.room.release(QUEUED)
        while True:
            item = self.waiting.get()
            if self.stop.is_set():
                raise _Stopped
            if item is None:
                return
            self.room.release()
            yield item
            del item  # while the next one is waited for, this one must be free

    def run(self, work: Callable[[Iterator[Item]], None]) -> None:
        """The working thread."""
        try:
            work(self.taken())
        except _Stopped:
            pass
        except BaseException as error:
            self.failure = error
        finally:
            self.over.set()
            self.room.release()


def overlap(items: Iterable[Item], work: Callable[[Iterator[Item]], None]) -> None:
    """Run `work(items)` in a thread of its own, while this one makes the next items.

    At most three items are alive: the one that `work` holds and `QUEUED` more, the one in the
    making among them. The first one is made when `work` asks for it. Whatever `work` raises is
    raised here before another item is made. When making one fails, Ctrl-C included, `work` is
    unwound from the place where it waits for the next. No thread is left either way.
    """
    belt: _Belt[Item] = _Belt()
    inherited = copy_context()  # with the trace that records
    thread = threading.Thread(target=inherited.run, args=(belt.run, work), name="pw-overlap")
    iterator = iter(items)
    thread.start()
    try:
        while True:
            belt.room.acquire()
            if belt.over.is_set():
                break
            try:
                item = next(iterator)
            except StopIteration:
                break
            belt.waiting.put(item)
            del item
        belt.waiting.put(None)
        thread.join()
    except BaseException:
        belt.stop.set()
        belt.waiting.put(None)
        thread.join()
        raise
    if belt.failure is not None:
        failure, belt.failure = belt.failure, None
        try:
            raise failure
        finally:
            del failure, iterator, items  # its traceback holds this frame, and that their memory
