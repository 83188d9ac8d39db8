# SPDX-License-Identifier: Apache-2.0
"""Store the names of a plan's tensors behind it in its file, where they are not those of the spec.

    plan | names as JSON | their length in 8 bytes | MARK

TensorRT is given the plan alone; the store's digest covers both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

MARK: Final = b"\npixelwizard names of tensors\n"
_LENGTH: Final = 8  # bytes of the length, least significant first


def append_names(path: Path, names: Sequence[str]) -> None:
    """Append the names of a plan's inputs and outputs, in the order of the spec, to its file."""
    text = json.dumps(list(names)).encode()
    with path.open("ab") as file:
        file.write(text + len(text).to_bytes(_LENGTH, "little") + MARK)


def split_plan(data: bytes) -> tuple[bytes | memoryview, list[str] | None]:
    """Return the plan and the names appended to it; None where none were.

    The store has verified the file: a mark was written by `append_names`.
    """
    if not data.endswith(MARK):
        return data, None
    end = len(data) - len(MARK) - _LENGTH
    start = end - int.from_bytes(data[end : end + _LENGTH], "little")
    names: list[str] = json.loads(data[start:end])
    return memoryview(data)[:start], names
