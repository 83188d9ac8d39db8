# SPDX-License-Identifier: Apache-2.0
"""The program of a worker: `python -m pw_runtime.server.worker SERVER_PID`.

It reads orders from its standard input and writes events to what was its standard output. What
libraries print goes to the standard error, where it cannot be taken for an event.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import traceback
from typing import BinaryIO

from pw_runtime.errors import PixelWizardError, WriteFailed
from pw_runtime.server.messages import (
    Cancel,
    Ceased,
    Event,
    Failed,
    Join,
    Made,
    Make,
    Ready,
    Refused,
    event_line,
    read_order,
)
from pw_runtime.system.stop import Stopped, StopRequest

REFUSED = 2  # exit code
GRACE = 2.0  # seconds that a step may take to end when the server ends


class Events:
    """The way to the server. Any thread may send."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._lock = stream, threading.Lock()

    def send(self, event: Event) -> None:
        """Send an event."""
        with self._lock:
            self._stream.write(event_line(event))
            self._stream.flush()


class Orders:
    """Jobs that were ordered, and whether the one in hand is to end."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._jobs: queue.SimpleQueue[Make | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._stops: dict[str, StopRequest] = {}  # of jobs that were ordered and have not ended

    def join(self) -> Join:
        """Return the first order, and hear the others from then on."""
        order = read_order(self._stream.readline())
        assert isinstance(order, Join), "a server says first what there is to be done"
        threading.Thread(target=self._listen, daemon=True).start()
        return order

    def next(self) -> Make | None:
        """Wait for the next job; None: there will be none."""
        return self._jobs.get()

    def stop_of(self, job: Make) -> StopRequest:
        """Return the request by which a job is told to end."""
        with self._lock:
            return self._stops[job.job]

    def ended(self, job: Make) -> None:
        """Forget a job."""
        with self._lock:
            del self._stops[job.job]

    def _listen(self) -> None:
        for line in self._stream:
            order = read_order(line)
            with self._lock:
                if isinstance(order, Make):
                    self._stops[order.job] = StopRequest()
                    self._jobs.put(order)
                elif isinstance(order, Cancel) and order.job in self._stops:
                    self._stops[order.job].request()
        with self._lock:
            for stop in self._stops.values():
                stop.request(GRACE)
        self._jobs.put(None)


def main() -> int:
    """Work until the orders end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the server says when to end; systemd tells all
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does
    events = Events(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)
    orders = Orders(os.fdopen(os.dup(0), "rb"))  # sys.stdin cannot be closed while a thread reads
    join = orders.join()
    from pw_engines.child import end_with_parent

    end_with_parent(int(sys.argv[1]))
    try:
        return _work(join, orders, events)
    except PixelWizardError as error:
        events.send(Refused(reason=str(error)))
        return REFUSED


def _work(join: Join, orders: Orders, events: Events) -> int:
    """Make jobs. Raises PixelWizardError where none can be made here."""
    from pw_runtime.errors import BadWeights
    from pw_runtime.server.maker import Maker
    from pw_runtime.system.machine import rss_bytes

    maker = Maker(join, events.send)
    events.send(
        Ready(
            device=maker.device,
            bundle=maker.bundle.digest,
            presets=maker.fits,
            rss=rss_bytes(),
        )
    )
    while (job := orders.next()) is not None:
        reason: tuple[str, str] | None = None
        full = False
        weights: BadWeights | None = None
        try:
            maker.make(job, orders.stop_of(job))
        except Stopped:
            orders.ended(job)
            events.send(Ceased(job=job.job, rss=rss_bytes()))
            continue
        except BadWeights as error:
            reason, weights = ("bad_weights", str(error)), error
        except PixelWizardError as error:
            reason = (_code(error), str(error))
            full = isinstance(error, WriteFailed) and error.disk_full
        except Exception as error:
            traceback.print_exc()
            reason = ("internal", f"{type(error).__name__}: {error}")
        orders.ended(job)
        if reason is None:
            events.send(Made(job=job.job, rss=rss_bytes()))
        else:
            maker.recover()  # where that fails, this process ends, and another makes the job
            code, text = reason
            ended = Failed(job=job.job, code=code, reason=text, rss=rss_bytes(), disk_full=full)
            events.send(ended)
        if weights is not None:  # no job could be made with this model
            raise weights
    return 0


def _code(error: PixelWizardError) -> str:
    """Return the code of an error: its class, as BadRequest -> bad_request."""
    name = type(error).__name__
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


if __name__ == "__main__":
    sys.exit(main())
