# SPDX-License-Identifier: Apache-2.0
"""Run the command line as a user does, inside the test process (imports are then paid once)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from pw_runtime.cli import main as cli

PRESET = """\
[draft]
width = {draft_width}
height = 64
steps = {draft_steps}
shift = 5.0
guidance = {draft_guidance}
solver = "{solver}"

[highres]
width = 192
height = 96
steps = {highres_steps}
shift = 5.5
guidance = {highres_guidance}
solver = "{solver}"

[video]
frames = {frames}
fps = 24

[decode]
tiling = "{tiling}"
strips = {strips}
overlap = 3

[compat]
truncating_uint8 = {truncating}
"""

DEFAULTS = {
    "draft_width": 96,
    "draft_steps": 2,
    "highres_steps": 2,
    "draft_guidance": 5.0,
    "highres_guidance": 4.0,
    "solver": "unipc",
    "frames": 5,
    "tiling": "exact",
    "strips": 1,
    "truncating": "false",
}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Pw:
    """The `pw` command."""

    monkeypatch: pytest.MonkeyPatch
    capfd: pytest.CaptureFixture[str]

    def __call__(self, *arguments: object) -> Ended:
        """Run `pw` with these arguments."""
        self.monkeypatch.setattr(sys, "argv", ["pw", *map(str, arguments)])
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = self.capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, out, err)


def write_preset(path: Path, **changes: object) -> Path:
    """A small preset file; `changes` replace values of DEFAULTS."""
    path.write_text(PRESET.format(**(DEFAULTS | changes)))
    return path


def latent_shapes(frames: int = 5) -> dict[str, Sequence[int]]:
    """Noise shapes of the preset of `write_preset`."""
    t = (frames - 1) // 4 + 1
    return {"draft_noise": (48, t, 4, 6), "highres_noise": (48, t, 6, 12)}
