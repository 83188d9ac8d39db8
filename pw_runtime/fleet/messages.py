# SPDX-License-Identifier: Apache-2.0
"""Messages between the driver, its workers and their ranks, frozen.

Importing this does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pw_runtime.types import LoraFile, Request, RunOptions, StageName

PIECE_BYTES = 8 * 2**20  # most bytes of a file in one message


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A worker that has found its device and its bundle."""

    host: str
    shares_output: bool  # it sees the driver's output folder
    machine: dict[str, str | int]  # what decides the last bits of a clip beside versions
    host_bytes: int | None  # free host memory of the machine, for all its workers; None: unknown
    process_bytes: int  # that the worker's own processes have taken of it
    gpu_bytes: int | None  # free memory of each of the worker's GPUs; None: it has none


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedFile:
    """A complete file in a worker's folder, under the name that it gets in the output folder."""

    name: str
    bytes: int
    sha256: str  # "" where the driver sees the folder


@dataclass(frozen=True, slots=True)
class Said:
    """A line for the user, about what is the same for every worker and batch."""

    text: str


@dataclass(frozen=True, slots=True)
class Warned:
    """A line that the user must see."""

    text: str


@dataclass(frozen=True, slots=True)
class Made:
    """A clip whose video and receipt are complete."""

    prompt_id: str
    files: tuple[StagedFile, ...]  # in the order in which they may appear


@dataclass(frozen=True, slots=True)
class Failed:
    """A prompt without a clip."""

    prompt_id: str
    error: str


@dataclass(frozen=True, slots=True)
class Kept:
    """Files of the batch that are no clips: latents that were asked for, or left by a failure."""

    files: tuple[StagedFile, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a batch; an error concerns all its prompts that have no clip."""

    error: str | None = None
    bad_input: bool = False  # no worker could make the batch: the request or the bundle is at fault
    lost: bool = False  # a rank of the worker died, or its ranks cannot go on


Event = Said | Warned | Made | Failed | Kept | Ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The first thing that a worker tells each of its ranks: what it will work with."""

    model: str  # folder of the bundle
    options: RunOptions  # of the run; a rank takes the GPU of its number
    loras: Mapping[StageName, tuple[LoraFile, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Findings of a process that will compute; a rank's answer to its Part."""

    machine: dict[str, str | int]
    process_bytes: int
    gpu_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A batch to make."""

    request: Request  # whose `out` is the folder for this batch
    out: Path  # of the driver, where the files will be
    shared: bool  # the driver sees the folder for this batch
