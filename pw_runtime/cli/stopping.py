# SPDX-License-Identifier: Apache-2.0
"""Signals that end a run: the step in progress may finish, and the user is told how to go on."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final, NoReturn

from pw_runtime.cli.main import ENDING, Terminated, pass_over, restore
from pw_runtime.errors import RankFailed, WriteFailed
from pw_runtime.system.stop import Stopped, StopRequest

if TYPE_CHECKING:
    from pw_runtime.system.progress import Reporter

GRACE: Final = 2.0  # seconds that the step in progress may take to finish


@contextmanager
def stopping(stop: StopRequest, reporter: Reporter, go_on: Callable[[], str]) -> Iterator[None]:
    """Turn the first signal inside the block into a request to stop, and obey a second one at once.

    What has not stopped when the grace is over is interrupted. Signals that are ignored stay so
    (nohup). To be entered in the main thread.

    Args:
        stop: asks the run.
        reporter: tells the user how to go on, where the block was ended early.
        go_on: returns the words for that.

    Raises:
        KeyboardInterrupt, Terminated: as the signal would have done.
    """
    received: list[int] = []

    def first(number: int, frame: FrameType | None) -> None:
        if received:
            _raise(number)
        received.append(number)
        stop.request(GRACE)
        signal.setitimer(signal.ITIMER_REAL, GRACE)

    def over(number: int, frame: FrameType | None) -> None:
        _raise(received[0])

    before = {number: signal.getsignal(number) for number in ENDING}
    alarm = signal.signal(signal.SIGALRM, over)
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, first)
    try:
        yield
    except BaseException as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if received or isinstance(error, WriteFailed | RankFailed):
            reporter.warn(go_on())
        if isinstance(error, Stopped) and received:
            _raise(received[0])
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        restore(before)


def command_again(seed: int | None = None, done: Collection[Path] = ()) -> str:
    """Say which command line goes on with this run, or with --fresh begins it again.

    Args:
        seed: that was drawn; None: the command names it.
        done: arguments of `pw` with which nothing is left to do.
    """
    words = [word for word in sys.argv[1:] if Path(word) not in done]
    drawn = [] if seed is None else ["--seed", str(seed)]
    # why not without --fresh: finished clips would then stay, and begun ones of them be removed
    told = "to begin again" if "--fresh" in words else "to go on where this run has ended"
    return f"{told}: {shlex.join(['pw', *words, *drawn])}"


def _raise(number: int) -> NoReturn:
    """Raise what ends the process on a signal; a further one does not interrupt that."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for each in ENDING:
        signal.signal(each, pass_over)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)
