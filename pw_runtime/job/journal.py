# SPDX-License-Identifier: Apache-2.0
"""The journal of a run: what is kept between steps, when, and at which cost.

High-res steps are few and long: the state after each is kept. Draft steps are many and short: it is
kept as often as the journal then takes a hundredth of the run's time, by what it has taken so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from pw_runtime.errors import WriteFailed
from pw_runtime.job.clip import STEPS, Clip
from pw_runtime.job.identity import Fields, differences, of_latents
from pw_runtime.job.step_file import read_steps, write_steps
from pw_runtime.sampling.loop_state import LoopState
from pw_runtime.sampling.noise import tensor_digest
from pw_runtime.system.input_files import UnreadableInput
from pw_runtime.system.newest_writer import NewestWriter
from pw_runtime.system.step import Step
from pw_runtime.system.tensor_file import digest_of
from pw_runtime.types import Notice, StageName

SHARE: Final = 0.01  # of the run's time that the journal of its draft steps may take
_HOST: Final = torch.device("cpu")


class Journal:
    """Writes states in the background and counts what that takes, for all clips of a run.

    Attributes:
        refused: the disk refused a file, and the user was told: nothing more is written.
        last: seconds that the last file took.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        """Begin to count the run's time; `warn` tells the user of a disk that refuses."""
        self.refused = False
        self._warn, self._writer = warn, NewestWriter()
        self._begun = time.monotonic()
        self._copying = self._writing = 0.0  # seconds of the loop's thread, and of the writer's
        self.last = 0.0

    @property
    def affordable(self) -> bool:
        """Tell whether another file keeps the journal within its share of the run's time."""
        return self.affords(self.last)

    def affords(self, seconds: float) -> bool:
        """Tell the same of a file that takes so many seconds."""
        spent = self._copying + self._writing + seconds
        return spent <= SHARE * (time.monotonic() - self._begun)

    @property
    def idle(self) -> bool:
        """Tell whether nothing is being written, or waits for it."""
        return self._writer.idle

    def refuse(self, error: WriteFailed) -> None:
        """Write nothing more, and tell the user once."""
        if not self.refused:
            self._warn(f"the run goes on, and if it is ended, with less to go on from: {error}")
        self.refused = True

    def write(self, copy: Callable[[], Callable[[], None]]) -> None:
        """Call `copy` now, and what it returns in the background, unless newer ones come first."""
        start = time.perf_counter()
        write = copy()
        copied = time.perf_counter() - start
        self._copying += copied

        def timed() -> None:
            start = time.thread_time()
            try:
                write()
            except WriteFailed as error:
                self.refuse(error)
            took = time.thread_time() - start
            self._writing += took
            self.last = copied + took

        self._writer.put(timed)

    def wait(self) -> None:
        """Wait until the newest state is on the disk."""
        self._writer.wait()

    def drop(self, clip: Clip) -> None:
        """Write nothing more of a stage that is finished, and remove the clip's file of steps."""
        self._writer.drop()
        with suppress(OSError):  # why: it is removed with the clip's other files, or told then
            clip.path(STEPS).unlink(missing_ok=True)

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._writer.close()


@dataclass(slots=True, kw_only=True)
class ClipLog:
    """The steps of one clip in one stage; see `StepLog`."""

    clip: Clip
    stage: StageName
    chunk: Callable[[], int]  # tokens in one call, of the current plan: another rounds differently
    journal: Journal
    step: Step
    _made_of: Fields = field(default_factory=dict)
    _begun: float = 0.0
    _restored: bool = False

    def begin(self) -> LoopState | None:
        """Return the state that an earlier run or attempt has kept, if it is of this loop."""
        self.journal.wait()
        self._made_of, self._begun = self._identity(), time.monotonic()
        path, say = self.clip.path(STEPS), self.step.reporter.say
        if not path.exists():
            return None
        try:
            state, record = read_steps(path)
        except UnreadableInput as error:
            say(f"{path} cannot be used ({error}): the {self.stage} stage begins anew")
            return None
        if record.made_of.get("stage") != self.stage:
            return None  # why silent: an earlier stage, which has ended; it is replaced
        if differing := differences(record.made_of, self._made_of):
            say(f"{path} is of other steps ({'; '.join(differing)}): not used")
            return None
        if not self._restored:
            self._restored = True
            self.clip.stopwatch.seconds.update(record.seconds)
            known = {notice.text for notice in self.clip.notices}
            fallbacks = [
                Notice(kind="fallback", text=t) for k, t in record.notices if k == "fallback"
            ]
            self.clip.notices += [notice for notice in fallbacks if notice.text not in known]
            total = self.clip.request.stages[self.stage].steps
            if self.stage == "draft":
                total = self.clip.draft_steps
            say(
                f"prompt {self.clip.prompt.id}: going on after step {state.steps} of {total} of "
                f"the {self.stage} stage"
            )
        self.step.skip(state.steps)
        return state.on(self.clip.request.device)

    def keep(self, state: LoopState) -> None:
        """Keep the state if its turn has come, or the run is asked to stop. Raises Stopped."""
        journal, wanted = self.journal, self.step.stop.requested or self.stage == "highres"
        if not journal.refused and (wanted or journal.affordable):
            journal.write(lambda: self._copied(state))
        if self.step.stop.requested:
            journal.wait()
        self.step.stop.between_steps()

    def _copied(self, state: LoopState) -> Callable[[], None]:
        """Return a function that writes the state as it is now."""
        host, seconds = state.on(_HOST), dict(self.clip.stopwatch.seconds)
        seconds[self.stage] = seconds.get(self.stage, 0.0) + time.monotonic() - self._begun
        notices = [(notice.kind, notice.text) for notice in self.clip.notices]
        arguments: tuple[Any, ...] = (self._made_of, seconds, notices)
        path = self.clip.path(STEPS)
        return lambda: write_steps(path, host, *arguments)

    def _identity(self) -> Fields:
        """Return everything that decides the loop's states."""
        clip, text = self.clip, self.clip.text
        assert text is not None, "a denoising stage has its text"
        noise = None
        if clip.provenance.noise_file is not None:
            noise = tensor_digest(clip.noise[self.stage])
        draft = None
        if self.stage == "highres":
            draft = digest_of(clip.latent_of("draft").x.cpu())
        contexts = {"cond": text.cond, "uncond": text.uncond}
        return {
            **of_latents(clip.provenance),
            "stage": self.stage,
            "chunk": self.chunk(),
            "noise file": noise,
            "draft": draft,
            "text": {name: digest_of(x) for name, x in contexts.items() if x is not None},
        }
