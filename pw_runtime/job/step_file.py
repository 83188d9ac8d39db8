# SPDX-License-Identifier: Apache-2.0
"""The file of a denoising loop between two steps, from which a stage that was ended goes on.

OUT/<id>.steps.safetensors
    x, corrected, before, earlier, ...  [C, T, H, W] fp32, see `LoopState`
    metadata "pixelwizard"              a `StepRecord` as JSON
    metadata "sha256"                   JSON: SHA-256 of that text and of every tensor, by name
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from pw_runtime.job.latents import METADATA, digests_of
from pw_runtime.sampling.loop_state import LoopState
from pw_runtime.system.atomic_files import write_tensors
from pw_runtime.system.input_files import UnreadableInput, parse_json
from pw_runtime.system.tensor_file import DIGESTS, TensorFile

FORMAT: Final = 1
MAX_RECORD: Final = 2**20  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """The loop that a file of steps is of. Bump `format` when a field changes."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    made_of: dict[str, Any]  # everything that decides the tensors, by name
    steps: int  # that are finished
    numbers: dict[str, str]  # as hexadecimal floats
    seconds: dict[str, float]  # of the clip so far
    notices: list[tuple[str, str]]  # kind and text
    format: Literal[1] = FORMAT


_RECORD = TypeAdapter(StepRecord)


def write_steps(
    path: Path,
    state: LoopState,
    made_of: Mapping[str, Any],
    seconds: Mapping[str, float],
    notices: list[tuple[str, str]],
) -> None:
    """Write a state whose tensors are on the host, whole or not at all. Raises WriteFailed."""
    record = StepRecord(
        made_of=dict(made_of),
        steps=state.steps,
        numbers={name: float(value).hex() for name, value in state.numbers.items()},
        seconds=dict(seconds),
        notices=notices,
    )
    text = _RECORD.dump_json(record).decode()
    tensors = {name: x.contiguous() for name, x in state.tensors.items()}
    digests = json.dumps(digests_of(text, tensors))
    write_tensors(path, tensors, {METADATA: text, DIGESTS: digests})


def read_steps(path: Path) -> tuple[LoopState, StepRecord]:
    """Read a state and its record.

    Raises UnreadableInput where the file is damaged, none of ours, or not finite.
    """
    file = TensorFile(path)
    text = file.metadata.get(METADATA, "")
    if len(text) > MAX_RECORD:
        raise UnreadableInput(f"more than {MAX_RECORD} characters of metadata")
    tensors = {name: x.clone() for name, x in file.tensors().items()}
    if parse_json(file.metadata.get(DIGESTS, "null")) != digests_of(text, tensors):
        raise UnreadableInput("another SHA-256 than when it was written")
    try:
        record = _RECORD.validate_json(text)
        numbers = {name: float.fromhex(value) for name, value in record.numbers.items()}
    except (ValidationError, ValueError) as error:
        raise UnreadableInput(f"a record that cannot be read: {error}") from error
    if not all(torch.isfinite(x).all() for x in tensors.values()):
        raise UnreadableInput("NaN or infinity")
    return LoopState(steps=record.steps, tensors=tensors, numbers=numbers), record
