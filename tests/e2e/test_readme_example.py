# SPDX-License-Identifier: Apache-2.0
"""The Python example of the README, run as it stands there but for model, preset and folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def test_python_example_of_the_readme_makes_a_clip(
    bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    for ours, theirs in (
        (bundle_dir, "build/demo/nano"),
        (preset, "nano"),
        (tmp_path / "clips", "clips"),
    ):
        assert f'"{theirs}"' in example
        example = example.replace(f'"{theirs}"', repr(str(ours)))
    names: dict[str, Any] = {}
    exec(example, names)
    (outcome,) = names["outcomes"]
    assert outcome.error is None
    assert outcome.video == tmp_path / "clips" / "0.mp4"
    assert outcome.video.exists()
