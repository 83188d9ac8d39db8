# SPDX-License-Identifier: Apache-2.0
"""The file of a decode between two latent frames, from which one that was ended goes on.

OUT/<id>.frames.safetensors
    frames/0000, ...        uint8, the packed pixels made of each latent frame so far
    <part>/<layer>          [1, 2, H, W, C], the past that the next one needs
    metadata "pixelwizard"  JSON: everything that decides them, by name, and the format
    metadata "sha256"       JSON: SHA-256 of that text and of every tensor, by name

The past is large, 26 GB of the published decoder at 2K by the plan's model: how often it is
written depends on what that takes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from pw_runtime.job.identity import differences
from pw_runtime.job.journal import Journal
from pw_runtime.job.latents import METADATA, digests_of
from pw_runtime.stages.decode_past import Past
from pw_runtime.system.atomic_files import require_room, write_tensors
from pw_runtime.system.input_files import UnreadableInput, parse_json
from pw_runtime.system.step import Step
from pw_runtime.system.tensor_file import DIGESTS, TensorFile

FORMAT: Final = 1
MAX_RECORD: Final = 2**20  # characters
ASSUMED_RATE: Final = 2**28  # bytes per second, before a file was written: lower than most are
WHILE_WRITTEN: Final = 2  # times the bytes of a file that are on the host: a copy and its bytes
_FRAMES: Final = "frames/"


@dataclass(slots=True, kw_only=True)
class FrameLog:
    """The decode of one clip, frame by frame; see `pw_runtime.stages.decode_past.FrameLog`.

    Attributes:
        path: of the file.
        made_of: everything that decides the tensors, by name.
        journal: writes it, and knows what that takes.
        step: tells the user, and asks the decode to stop.
        spare: bytes on the host for frames and copies; where they do not suffice, none are kept.
    """

    path: Path
    made_of: Mapping[str, str]
    journal: Journal
    step: Step
    spare: int
    _frames: list[Tensor] = field(default_factory=list)  # made of each latent frame
    _written: bool = False
    _since: float = 0.0  # when what would be lost was begun

    def begin(self) -> tuple[list[Tensor], Past] | None:
        """Return what an earlier decode has kept, if it is of this one."""
        self.journal.wait()
        self._since = time.monotonic()
        if not self.path.exists():
            return None
        say = self.step.reporter.say
        try:
            made_of, tensors = _read(self.path, self.spare)
        except UnreadableInput as error:
            say(f"{self.path} cannot be used ({error}): the clip is decoded from the start")
            return None
        if differing := differences(made_of, dict(self.made_of)):
            say(f"{self.path} is of another decode ({'; '.join(differing)}): not used")
            return None
        names = sorted(name for name in tensors if name.startswith(_FRAMES))
        self._frames = [tensors.pop(name) for name in names]
        say(f"{self.path} has {sum(map(len, self._frames))} frames: going on after them")
        return list(self._frames), tensors

    def keep(self, frames: Tensor, past: Past) -> None:
        """Write what there is if its turn has come. Raises Stopped."""
        self._frames.append(frames)
        size = sum(x.nbytes for x in (*self._frames, *past.values()))
        if WHILE_WRITTEN * size > self.spare:
            self._frames.clear()
            self.spare = 0  # for good: the next state has more frames
        elif self._due(size):
            self.journal.write(lambda: self._copied(past))
            self._written, self._since = True, time.monotonic()
        if self.step.stop.requested:
            self.journal.wait()
        self.step.stop.between_steps()

    def _due(self, size: int) -> bool:
        """Tell whether to write a file of so many bytes: not where the disk is behind.

        Before an end that was asked for, where that takes no longer than to compute it again.
        """
        journal = self.journal
        if journal.refused or not journal.idle:
            return False
        seconds = journal.last if self._written else size / ASSUMED_RATE
        if self.step.stop.requested:
            return seconds <= time.monotonic() - self._since
        return journal.affords(seconds)

    def _copied(self, past: Past) -> Callable[[], None]:
        """Return a function that writes the state as it is now."""
        tensors = {f"{_FRAMES}{t:04}": frames for t, frames in enumerate(self._frames)}
        tensors |= {name: x.to("cpu", copy=True).contiguous() for name, x in past.items()}
        path, made_of = self.path, dict(self.made_of)
        return lambda: _write(path, tensors, made_of)


def _write(path: Path, tensors: Mapping[str, Tensor], made_of: Mapping[str, str]) -> None:
    """Write the file, whole or not at all, where as much again stays free for the video.

    Raises WriteFailed.
    """
    require_room(path.parent, 2 * sum(x.nbytes for x in tensors.values()))
    text = json.dumps({"format": FORMAT, "made of": dict(made_of)})
    write_tensors(path, tensors, {METADATA: text, DIGESTS: json.dumps(digests_of(text, tensors))})


def _read(path: Path, spare: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what the file is made of, and its tensors, which take at most `spare` bytes.

    Raises UnreadableInput where it is damaged, none of ours, or larger.
    """
    file = TensorFile(path)
    if file.size > spare:
        raise UnreadableInput(f"{file.size} bytes, and the plan leaves {spare} of host memory")
    text = file.metadata.get(METADATA, "")
    if len(text) > MAX_RECORD:
        raise UnreadableInput(f"more than {MAX_RECORD} characters of metadata")
    tensors = {name: x.clone() for name, x in file.tensors().items()}
    if parse_json(file.metadata.get(DIGESTS, "null")) != digests_of(text, tensors):
        raise UnreadableInput("another SHA-256 than when it was written")
    record = parse_json(text)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UnreadableInput(f"another format than {FORMAT}")
    made_of = record.get("made of")
    if not isinstance(made_of, dict):
        raise UnreadableInput("no record of what it is made of")
    return made_of, tensors
