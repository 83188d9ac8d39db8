# SPDX-License-Identifier: Apache-2.0
"""Failures in the middle of a run: isolated per clip, and reported with what was kept."""

from __future__ import annotations

import shutil
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pw_runtime.errors import BadWeights, PixelWizardError, RankFailed
from pw_runtime.job.clip import TILES, Clip, resume_command, save_latents
from pw_runtime.planning.oom_fallback import out_of_memory
from pw_runtime.system.progress import Reporter
from pw_runtime.system.tile_store import state_of


@contextmanager
def isolate_failure(clip: Clip, reporter: Reporter) -> Iterator[None]:
    """Keep a failure inside its prompt, and what was computed for it on disk.

    Raises:
        BadWeights: no other prompt could work with that model.
        RankFailed: none could be made.
        Whatever the prompt failed by, where its request is to fail fast.
    """
    try:
        yield
    except (BadWeights, RankFailed):
        raise
    except Exception as error:
        cause = out_of_memory(error) or error
        clip.error = str(cause) or type(cause).__name__
        if not (isinstance(cause, PixelWizardError) or clip.request.fail_fast):
            reporter.warn(traceback.format_exc())
        reporter.failed(clip.prompt.id, clip.error)
        _rescue(clip, reporter)
        report_resumable(clip, reporter)
        del cause  # their tracebacks hold the tensors of what failed, and each other
        if clip.request.fail_fast:
            raise
        del error


@contextmanager
def report_on_abort(clips: Iterable[Clip], reporter: Reporter) -> Iterator[None]:
    """Report what is kept of each unfinished clip when the run is aborted, also by Ctrl-C.

    Raises BadResult when out of memory outside any clip.
    """
    try:
        yield
    except BaseException as error:
        for clip in clips:
            if clip.video is None and clip.error is None:
                _rescue(clip, reporter)
                report_resumable(clip, reporter)
        cause = out_of_memory(error)
        if cause is not None:
            raise cause from error
        raise


def _rescue(clip: Clip, reporter: Reporter) -> None:
    """Write what was computed for a clip to the disk: where it belongs, or else anywhere.

    A request that is to fail fast keeps nothing elsewhere: nobody would look for it there.
    """
    if clip.draft is None and clip.highres is None:
        return
    if clip.kept is None:
        try:
            save_latents(clip, clip.request.spill or clip.request.out)
        except Exception as refused:
            if clip.request.fail_fast:
                reporter.warn(f"its latents could not be kept: {refused}")
                return
            folder = Path(tempfile.mkdtemp(prefix="pw-latents-"))
            try:
                save_latents(clip, folder)
            except Exception as unsaved:
                reporter.warn(f"its latents could not be kept: {refused}\n{unsaved}")
                shutil.rmtree(folder, ignore_errors=True)
    if clip.latents is None and clip.kept is not None:
        found = clip.kept.parent in (clip.request.out, clip.request.spill)
        how = "" if found else f"; to go on from them, move the file to {clip.request.out}"
        reporter.warn(f"the results so far of {clip.prompt.id} are kept in {clip.kept}{how}")


def report_resumable(clip: Clip, reporter: Reporter) -> None:
    """Report where an unfinished clip's latents are and which command finishes it."""
    if clip.latents is not None and clip.latents.exists():
        reporter.warn(f"the latents of {clip.prompt.id} are kept in {clip.latents}")
        if state_of(clip.path(TILES)).is_file():
            reporter.warn(f"its finished tiles are kept in {clip.path(TILES)}")
        reporter.warn(f"to finish this clip, run: {resume_command(clip)}")
    if clip.partial_video is not None and clip.partial_video.exists():
        reporter.warn(f"partial video: {clip.partial_video}")
