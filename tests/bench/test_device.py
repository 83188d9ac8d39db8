# SPDX-License-Identifier: Apache-2.0
"""What concerns the GPU machine, as far as one without a GPU can tell."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from pw_bench import gpu_suite
from pw_bench.gpu_suite import PARTS, main, run_parts
from pw_bench.measure.memory_sampler import Watch, between
from pw_bench.measure.nvml import Nvml
from pw_bench.results import Skipped, read_result, write_result
from pw_runtime.cli.options import SOME_FAILED
from tests.bench.results_made import figure, result

FINISHED = result()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of every `pw bench` that was run; each writes its file."""
    calls: list[list[str]] = []

    def run(command: list[str], check: bool) -> SimpleNamespace:
        arguments = command[command.index("bench") + 1 :]
        calls.append(arguments)
        write_result(FINISHED, Path(arguments[-1]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(gpu_suite, "commit", lambda: FINISHED.identity.commit)
    return calls


def test_parts_whose_file_is_there_are_not_run_again(ran, tmp_path: Path) -> None:
    write_result(FINISHED, tmp_path / "e2e-2k.json")
    assert run_parts(tmp_path, 60.0, full=False) == {}
    assert not any(arguments[0] == "e2e" for arguments in ran)
    count = len(ran)
    assert count == sum(not part.long for part in PARTS) - 1
    assert run_parts(tmp_path, 60.0, full=False) == {}
    assert len(ran) == count


@pytest.mark.parametrize(
    "left",
    [
        replace(FINISHED, identity=replace(FINISHED.identity, commit="another")),
        replace(FINISHED, skipped=(Skipped(part="the remaining rounds", reason="interrupted"),)),
        None,
    ],
)
def test_files_of_other_sources_or_of_half_a_part_are_made_again(ran, tmp_path, left) -> None:
    file = tmp_path / "e2e-2k.json"
    write_result(left, file) if left else file.write_text("{}")
    assert run_parts(tmp_path, 60.0, full=False) == {}
    assert sorted({arguments[0] for arguments in ran} - {"stages"}) == ["e2e", "kernels"]
    assert read_result(file) == FINISHED


def test_a_part_is_not_begun_without_the_time_for_it(ran, tmp_path: Path) -> None:
    missing = run_parts(tmp_path, 1.1, full=False)
    assert missing["e2e-2k"].endswith("s expected: give --minutes 5")
    assert [arguments[0] for arguments in ran] == ["kernels"]  # of the draft


def test_a_part_that_fails_is_told_and_the_others_run(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=2))
    missing = run_parts(tmp_path, 60.0, full=False)
    assert all("exit code 2" in reason for reason in missing.values())
    assert len(missing) == sum(not part.long for part in PARTS)


def test_parts_that_never_fit_in_are_told_how_long_they_take(ran, tmp_path: Path) -> None:
    run_parts(tmp_path, 60.0, full=False)
    missing = run_parts(tmp_path, 9.0, full=True)
    assert missing["e2e-2k-all"].endswith("give --minutes 41")
    assert not any(command[-1].endswith("-all.json") for command in ran)


def test_what_is_missing_or_cannot_be_read_makes_the_command_fail(
    ran, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_suite.torch.cuda, "is_available", lambda: True)
    (tmp_path / "mine.json").write_text("no result")  # not one of ours: not read
    for part in PARTS:
        write_result(result(figure("a", 1.0)), tmp_path / f"{part.name}.json")
    assert CliRunner().invoke(main, ["--out", str(tmp_path)]).exit_code == 0
    (tmp_path / "e2e-2k.json").write_text("{}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=2))
    answer = CliRunner().invoke(main, ["--out", str(tmp_path)])
    assert answer.exit_code == SOME_FAILED
    assert "not there yet: e2e-2k" in answer.output
    assert answer.output.index("e2e-4k.json") < answer.output.index("not there yet")


def test_every_part_is_a_command_that_can_be_parsed(tmp_path: Path) -> None:
    from pw_bench.cli import bench

    for part in PARTS:
        verb = bench.commands[part.arguments[0]]
        out = tmp_path / "r.json"
        context = verb.make_context(part.name, [*part.arguments[1:], "--out", str(out)])
        assert context.params["out"] == out


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_suite.torch.cuda, "is_available", lambda: False)
    answer = CliRunner().invoke(main, ["--out", str(tmp_path / "r")])
    assert answer.exit_code != 0
    assert "no CUDA GPU" in answer.output


def test_nvml_that_is_missing_or_denied_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    missing = Nvml()
    assert "not installed" in missing.reason
    assert missing.state() is missing.joules() is missing.memory_of(1) is None

    class NVMLError(Exception):
        pass

    def deny() -> None:
        raise NVMLError("Insufficient Permissions")

    denied = SimpleNamespace(NVMLError=NVMLError, nvmlInit=deny)
    monkeypatch.setitem(sys.modules, "pynvml", denied)
    assert Nvml().reason == "NVML says: Insufficient Permissions"


def test_a_single_answer_that_is_denied_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def deny(*arguments: object) -> None:
        raise NVMLError("Not Supported")

    fake = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: "gpu",
        nvmlDeviceGetPowerUsage=lambda gpu: 350_000,
        nvmlDeviceGetEnforcedPowerLimit=deny,
        nvmlDeviceGetClockInfo=lambda gpu, clock: 1000 * clock,
        nvmlDeviceGetTemperature=lambda gpu, sensor: 50,
        nvmlDeviceGetTotalEnergyConsumption=lambda gpu: 5_000,
        nvmlDeviceGetComputeRunningProcesses=lambda gpu: [
            SimpleNamespace(pid=7, usedGpuMemory=123)
        ],
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=456),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = Nvml()
    state = nvml.state()
    assert state is not None
    assert (state.power_w, state.power_limit_w, state.memory_clock_mhz) == (350.0, None, 2000)
    assert nvml.joules() == 5.0
    assert nvml.reason == "NVML says: Not Supported"


