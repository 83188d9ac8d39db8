# SPDX-License-Identifier: Apache-2.0
"""`pw bench gpu-suite`, as far as a machine without a GPU can run it."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pw_bench import gpu_suite
from pw_bench.gpu_suite import PARTS, is_done, run_parts
from pw_bench.measure.environment import NO_CHECKOUT
from pw_bench.results import Skipped, read_result, write_result
from pw_runtime.cli.bench import bench
from pw_runtime.cli.bench import gpu_suite as command
from pw_runtime.cli.main import Terminated
from pw_runtime.cli.options import SOME_FAILED
from pw_runtime.errors import BadRequest
from tests.bench.small_results import figure, result

FINISHED = result()
SHORT = [part for part in PARTS if not part.long and part.gpus == 1]


def run(folder: Path, minutes: float = 60.0, *, full: bool = False) -> dict[str, str]:
    return run_parts(folder, minutes, full=full, gpus=1, say=lambda line: None)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return the arguments of every `pw bench` that is run; each writes its file."""
    calls: list[list[str]] = []

    def run(command: list[str]) -> int:
        arguments = command[command.index("bench") + 1 :]
        calls.append(arguments)
        write_result(FINISHED, Path(arguments[-1]))
        return 0

    monkeypatch.setattr(gpu_suite, "_run_part", run)
    monkeypatch.setattr(gpu_suite, "commit", lambda: FINISHED.identity.commit)
    monkeypatch.setattr(gpu_suite, "is_dirty", lambda: False)
    monkeypatch.setattr(gpu_suite, "gpu_names", lambda: ["Accelerator"])
    return calls


def test_finished_parts_are_not_run_again(commands, tmp_path: Path) -> None:
    write_result(FINISHED, tmp_path / "e2e-2k.json")
    assert run(tmp_path) == {}
    assert not any(arguments[0] == "e2e" for arguments in commands)
    count = len(commands)
    assert count == len(SHORT) - 1
    assert run(tmp_path) == {}
    assert len(commands) == count


@pytest.mark.parametrize(
    "old",
    [
        replace(FINISHED, identity=replace(FINISHED.identity, commit="another")),
        replace(FINISHED, skipped=(Skipped(part="the remaining rounds", reason="interrupted"),)),
        None,
    ],
)
def test_parts_of_other_sources_or_interrupted_ones_are_run_again(commands, tmp_path, old) -> None:
    file = tmp_path / "e2e-2k.json"
    write_result(old, file) if old else file.write_text("{}")
    assert run(tmp_path) == {}
    assert sorted({arguments[0] for arguments in commands} - {"stages"}) == ["e2e", "kernels"]
    assert read_result(file) == FINISHED


