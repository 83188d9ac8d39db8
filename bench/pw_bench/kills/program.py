# SPDX-License-Identifier: Apache-2.0
"""A run to be killed: `python -m pw_bench.kills.program`.

It does what `pw generate` does. It reads a `KillTask` as JSON on stdin, and writes a line of JSON
on stdout whenever it has come further, so that whoever kills it knows how far it was.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter
from torch import Tensor

from pw_engines.child import end_with_parent
from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.job import frame_log, journal
from pw_runtime.pipeline import generate
from pw_runtime.prompts import make_prompts
from pw_runtime.sampling.loop_state import LoopState
from pw_runtime.stages.decode_past import Past
from pw_runtime.system.progress import Progress, Reporter
from pw_runtime.types import Preset, Request, RunOptions

QUARTERS: Final = 4  # lines for each step, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class KillTask:
    """A batch of clips.

    Attributes:
        model: bundle.
        preset: of the clips.
        prompts: their texts.
        out: folder.
        journal: keep steps and frames, as usual; False only to measure what that costs.
    """

    model: Path
    preset: Preset
    prompts: tuple[str, ...]
    out: Path
    journal: bool = True


class _Telling(Reporter):
    """Writes a line for every part of a step."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self._last: tuple[str, str, int] | None = None

    def warn(self, text: str) -> None:
        """Say nothing: the words of a prompt that the model does not know are no news."""

    def finished(self, path: Path) -> None:
        """Say nothing: stdout is for progress."""

    def progress(self, progress: Progress) -> None:
        """Write how far the run has come."""
        here = (progress.clip, progress.stage, int(progress.done * QUARTERS))
        if here != self._last:
            self._last = here
            print(json.dumps([progress.clip, progress.stage, progress.done]), flush=True)


def _keep_nothing(log: journal.ClipLog, state: LoopState) -> None:
    """Keep no steps."""


def _keep_no_frames(log: frame_log.FrameLog, frames: Tensor, past: Past) -> None:
    """Keep no frames."""


def main() -> None:
    """Make the clips of the task on stdin; the last line says what it took."""
    end_with_parent()
    task = TypeAdapter(KillTask).validate_json(sys.stdin.read())
    request = Request(
        prompts=make_prompts([(str(i), text) for i, text in enumerate(task.prompts)]),
        preset=task.preset,
        out=task.out,
        options=RunOptions(device="cpu", policy="eager"),
    )
    if not task.journal:
        journal.ClipLog.keep = _keep_nothing  # type: ignore[method-assign, assignment]
        frame_log.FrameLog.keep = _keep_no_frames  # type: ignore[method-assign, assignment]
    start, cpu = time.perf_counter(), time.process_time()
    outcomes = generate(request, open_bundle(task.model), _Telling())
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    failed = [outcome.error for outcome in outcomes if outcome.error]
    print(json.dumps({"wall": wall, "cpu": cpu, "failed": failed}), flush=True)


if __name__ == "__main__":
    main()
