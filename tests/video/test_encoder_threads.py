# SPDX-License-Identifier: Apache-2.0
"""An encoder opens as many threads on every machine: memory and streams depend on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pw_runtime.types import Codec
from tests.video.test_write import CODECS

# One core, or all: what the encoders would count.
PROGRAM = """
import hashlib, json, os, sys
from pathlib import Path

path, codec, alone = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "1"
if alone:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
from pw_runtime.stages import write
from pw_runtime.types import FrameChunk

most, mux = 0, write._mux

def counting(*arguments):
    global most
    most = max(most, len(os.listdir("/proc/self/task")))
    mux(*arguments)

write._mux = counting
generator = torch.Generator().manual_seed(0)
frames = torch.randint(16, 236, (8, 96 * 3 // 2, 128), generator=generator).to(torch.uint8)
if codec == "ffv1":
    frames = torch.randint(0, 256, (8, 96, 128, 3), generator=generator).to(torch.uint8)
chunk = FrameChunk(start=0, pixel_format="rgb24" if codec == "ffv1" else "yuv420p", frames=frames)
before = len(os.listdir("/proc/self/task"))
write.write_video(
    [chunk], path, width=128, height=96, frames=8, fps=24, codec=codec
)
print(json.dumps([most - before, hashlib.sha256(path.read_bytes()).hexdigest()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and CPU affinity")
@pytest.mark.parametrize("codec", CODECS)
def test_one_core_and_many_give_one_stream_by_as_many_threads(codec: Codec, tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    results = []
    for alone in ("0", "1"):
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, tmp_path / f"{alone}.video", codec, alone],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        results.append(json.loads(run.stdout))
    (many, stream), (few, same) = results
    assert stream == same
    if codec != "ffv1":  # whose frames are converted by libswscale, with threads of its own
        assert many == few >= 2
