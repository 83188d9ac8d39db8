# SPDX-License-Identifier: Apache-2.0
"""The errors a user may see. Each message says what is wrong, what was got, what was wanted,
and what to do; the command line turns the class into an exit code."""

from __future__ import annotations


class PixelWizardError(Exception):
    """Root of every error raised on purpose.

    Build one with `Kind(what, got=..., wanted=..., do=...)`; the parts become one message.
    """

    def __init__(
        self, what: str, *, got: object = None, wanted: object = None, do: str | None = None
    ) -> None:
        self.what, self.got = what, got
        parts = [what]
        if got is not None:
            parts.append(f"got: {got}")
        if wanted is not None:
            parts.append(f"wanted: {wanted}")
        if do is not None:
            parts.append(f"do this: {do}")
        super().__init__("\n  ".join(parts))


class BadRequest(PixelWizardError):
    """A prompt, preset, option or noise file that cannot be used."""


class OtherDraft(BadRequest):
    """A draft of an earlier run that a clip cannot be made from."""


class BadWeights(PixelWizardError):
    """A checkpoint or bundle that is damaged, incomplete or not what its config says."""


class BadResult(PixelWizardError):
    """A computation whose result cannot be used."""


class RankFailed(PixelWizardError):
    """A rank of a run on several devices died, hangs or went another way: the run is over.

    Attributes:
        teller: the rank that tells the user.
    """

    teller = 0


class MissingPackage(PixelWizardError):
    """A Python package is not installed, or cannot be imported."""


class WriteFailed(PixelWizardError):
    """The disk or the encoder refused a file; nothing stands under its final name.

    Attributes:
        disk_full: for want of room.
    """

    disk_full = False


class Cancelled(PixelWizardError):
    """The caller of `Pipeline` ended a call; nothing went wrong."""
