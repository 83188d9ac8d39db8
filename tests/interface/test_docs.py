# SPDX-License-Identifier: Apache-2.0
"""Every example of docs/python.md and of the README's section, run as it stands but for the model,
the preset and the folder."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.pw import write_preset

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    pytest.param(code, id=f"{file.name}-{number}")
    for file in (ROOT / "docs" / "python.md", ROOT / "README.md")
    for number, code in enumerate(
        re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL)
    )
]


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    names = (None, "pw_runtime")
    before = [(logging.getLogger(n), logging.getLogger(n).level) for n in names]
    handlers = list(logging.getLogger().handlers)
    yield
    for logger, level in before:
        logger.setLevel(level)
    logging.getLogger().handlers[:] = handlers


@pytest.mark.parametrize("code", EXAMPLES)
def test_the_example_runs(
    code: str, bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    preset = write_preset(tmp_path / "small.toml")
    for ours, theirs in ((bundle_dir, "build/demo/nano"), (preset, "nano")):
        code = code.replace(f'"{theirs}"', repr(str(ours)))
    names: dict[str, Any] = {}
    exec(code, names)
    written = "clips" in code
    assert any(tmp_path.glob("clips/*.mp4")) == written
    if "out.frames" in code:
        assert names["out"].frames.shape == (5, 96, 192, 3)
    if "outcomes" in code:
        assert names["outcomes"][0].error is None


def test_there_are_examples() -> None:
    assert len(EXAMPLES) > 5
