# SPDX-License-Identifier: Apache-2.0
"""Retention: which finished jobs are removed for their age, or because all take too much."""

from __future__ import annotations

from collections.abc import Sequence

from pw_runtime.server.settings import Limits
from pw_runtime.server.store import Job


def expired(ended: Sequence[Job], limits: Limits, now: float) -> list[Job]:
    """Return the finished jobs to remove, the oldest first.

    Args:
        ended: all finished jobs.
        limits: how long, and in how many bytes, they are kept.
        now: seconds since 1970.
    """
    newest_first = sorted(ended, key=lambda job: (job.completed_at or 0, job.seq), reverse=True)
    gone, total = [], 0
    for job in newest_first:
        total += job.bytes
        old = (
            limits.keep_seconds is not None and (job.completed_at or 0) + limits.keep_seconds <= now
        )
        if old or (limits.keep_bytes is not None and total > limits.keep_bytes):
            gone.append(job)
    return gone[::-1]
