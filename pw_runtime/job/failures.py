# SPDX-License-Identifier: Apache-2.0
"""What happens when something goes wrong in the middle of a run."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pw_runtime.errors import BadResult, PixelWizardError
from pw_runtime.job.clip import Clip, resume_command, save_latents
from pw_runtime.planning.oom_fallback import out_of_memory
from pw_runtime.system.progress import Reporter
from pw_runtime.types import Latent


@contextmanager
def isolate_failure(clip: Clip, reporter: Reporter) -> Iterator[None]:
    """Keep a failure inside its prompt, and on disk what was computed for it."""
    try:
        yield
    except Exception as error:
        known = out_of_memory(error) or error
        clip.error = str(known) or type(known).__name__
        if not isinstance(known, PixelWizardError):
            reporter.warn(traceback.format_exc())
        reporter.warn(f"prompt {clip.prompt.id} failed: {clip.error}")
        if clip.latents is None and clip.draft is not None:
            try:
                path = save_latents(clip)
                if clip.latents is None:
                    reporter.warn(f"what was computed for it is kept in {path}")
            except Exception as lost:
                reporter.warn(f"its latents could not be kept: {lost}")
        report_resumable(clip, reporter)
        del known, error  # their tracebacks hold the tensors of what failed, and each other


@contextmanager
def report_on_abort(clips: Iterable[Clip], reporter: Reporter) -> Iterator[None]:
    """When the run ends before its time, Ctrl-C included, say what is kept of which clip.

    Raises BadResult where memory ran out between the clips: a network did not fit.
    """
    try:
        yield
    except BaseException as error:
        for clip in clips:
            if clip.video is None and clip.error is None:
                report_resumable(clip, reporter)
        known = out_of_memory(error)
        if known is not None:
            raise known from error
        raise


def report_resumable(clip: Clip, reporter: Reporter) -> None:
    """Say where the latents of an unfinished clip are and which command finishes it."""
    if clip.latents is not None:
        reporter.warn(f"the latents of {clip.prompt.id} are kept in {clip.latents}")
        reporter.warn(f"this finishes the clip: {resume_command(clip)}")
    if clip.growing is not None and clip.growing.exists():
        reporter.warn(f"what was encoded of it can be watched: {clip.growing}")


def require_finite(latent: Latent, name: str) -> Latent:
    """Refuse NaN and infinity, of which no picture can be made. Raises BadResult."""
    if not latent.x.isfinite().all():
        raise BadResult(
            f"the {name} latent holds NaN or infinity",
            wanted="finite numbers",
            do="check shift and guidance of the preset, and the checkpoint; try --precision fp32",
        )
    return latent
