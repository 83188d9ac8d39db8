# SPDX-License-Identifier: Apache-2.0
"""Children end with their parent, however it ends: real processes, real signals.

A named pipe tells the rest: a child writes a line into it when it is where it should be killed, and
the pipe ends when neither parent nor child holds it any more.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere children look once a second"),
]

# Imported by the child before its program: the child says when that has ended, and stays.
STAY = """
import atexit, os, threading

pipe = os.open(os.environ["PW_TEST_PIPE"], os.O_WRONLY)
os.set_inheritable(pipe, False)

def stay():
    os.write(pipe, b"running\\n")
    threading.Event().wait()

atexit.register(stay)
"""
TASK = """
from pathlib import Path
from pw_bench.e2e.process import run_process
from pw_bench.e2e.job import Job
from pw_bench.e2e.worker import Task
from pw_runtime.presets import PRESETS

folder = Path(os.environ["PW_TEST_FOLDER"])
job = Job(
    checkpoint=folder, bundle=folder, noise=folder, prompt="", negative="",
    preset=PRESETS["nano"], device="cpu", precision="fp32", codec="h264",
)
(folder / "videos").mkdir()
run_process(Task(program="ours", job=job, folder=folder / "videos", clips=1), stay, None)
"""
BUILDER = """
from pathlib import Path
from pw_engines.tensorrt.process import _run_builder

os.environ |= stay
sys.path.insert(0, os.environ["PYTHONPATH"].split(":")[0])
folder = Path(os.environ["PW_TEST_FOLDER"])
(folder / "request.json").write_text("{}", encoding="utf-8")
_run_builder("pw_engines.tensorrt.onnx_build", folder)
"""
PW_BUILD = """
from pathlib import Path
from types import SimpleNamespace
from pw_bench.e2e.run import build_engines
from pw_runtime.system.progress import Reporter

os.environ |= stay
folder = Path(os.environ["PW_TEST_FOLDER"])
job = SimpleNamespace(bundle=folder, device="cpu", precision="fp32")
build_engines(job, folder / "cache", Reporter())
"""
PEERS = """
from dataclasses import dataclass
from pathlib import Path
from pw_bench.peers.dit import DitWork
from pw_bench.peers.subprocess_ab import run_child

os.environ |= stay
file = Path(os.environ["PW_TEST_FOLDER"]) / "out"
work = DitWork(
    dim=384, layers=1, width=64, height=64, frames=1, steps=1, text=1, chunk=64
)
run_child("pw_bench.peers.dit", "no such contender", work, file, count_tensors=False)
"""
WORKERS = """
from dataclasses import replace
from pathlib import Path
from pw_engines import EngineStore
from pw_export.build import run_jobs
from pw_export.build_jobs import TransformerSource, jobs_for, platform_for
from tests.engines.test_segments import DRAFT
from tests.processes.blocking import BlockingSource
import torch

def main():
    store = EngineStore(Path(os.environ["PW_TEST_FOLDER"]) / "engines")
    source, cpu = TransformerSource(DRAFT, "fp32", 64), torch.device("cpu")
    jobs, _ = jobs_for([source], "aoti", cpu, store, platform_for("aoti", cpu))
    blocking = BlockingSource(os.environ["PW_TEST_PIPE"])
    run_jobs([replace(job, source=blocking) for job in jobs[:2]], 1, print)

if __name__ == "__main__":
    from pw_runtime.cli.main import _ending_on
    with _ending_on(signal.SIGTERM, signal.SIGHUP):
        main()
"""
START = """
import os, signal, sys

# Tests that run in the background of a shell, or under nohup, inherit them ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
held = os.open(os.environ["PW_TEST_PIPE"], os.O_WRONLY)
path = os.pathsep.join((os.environ["PW_TEST_STAY"], *filter(None, sys.path)))
stay = {"PYTHONPATH": path}
"""
PROGRAMS = {
    "pw bench e2e": TASK,
    "the TensorRT builder": BUILDER,
    "pw build of pw bench e2e": PW_BUILD,
    "pw bench dit-peers": PEERS,
    "pw build": WORKERS,
}


def start(program: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start a process that starts children; each of them has the pipe open."""
    stay = folder / "stay"
    stay.mkdir()
    (stay / "sitecustomize.py").write_text(STAY, encoding="utf-8")
    file = folder / "parent.py"
    file.write_text(START + program, encoding="utf-8")
    variables = {
        "PW_TEST_PIPE": str(folder / "pipe"),
        "PW_TEST_FOLDER": str(folder),
        "PW_TEST_STAY": str(stay),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    os.mkfifo(folder / "pipe")
    with (folder / "log").open("wb") as log:  # a parent that fails says why
        return subprocess.Popen(
            [sys.executable, file], env={**os.environ, **variables}, stdout=log, stderr=log
        )


@pytest.mark.parametrize(
    ("program", "number"),
    [
        *((program, signal.SIGKILL) for program in PROGRAMS),
        ("pw build", signal.SIGTERM),
        ("pw build", signal.SIGHUP),
        ("pw build", signal.SIGINT),
        ("pw bench e2e", signal.SIGINT),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_no_child_outlives_its_parent(tmp_path: Path, program: str, number: signal.Signals) -> None:
    parent = start(PROGRAMS[program], tmp_path)
    with (tmp_path / "pipe").open("rb") as pipe:  # opens when the parent opens it
        assert pipe.readline() == b"running\n", (tmp_path / "log").read_text(encoding="utf-8")
        parent.send_signal(number)
        assert pipe.read() == b""  # comes when the last child has ended
    parent.wait()
    assert parent.returncode != 0