def processes(monkeypatch: pytest.MonkeyPatch, *pids: int) -> list[object]:
    """A driver that tells of these processes; which GPUs are asked for."""
    asked: list[object] = []
    fake = SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=asked.append,
        nvmlDeviceGetHandleByUUID=asked.append,
        nvmlDeviceGetComputeRunningProcesses=lambda gpu: [
            SimpleNamespace(pid=pid, usedGpuMemory=123) for pid in pids
        ],
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=456),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return asked


def test_a_process_that_holds_nothing_yet_is_not_given_the_memory_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processes(monkeypatch, os.getpid(), 7)
    nvml = Nvml()
    nvml._handle = "gpu"
    assert (nvml.memory_of(7), nvml.memory_of(8)) == (123, None)
    assert nvml.reason == ""


def test_memory_of_all_processes_is_said_to_be_that(monkeypatch: pytest.MonkeyPatch) -> None:
    processes(monkeypatch, 7)  # numbers of the host, in a container
    nvml = Nvml()
    nvml._handle = "gpu"
    assert nvml.memory_of(8) == 456
    assert "all processes" in nvml.reason


def test_nvml_is_asked_about_the_gpu_that_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = processes(monkeypatch)
    Nvml(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-ab")
    Nvml(0)
    Nvml(1)
    assert asked == [1, 3, "GPU-ab"]


def test_a_process_is_watched_until_the_end_of_the_block() -> None:
    with Watch(os.getpid(), None) as watch:
        held = bytearray(64 * 2**20)
    assert watch.host
    assert watch.pss
    assert watch.device == []
    assert max(size for _, size in watch.host) > len(held)


def test_samples_of_a_time_begin_at_zero() -> None:
    samples = [(1.0, 5), (2.0, 6), (3.0, 7)]
    assert between(samples, 1.5, 3.0) == ((0.5, 6), (1.5, 7))


def test_a_process_that_is_gone_gives_no_samples() -> None:
    with Watch(2**22 + 1, None) as watch:
        pass
    assert (watch.host, watch.pss) == ([], [])
