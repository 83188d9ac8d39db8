# SPDX-License-Identifier: Apache-2.0
"""A disk that fills up at any moment of the writing leaves no half clip."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, signal, sys
from pathlib import Path
import torch
from pw_runtime.errors import WriteFailed
from pw_runtime.stages.write import write_video
from pw_runtime.types import FrameChunk

codec, folder = sys.argv[1], Path(sys.argv[2])
generator = torch.Generator().manual_seed(0)
rgb = torch.randint(0, 256, (9, 128, 192, 3), dtype=torch.uint8, generator=generator)

def save(name):
    chunks = (FrameChunk(start=i, pixel_format="rgb24", frames=rgb[i:i + 1]) for i in range(9))
    return write_video(
        chunks, folder / name, width=192, height=128, frames=9, fps=24, codec=codec
    )

size = save("earlier")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (0, 1, 4096, size // 3, size // 2, size - 65536, size - 4096, size - 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for name in ("new", "earlier"):
        try:
            save(name)
        except WriteFailed as error:
            print(f"{limit} refused: {error.what}")
        else:
            print(f"{limit} WRITTEN")
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
save("enough")
"""


@pytest.mark.parametrize("codec", ["h264", "ffv1"])
def test_file_size_limit_is_an_error_at_every_point(codec: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, codec, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 16
    for line in lines:
        assert "refused: cannot write" in line, line
    # The earlier clip is whole: the same frames and settings gave the same bytes again.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["earlier", "enough"]
    assert (tmp_path / "earlier").stat().st_size == (tmp_path / "enough").stat().st_size
