# SPDX-License-Identifier: Apache-2.0
"""Heartbeats of the ranks of a run: who lives and what it does, so that no rank waits in vain.

Every rank writes a beat into the store once a second, from a thread of its own, and reads those of
the others. A rank that was killed or stopped sends none; one that went another way than the others
names another operation. The first to see it says so in the store, and every rank ends.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

BEAT: Final = 1.0  # seconds between beats
SILENCE: Final = 15.0  # seconds without one, after which a rank is given up
GRACE: Final = 5.0  # seconds that a rank has for ending by itself
ENDED: Final = 3  # exit code of a rank that is ended by force, as `pw` has it for failures
IDLE: Final = "next command"  # what a rank waits for that has nothing to do
_FAILURE: Final = "failure"


@dataclass(frozen=True, slots=True)
class Failure:
    """End of a run: the rank that is to blame, and what it did."""

    rank: int
    what: str  # "was killed", or the message of its error
    doing: str
    told: bool = False  # rank 0 tells it itself


class RankWatch:
    """Watches the other ranks from a thread; see the module's text.

    Attributes:
        failure: what ended the run; None while all is well.
        woken: called when there is a failure, for whoever waits.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        """Begin to beat; the others are watched once all have."""
        self.failure: Failure | None = None
        self.woken: Callable[[], None] = lambda: None
        self._store, self._rank, self._size = store, rank, size
        self._place, self._latest = "starting", ""
        self._operations: dict[str, tuple[int, str]] = {}  # by group: how many, and the last one
        self._waiting: tuple[tuple[int, ...], str, float] = ((), "", 0.0)  # for whom, what, since
        self._commands = 0  # that this rank has sent or received
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._beats = 0
        self._heard: dict[int, tuple[int, float]] = {}  # number and time of the last beat
        self._last: dict[int, dict[str, Any]] = {}
        self._beat()
        self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)

    def start(self) -> None:
        """Watch the others, which all have sent a beat."""
        self._thread.start()

    def at(self, place: str) -> None:
        """Say in which stage and step this rank is."""
        self._place, self._latest = place, ""
        # why: whatever the store refuses here, the thread meets and reports
        with self._lock, suppress(Exception):
            self._beat()

    def begin(self, group: str, what: str) -> None:
        """Count an operation among a group of ranks."""
        count, _ = self._operations.get(group, (0, ""))
        self._operations[group] = (count + 1, what)
        self._latest = what

    def waits(self, members: tuple[int, ...], what: str) -> None:
        """Say for which ranks this one waits; for none: it goes on."""
        self._waiting = (members, what, time.monotonic())

    def commanded(self) -> None:
        """Count a command of which this rank has sent or received the whole."""
        self._commands += 1

    @property
    def doing(self) -> str:
        """Description of what this rank does."""
        return f"{self._place}: {self._latest}" if self._latest else self._place

    def report(self, rank: int, what: str, doing: str, *, told: bool = False) -> None:
        """End the run for all ranks; where one has been reported already, that one stands."""
        mine = json.dumps(asdict(Failure(rank, what, doing, told)))
        try:
            with self._lock:
                stands = self._store.compare_set(_FAILURE, "", mine).decode()
        except Exception:  # the store is gone, and with it whoever could read it
            stands = mine
        if self.failure is None:
            self.failure = Failure(**json.loads(stands))
            self.woken()

    def behind(self, group: str, members: tuple[int, ...]) -> tuple[int, str]:
        """Return the rank of a group that has come least far, and what it does."""
        counts = {
            rank: self._last.get(rank, {}).get("operations", {}).get(group, (0, ""))[0]
            for rank in members
            if rank != self._rank
        }
        slowest = min(counts, key=lambda rank: counts[rank])
        return slowest, str(self._last.get(slowest, {}).get("doing", "starting"))

    def close(self) -> None:
        """End the thread; no rank is watched any more."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.failure is not None:
            self._let_others_see()

    def _let_others_see(self) -> None:
        """Keep the store, which may be this process's, until the others know what happened."""
        with suppress(Exception):  # why: it is gone already
            self._store.set(f"seen {self._rank}", "")
            assert self.failure is not None
            others = set(range(self._size)) - {0, self.failure.rank}
            end = time.monotonic() + 3 * BEAT
            while self._rank == 0 and others and time.monotonic() < end:
                others = {rank for rank in others if not self._store.check([f"seen {rank}"])}
                time.sleep(BEAT / 20)

    # ---- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(BEAT):
            now = time.monotonic()
            if now - before > SILENCE / 3:  # this process slept: it could not hear anybody
                self._heard.clear()
            before = now
            try:
                with self._lock:
                    self._beat()
                    self._listen()
            except Exception as error:  # of the store
                if not self._closed.is_set():
                    what = f"is gone, and the store with it ({str(error).splitlines()[0]})"
                    self._fail(Failure(0, what, "the ranks lost each other"))
            if self.failure is not None:
                break
        if self.failure is not None and not self._closed.wait(GRACE):
            self._end()

    def _beat(self) -> None:
        self._beats += 1
        beat = {
            "number": self._beats,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "space": _process_space(),
            "doing": self.doing,
            "operations": dict(self._operations),
            "commands": self._commands,  # read before `idle`: a wait ends before its command counts
            "idle": self._waited() if self._waiting[1] == IDLE else 0.0,
        }
        self._store.set(f"beat {self._rank}", json.dumps(beat))

    def _listen(self) -> None:
        """Read the beats of the others, and what was reported."""
        if self._store.check([_FAILURE]):
            self._fail(Failure(**json.loads(self._store.get(_FAILURE))))
            return
        others = [rank for rank in range(self._size) if rank != self._rank]
        beats = self._store.multi_get([f"beat {rank}" for rank in others])
        now = time.monotonic()
        for rank, data in zip(others, beats, strict=True):
            beat = json.loads(data)
            if rank not in self._heard or self._heard[rank][0] != beat["number"]:
                self._heard[rank] = (beat["number"], now)
            self._last[rank] = beat
            if _is_gone(beat):
                self._report(Failure(rank, "was killed, or ended without a word", beat["doing"]))
                return
            if now - self._heard[rank][1] > SILENCE:
                self._report(Failure(rank, f"sent no sign for {SILENCE:.0f} s", beat["doing"]))
                _kill(beat)
                return
            members, what, _ = self._waiting
            waits = rank in members and what != IDLE and self._waited() > SILENCE
            # It was to take part, and knows nothing of it; with fewer commands it is only late.
            late = beat["commands"] < self._commands
            if waits and not late and beat["idle"] > SILENCE:
                self._report(self._diverged(rank, beat["doing"]))
                return
            for group, (count, what) in beat["operations"].items():
                mine = self._operations.get(group, (count, what))
                if mine[0] == count and mine[1] != what:
                    self._report(self._diverged(rank, beat["doing"]))
                    return

    def _waited(self) -> float:
        """Return the seconds that this rank has waited for others."""
        members, _, since = self._waiting
        return time.monotonic() - since if members else 0.0

    def _diverged(self, other: int, doing: str) -> Failure:
        """Blame the later of two ranks for being at another operation than the earlier one."""
        ways = {self._rank: self.doing, other: doing}
        first, second = sorted(ways)
        return Failure(second, f"went another way than rank {first} ({ways[first]})", ways[second])

    def _report(self, failure: Failure) -> None:
        mine = json.dumps(asdict(failure))
        stands = self._store.compare_set(_FAILURE, "", mine).decode()
        self._fail(Failure(**json.loads(stands)))

    def _fail(self, failure: Failure) -> None:
        if self.failure is None:
            self.failure = failure
            self.woken()

    def _end(self) -> None:
        """End this process, whose main thread hangs in a library."""
        assert self.failure is not None
        if self._rank == teller(self.failure) and not self.failure.told:
            print(f"error: {failure_text(self.failure)}", file=sys.stderr, flush=True)
        os._exit(ENDED)


