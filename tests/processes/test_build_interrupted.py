# SPDX-License-Identifier: Apache-2.0
"""`pw build` with the real builder of TensorRT for RTX, interrupted while a plan is built."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pw_engines.tensorrt import rtx

REASON = rtx.cannot_build(())
pytestmark = [
    pytest.mark.slow,
    pytest.mark.tensorrt_rtx,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
# Tests that run in the background of a shell inherit the signal ignored.
START = """
import signal, sys
from pw_runtime.cli.main import main

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[0] = "pw"
sys.exit(main())
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_build_ends_at_once_and_leaves_nothing(
    bundle_dir: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """The builder has the pipe too: it ends when nothing holds it any more."""
    command = (sys.executable, "-c", START, "build", "--model", str(bundle_dir))
    environment = {
        **os.environ,
        "PW_CACHE": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    process = subprocess.Popen(
        (*command, "--target", "sm_89", "--jobs", "1"),
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("building embed with TensorRT for RTX"):
            process.send_signal(number)
    assert process.wait() == code, "".join(said)
    assert "what was finished is kept" in "".join(said)
    assert not any(line.startswith("built ") for line in said)
    assert [path.name for path in (tmp_path / "engines").iterdir()] == [".locks"]
