# SPDX-License-Identifier: Apache-2.0
"""A disk that fills up at any moment leaves no partial clip."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import resource, signal, sys
from pathlib import Path
import torch
from pw_runtime.errors import WriteFailed
from pw_runtime.stages.write import write_video
from pw_runtime.types import FrameChunk

folder = Path(sys.argv[1])
generator = torch.Generator().manual_seed(0)
rgb = torch.randint(0, 256, (9, 128, 192, 3), dtype=torch.uint8, generator=generator)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def save(name, codec):
    chunks = (FrameChunk(start=i, pixel_format="rgb24", frames=rgb[i:i + 1]) for i in range(9))
    return write_video(
        chunks, folder / name, width=192, height=128, frames=9, fps=24, codec=codec
    )


def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


for codec in ("h264", "ffv1"):
    size = save(f"{codec} earlier", codec).bytes
    for most in (0, 1, 4096, size // 3, size // 2, size - 65536, size - 4096, size - 1):
        limit(most)
        for name in (f"{codec} new", f"{codec} earlier"):
            try:
                save(name, codec)
            except WriteFailed as error:
                print(f"{codec} {most} refused: {error.what}")
            else:
                print(f"{codec} {most} WRITTEN")
    limit(size)
    save(f"{codec} enough", codec)
    limit(resource.RLIM_INFINITY)
"""


def test_file_size_limit_is_an_error_at_every_point(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 32
    for line in lines:
        assert "refused: cannot write" in line, line
    # The earlier clip is complete: the same frames and settings gave the same bytes again.
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for codec in ("h264", "ffv1"):
        assert files.pop(f"{codec} earlier") == files.pop(f"{codec} enough")
    assert files == {}
