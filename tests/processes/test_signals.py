# SPDX-License-Identifier: Apache-2.0
"""Signals to `pw generate`: the step in progress ends, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.pw import write_preset

# `pw`, with signals as in a shell, whose second draft step says that it has begun, and lasts long.
# why short sleeps: a signal that comes just before one is handled after it, however long it is.
PROGRAM = """
import os, signal, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # in threads that imports start, too
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from pw_runtime.cli import main as cli, stopping
from pw_runtime.sampling import denoise
stopping.GRACE = float(os.environ["PW_TEST_GRACE"])
sample = denoise.sample
def told(velocities, *rest, **options):
    def slow(x, step):
        if step == 1:
            print("step 2", file=sys.stderr, flush=True)
            if not os.environ["PW_TEST_HANGS"]:
                signal.sigwait([signal.SIGUSR1])
            while os.environ["PW_TEST_HANGS"]:
                time.sleep(0.05)
                if signal.getitimer(signal.ITIMER_REAL)[0]:
                    print("asked to stop", file=sys.stderr, flush=True)
        return velocities(x, step)
    return sample(slow, *rest, **options)
if os.environ["PW_TEST_SLOW"]:
    denoise.sample = told
cli.main()
"""

# `pw` of a command that three signals end at once: they are let in together.
AT_ONCE = """
import os, signal, sys, types
from pw_runtime.cli import main as cli, stopping
from pw_runtime.system.stop import StopRequest
for number in cli.ENDING:
    signal.signal(number, signal.default_int_handler)
def run():
    reporter = types.SimpleNamespace(warn=lambda text: print(text, file=sys.stderr))
    with stopping.stopping(StopRequest(), reporter, lambda: "to go on: pw"):
        signal.pthread_sigmask(signal.SIG_BLOCK, cli.ENDING)
        for number in cli.ENDING:
            os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, cli.ENDING)
        print("not interrupted", file=sys.stderr)
cli._run = run
cli.main()
"""


class Started:
    """A `pw generate` of one clip into a folder."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        preset = write_preset(folder / "p.toml", draft_steps=4, highres_steps=2)
        self.words = [
            *("generate", "--model", str(bundle), "--preset", str(preset), "--prompt", "a cat"),
            *("--out", str(folder / "out"), "--device", "cpu"),
        ]

    def start(self, *more: str, grace: float = 60, hangs: bool = False, slow: bool = True) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PW_TEST_GRACE": str(grace),
            "PW_TEST_HANGS": "x" * hangs,
            "PW_TEST_SLOW": "x" * slow,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", PROGRAM, *self.words, *more],
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, text: str) -> str:
        assert self.process.stderr is not None
        seen = ""
        for line in self.process.stderr:
            seen += line
            if text in line:
                return seen
        pytest.fail(seen)

    def end(self) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=120)
        return self.process.returncode, err


@pytest.fixture
def pw_generate(bundle_dir: Path, tmp_path: Path) -> Iterator[Started]:
    started = Started(bundle_dir, tmp_path)
    yield started
    started.process.kill()
    started.process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_the_step_in_progress_ends_and_the_command_that_is_told_goes_on(
    pw_generate: Started, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    pw_generate.start("--seed", "-1")
    said = pw_generate.wait_for("step 2")
    seed = said.split("--seed ")[1].split()[0]
    pw_generate.process.send_signal(number)
    os.kill(pw_generate.process.pid, signal.SIGUSR1)  # the step ends
    ended, err = pw_generate.end()
    assert ended == code, err
    (told,) = [line for line in err.splitlines() if "to go on where this run has ended" in line]
    assert told.endswith(f"--seed -1 --seed {seed}")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"0.latents.safetensors", "0.steps.safetensors"}
    pw_generate.start("--seed", "-1", "--seed", seed, slow=False)
    ended, err = pw_generate.end()
    assert ended == 0, err
    assert "going on after step 2 of 4 of the draft stage" in err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"0.json", "0.mp4"}


@pytest.mark.slow
def test_a_step_that_does_not_end_in_time_is_interrupted(
    pw_generate: Started, tmp_path: Path
) -> None:
    pw_generate.start(grace=0.1, hangs=True)
    pw_generate.wait_for("step 2")
    pw_generate.process.terminate()
    ended, err = pw_generate.end()
    assert ended == 143, err
    assert "to go on where this run has ended: pw generate" in err
    assert (tmp_path / "out" / "0.steps.safetensors").exists()  # after step 1


@pytest.mark.slow
def test_a_second_signal_ends_at_once(pw_generate: Started) -> None:
    pw_generate.start(hangs=True)
    pw_generate.wait_for("step 2")
    pw_generate.process.terminate()
    pw_generate.wait_for("asked to stop")
    pw_generate.process.send_signal(signal.SIGHUP)
    ended, err = pw_generate.end()
    assert ended == 129, err


def test_three_signals_at_once_end_the_process_once_and_in_order() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", AT_ONCE],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 130, ended.stderr  # SIGHUP asks, SIGINT ends, SIGTERM is passed over
    assert ended.stderr.splitlines() == [  # no traceback of a signal that had lost its handler
        "to go on: pw",
        "interrupted: what was finished is kept, partial files are removed",
    ]
