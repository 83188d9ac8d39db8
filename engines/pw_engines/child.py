# SPDX-License-Identifier: Apache-2.0
"""Child processes that end with their parent, however it ends: also when it is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Final

PARENT: Final = "PW_PARENT_PID"
_PR_SET_PDEATHSIG: Final = 1  # of prctl(2)
_POLL: Final = 1.0  # seconds, where the system does not tell


def child_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a child that calls `end_with_parent`.

    Args:
        environment: variables of the child; None: those of this process.
    """
    return {**(os.environ if environment is None else environment), PARENT: str(os.getpid())}


def end_with_parent(parent: int | None = None) -> None:
    """Let this process be killed when its parent has ended.

    Linux does it at once, when the thread of the parent ends that started this process: start it in
    one that waits for it. Elsewhere it takes up to a second.

    Args:
        parent: process id of the parent; None: the one that `child_environment` named, and nothing
            happens where it named none.
    """
    named = os.environ.pop(PARENT, None)
    if parent is None:
        if named is None or not named.isdigit():
            return
        parent = int(named)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _require(parent)  # it may have ended before
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while True:
        _require(parent)
        time.sleep(_POLL)


def _require(parent: int) -> None:
    """End this process where its parent has ended."""
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)
