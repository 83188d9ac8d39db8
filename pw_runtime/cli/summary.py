# SPDX-License-Identifier: Apache-2.0
"""The summary of `pw generate --json`: docs/json.md describes the keys."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pw_runtime.errors import BadRequest, BadResult, WriteFailed
from pw_runtime.job.receipt import read_receipt
from pw_runtime.system.progress import Reporter
from pw_runtime.types import Outcome, Request


class SummaryReporter(Reporter):
    """Keeps stdout free for the summary: finished clips are said on stderr, and collected.

    Attributes:
        videos: of the finished clips.
        failures: why the others have failed, by the id of the prompt.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        """Collect nothing yet."""
        super().__init__(quiet=quiet)
        self.videos: list[Path] = []
        self.failures: dict[str, str] = {}

    def finished(self, path: Path) -> None:
        """Say that a clip is complete."""
        self.videos.append(path)
        self.say(f"finished: {path}")

    def failed(self, clip: str, error: str) -> None:
        """Say that a clip has failed."""
        self.failures[clip] = error
        super().failed(clip, error)


def summarised(
    make: Callable[[], Sequence[Outcome]],
    request: Request,
    reporter: SummaryReporter,
    document: dict[str, Any],
) -> Callable[[], Sequence[Outcome]]:
    """Return `make`, which then also fills the document, however it ends."""

    def run() -> Sequence[Outcome]:
        start = time.monotonic()
        document.update(out=str(request.out), seed=request.seed)
        known: Sequence[Outcome] | None = None
        try:
            known = outcomes = make()
        except BadRequest:
            known = ()  # it was refused
            raise
        except (BadResult, WriteFailed) as error:  # `exit_code` ends these
            document["error"] = str(error)
            raise
        finally:
            known = _unended(request, reporter) if known is None else known
            clips = [_clip(request, outcome) for outcome in known]
            document["seconds"] = round(time.monotonic() - start, 3)
            document["finished"] = sum(clip["video"] is not None for clip in clips)
            document["failed"] = sum(clip["error"] is not None for clip in clips)
            document["clips"] = clips
        return outcomes

    return run


def _unended(request: Request, reporter: SummaryReporter) -> list[Outcome]:
    """Return what is known of the clips of a run that ended early."""
    finished = {video.stem: video for video in reporter.videos}
    return [
        Outcome(prompt=x, video=finished.get(x.id), error=reporter.failures.get(x.id))
        for x in request.prompts
    ]


def _clip(request: Request, outcome: Outcome) -> dict[str, Any]:
    """Describe a clip; what its receipt says is None where there is none."""
    receipt: dict[str, Any] = {}
    file = request.out / f"{outcome.prompt.id}.json"
    if outcome.video is not None:
        try:
            receipt = read_receipt(file)
        except BadRequest as error:
            outcome = Outcome(prompt=outcome.prompt, video=outcome.video, error=str(error))
    return {
        "id": outcome.prompt.id,
        "prompt": outcome.prompt.text,
        "video": None if outcome.video is None else str(outcome.video),
        "receipt": str(file) if receipt else None,
        "error": outcome.error,
        "seeds": receipt.get("seeds"),
        "seconds": receipt.get("seconds"),
        "exactness": receipt.get("exactness"),
        "fallbacks": receipt.get("fallbacks"),
    }
