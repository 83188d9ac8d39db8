# SPDX-License-Identifier: Apache-2.0
"""A run that another thread or a signal handler asks to stop."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pw_runtime import Prompt, Reporter, Request, RunOptions, find_preset, generate, open_bundle
from pw_runtime import pipeline as pipeline_module
from pw_runtime.cli.main import ENDING
from pw_runtime.resume import Overrides, finish
from pw_runtime.system import stop as stopping
from pw_runtime.system.step import Step
from pw_runtime.system.stop import Stopped, StopRequest
from tests.e2e.pw import Ended, Pw, write_preset


@dataclass
class Clock:
    """A clock that moves when it is told to."""

    now: float = 100.0

    def monotonic(self) -> float:
        return self.now


@dataclass
class Counted:
    """Counts blocks by stage, and calls something at one of them."""

    at: tuple[str, int]
    act: Callable[[], None]
    blocks: dict[str, int] = field(default_factory=dict)

    def advance(self, step: Step, done: float = 1) -> None:
        stage = step.label.split()[0]
        self.blocks[stage] = self.blocks.get(stage, 0) + 1
        if (stage, self.blocks[stage]) == self.at:
            self.act()
        step._advance(done)
        step.stop.check()


def test_a_later_request_shortens_the_grace_and_never_extends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, stop = Clock(), StopRequest()
    monkeypatch.setattr(stopping, "time", clock)
    stop.check()
    stop.between_steps()
    stop.request(10.0)
    stop.request(20.0)
    clock.now += 9
    stop.check()  # the step in progress may still end
    with pytest.raises(Stopped):
        stop.between_steps()
    stop.request()
    with pytest.raises(Stopped):
        stop.check()


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    return Request(
        prompts=(Prompt("a fox"),),
        preset=find_preset(str(write_preset(tmp_path / "small.toml", draft_steps=3))),
        out=tmp_path / "out",
        options=RunOptions(device="cpu"),
    )


@pytest.mark.parametrize("stage", ["draft", "highres", "decode"])
def test_a_request_stops_the_run_within_a_block(
    stage: str, request_: Request, bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()
    counted = Counted((stage, 2), stop.request)
    monkeypatch.setattr(Step, "advance", lambda step, done=1: counted.advance(step, done))
    with pytest.raises(Stopped):
        generate(request_, open_bundle(bundle_dir), Reporter(quiet=True), stop=stop)
    assert counted.blocks[stage] == 2
    assert list(counted.blocks)[-1] == stage
    assert not (request_.out / "0.mp4").exists()


def test_with_grace_the_step_in_progress_ends(
    request_: Request, bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()
    counted = Counted(("draft", 1), lambda: stop.request(1e6))
    monkeypatch.setattr(Step, "advance", lambda step, done=1: counted.advance(step, done))
    bundle = open_bundle(bundle_dir)
    with pytest.raises(Stopped):
        generate(request_, bundle, Reporter(quiet=True), stop=stop)
    draft = bundle.networks.draft.config
    assert counted.blocks == {"draft": 2 * draft.num_layers}  # both passes of one step


def test_a_request_before_the_run_lets_nothing_begin(request_: Request, bundle_dir: Path) -> None:
    stop = StopRequest()
    stop.request()
    with pytest.raises(Stopped):
        generate(request_, open_bundle(bundle_dir), Reporter(quiet=True), stop=stop)
    assert not list(request_.out.glob("*.*"))


def test_a_stopped_clip_is_finished_by_pw_decode_which_stops_in_the_same_way(
    request_: Request, bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, bundle = StopRequest(), open_bundle(bundle_dir)
    counted = Counted(("decode", 1), stop.request)
    monkeypatch.setattr(Step, "advance", lambda step, done=1: counted.advance(step, done))
    with pytest.raises(Stopped):
        generate(request_, bundle, Reporter(quiet=True), stop=stop)
    latents = [request_.out / "0.latents.safetensors"]
    with pytest.raises(Stopped):
        finish(latents, bundle, Reporter(quiet=True), Overrides(device="cpu"), stop=stop)
    (outcome,) = finish(latents, bundle, Reporter(quiet=True), Overrides(device="cpu"))
    assert outcome.video == request_.out / "0.mp4"


@pytest.fixture
def interrupted(pw: Pw, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Run `pw`, and interrupt it twice at once in the decode of a clip."""
    decode = pipeline_module.decode_clip

    def run(clip_id: str, *arguments: object) -> Ended:
        def interrupting(vae: Any, run: Any, clip: Any, step: Any) -> None:
            if clip.prompt.id == clip_id:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            decode(vae, run, clip, step)

        before = {number: signal.getsignal(number) for number in ENDING}
        with monkeypatch.context() as patched:
            patched.setattr(pipeline_module, "decode_clip", interrupting)
            ended = pw(*arguments)
        for number, handler in before.items():  # `pw` ignores them until its process is gone
            signal.signal(number, handler)
        assert ended.code == 130
        return ended

    return run


def words_told(ended: Ended, before: str) -> list[str]:
    """Return the arguments of the `pw` that is told after some words."""
    (line,) = [x for x in ended.err.splitlines() if x.startswith(f"{before}: pw ")]
    return shlex.split(line.removeprefix(f"{before}: pw "))


def test_a_run_with_fresh_is_begun_again_by_the_command_that_is_told(
    pw: Pw, interrupted: Callable[..., Ended], bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    """Seen: one without --fresh, which took the clip as finished and removed what was begun."""
    words = (
        "generate", "--model", bundle_dir, "--preset", preset, "--prompt", "a cat",
        "--draft-only", "--out", tmp_path / "out",
    )  # fmt: skip
    assert pw(*words).code == 0
    again = words_told(interrupted("0", *words, "--fresh"), "to begin again")
    assert again == [*map(str, words), "--fresh"]
    ended = pw(*again)
    assert ended.code == 0, ended.err
    assert "skipped" not in ended.err


def test_pw_decode_tells_a_command_for_the_files_that_are_left(
    pw: Pw, interrupted: Callable[..., Ended], bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    """Seen: a command with all of them, which was refused because the first clip exists."""
    made = pw(
        "generate", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "run",
        "--prompt", "a cat", "--prompt", "a dog", "--draft-only", "--save-latents",
    )  # fmt: skip
    assert made.code == 0, made.err
    cat, dog = (tmp_path / f"run/{i}.latents.safetensors" for i in range(2))
    rest = ("--model", bundle_dir, "--out", tmp_path / "out")
    ended = interrupted("1", "decode", cat, dog, *rest)
    first = tmp_path / "out" / "0.mp4"
    before = first.stat().st_mtime_ns
    again = words_told(ended, "to go on where this run has ended")
    assert again == list(map(str, ("decode", dog, *rest)))
    ended = pw(*again)
    assert ended.code == 0, ended.err
    assert (tmp_path / "out" / "1.mp4").exists()
    assert first.stat().st_mtime_ns == before