@pytest.mark.parametrize(
    ("there", "here", "gpus"),
    [
        ({"dirty": True}, "abc1234", ["Accelerator"]),
        ({}, "abc1234-dirty", ["Accelerator"]),
        ({"commit": NO_CHECKOUT, "dirty": True}, NO_CHECKOUT, ["Accelerator"]),
        ({}, "abc1234", ["Accelerator of another kind"]),
    ],
)
def test_parts_of_unknown_sources_or_another_gpu_are_not_done(
    there: dict[str, Any],
    here: str,
    gpus: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seen: changed sources counted as those of their commit, and so did any GPU."""
    monkeypatch.setattr(gpu_suite, "commit", lambda: here)
    monkeypatch.setattr(gpu_suite, "gpu_names", lambda: gpus)
    write_result(
        replace(FINISHED, identity=replace(FINISHED.identity, **there)), tmp_path / "a.json"
    )
    assert not is_done(tmp_path / "a.json")


def test_part_without_time_left_does_not_start(commands, tmp_path: Path) -> None:
    missing = run(tmp_path, 1.1)
    assert missing["e2e-2k"].endswith("s expected: give --minutes 4")
    assert {arguments[0] for arguments in commands} == {"kernels"}  # of 2K and the draft


def test_parts_of_changed_sources_are_advised_to_be_measured_in_one_call(
    commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: "repeat the command", which measured the same parts again and never came further."""
    monkeypatch.setattr(gpu_suite, "is_dirty", lambda: True)
    monkeypatch.setattr(gpu_suite, "commit", lambda: "abc1234-dirty")
    lines: list[str] = []
    missing = run_parts(tmp_path, 1.1, full=False, gpus=1, say=lines.append)
    assert lines[0].startswith("the sources are abc1234-dirty: files of earlier calls")
    whole = sum(part.seconds for part in SHORT) / 60 + 1
    assert missing
    for reason in missing.values():
        assert f"give --minutes {whole:.0f} for all parts in one call, or commit" in reason
        assert "PW_COMMIT" in reason
    assert run_parts(tmp_path, whole, full=False, gpus=1, say=lines.append) == {}


def test_part_that_fails_is_reported_and_the_others_run(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_suite, "is_dirty", lambda: False)
    monkeypatch.setattr(gpu_suite, "_run_part", lambda command: 2)
    missing = run(tmp_path)
    assert all("exit code 2" in reason for reason in missing.values())
    assert len(missing) == len(SHORT)


@pytest.mark.parametrize(
    ("signal", "got_it_too", "told"),
    [
        (KeyboardInterrupt(), True, ["wait", "wait in time", "wait"]),  # of a terminal
        (Terminated(1), True, ["wait", "wait in time", "wait"]),
        (Terminated(15), False, ["wait", "wait in time", "terminate", "wait"]),
    ],
)
def test_part_that_runs_may_write_its_file_when_a_signal_ends_the_suite(
    monkeypatch: pytest.MonkeyPatch, signal: BaseException, got_it_too: bool, told: list[str]
) -> None:
    """Seen: it was killed a quarter of a second after Ctrl-C, and its samples were lost."""
    heard: list[str] = []

    class Part:
        def __init__(self, command: list[str], env: dict[str, str]) -> None: ...

        def __enter__(self) -> Part:
            return self

        def __exit__(self, *_: object) -> None: ...

        def wait(self, timeout: float | None = None) -> int:
            heard.append("wait" if timeout is None else "wait in time")
            if len(heard) == 1:
                raise signal
            if timeout is not None and not got_it_too:
                raise subprocess.TimeoutExpired("pw", timeout)
            return 130

        def poll(self) -> int | None:
            return 130 if got_it_too else None

        def terminate(self) -> None:
            heard.append("terminate")

    monkeypatch.setattr(subprocess, "Popen", Part)
    with pytest.raises(type(signal)):
        gpu_suite._run_part(["pw"])
    assert heard == told


def test_parts_for_several_gpus_run_where_there_are_some(commands, tmp_path: Path) -> None:
    lines: list[str] = []
    run_parts(tmp_path / "one", 60.0, full=False, gpus=1, say=lines.append)
    assert "ranks" not in {arguments[0] for arguments in commands}
    assert "ranks-2k: left out, as it takes 2 GPUs or more, and this has 1" in lines
    run_parts(tmp_path / "two", 60.0, full=False, gpus=2, say=lines.append)
    assert commands[-1][:3] == ["ranks", "--preset", "2k"]


def test_parts_that_never_fit_are_reported_with_their_duration(commands, tmp_path: Path) -> None:
    run(tmp_path)
    missing = run(tmp_path, 9.0, full=True)
    assert missing["e2e-2k-all"].endswith("give --minutes 41")
    assert not any(command[-1].endswith("-all.json") for command in commands)


def test_missing_or_unreadable_parts_make_the_command_fail(
    commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "mine.json").write_text("no result")  # not one of ours: not read
    for part in PARTS:
        write_result(result(figure("a", 1.0)), tmp_path / f"{part.name}.json")
    arguments = ["--out", str(tmp_path)]
    assert CliRunner().invoke(command, arguments, standalone_mode=False).return_value == 0
    (tmp_path / "e2e-2k.json").write_text("{}")
    monkeypatch.setattr(gpu_suite, "_run_part", lambda command: 2)
    answer = CliRunner().invoke(command, arguments, standalone_mode=False)
    assert answer.return_value == SOME_FAILED
    assert "not there yet: e2e-2k" in answer.output
    assert answer.output.index("e2e-4k.json") < answer.output.index("not there yet")


def test_every_part_is_a_valid_command(tmp_path: Path) -> None:
    for part in PARTS:
        verb = bench.commands[part.arguments[0]]
        out = tmp_path / "r.json"
        context = verb.make_context(part.name, [*part.arguments[1:], "--out", str(out)])
        assert context.params["out"] == out


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    answer = CliRunner().invoke(command, ["--out", str(tmp_path / "r")])
    assert isinstance(answer.exception, BadRequest)
    assert "measures a GPU, and PyTorch finds none" in str(answer.exception)