def teller(failure: Failure) -> int:
    """Return the rank that tells the user: the first one that is not to blame, or rank 0 itself."""
    return 1 if failure.rank == 0 and not failure.told else 0


def failure_text(failure: Failure) -> str:
    """Describe a failure in one line."""
    return f"rank {failure.rank} {failure.what}; it was at {failure.doing}"


def connect(host: str, port: int, seconds: float) -> TCPStore:
    """Open a connection of one's own to a store: one that waits blocks all others on it."""
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=seconds))


def _is_gone(beat: dict[str, Any]) -> bool:
    """Tell whether the process of a beat is known to have ended: one of this machine."""
    if not _is_here(beat):
        return False
    try:
        status = Path(f"/proc/{beat['process']}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] == "Z"


def _is_here(beat: dict[str, Any]) -> bool:
    """Tell whether the process of a beat can be seen by its number."""
    here = (socket.gethostname(), _process_space())
    return bool(here[1]) and (beat["host"], beat["space"]) == here


def _process_space() -> str:
    """Return what tells apart containers on a machine, each with process numbers of its own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _kill(beat: dict[str, Any]) -> None:
    """End a silent process of this machine: where it was stopped, it would stay for ever."""
    if _is_here(beat):
        with suppress(OSError):
            os.kill(beat["process"], signal.SIGKILL)
