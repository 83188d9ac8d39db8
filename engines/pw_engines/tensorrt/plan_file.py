# SPDX-License-Identifier: Apache-2.0
"""Store what is known about a plan behind it in its file.

    plan | facts as JSON | their length in 8 bytes | MARK

TensorRT is given the plan alone; the store's digest covers both.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

MARK: Final = b"\npixelwizard facts of a plan\n"
_LENGTH: Final = 8  # bytes of the length, least significant first


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFacts:
    """Facts that a plan's builder knew and its reader needs.

    Attributes:
        names: of the plan's inputs and outputs, in the order of the spec; None: those of the spec.
        scratch: bytes of scratch memory that a call takes; None where the builder did not say.
    """

    names: tuple[str, ...] | None = None
    scratch: int | None = None


def append_facts(path: Path, facts: PlanFacts) -> None:
    """Append facts to the file of a plan."""
    text = json.dumps(asdict(facts)).encode()
    with path.open("ab") as file:
        file.write(text + len(text).to_bytes(_LENGTH, "little") + MARK)


def split_plan(data: bytes) -> tuple[bytes | memoryview, PlanFacts]:
    """Return the plan and its facts: no facts where none were appended.

    The store has verified the file: a mark was written by `append_facts`.
    """
    if not data.endswith(MARK):
        return data, PlanFacts()
    end = len(data) - len(MARK) - _LENGTH
    start = end - int.from_bytes(data[end : end + _LENGTH], "little")
    return memoryview(data)[:start], _facts(data[start:end])


def read_facts(path: Path) -> PlanFacts:
    """Return the facts in the file of a plan, without reading the plan."""
    with path.open("rb") as file:
        tail = _LENGTH + len(MARK)
        if file.seek(0, os.SEEK_END) < tail:
            return PlanFacts()
        file.seek(-tail, os.SEEK_END)
        end = file.read()
        if not end.endswith(MARK):
            return PlanFacts()
        length = int.from_bytes(end[:_LENGTH], "little")
        file.seek(-tail - length, os.SEEK_END)
        return _facts(file.read(length))


def _facts(text: bytes) -> PlanFacts:
    stored = json.loads(text)
    names = stored["names"]
    return PlanFacts(names=None if names is None else tuple(names), scratch=stored["scratch"])
