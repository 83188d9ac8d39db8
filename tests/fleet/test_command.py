# SPDX-License-Identifier: Apache-2.0
"""`pw fleet run` has the options of `pw generate`, says what it would do, and ends as asked."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pw_runtime.cli import fleet as command
from pw_runtime.cli.generate import generate
from pw_runtime.cli.main import Terminated
from pw_runtime.errors import BadRequest
from pw_runtime.fleet import cluster
from pw_runtime.fleet.cluster import WorkerLost
from tests.e2e.pw import Ended, Pw, write_preset


@pytest.fixture
def pw(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Pw:
    return Pw(monkeypatch, capfd)


@contextmanager
def nowhere(address: str | None, *, may_start: bool = True) -> Iterator[bool]:
    """Find no cluster, and start none."""
    assert not may_start
    yield False


def dry_run(pw: Pw, bundle: Path, folder: Path, *more: object) -> Ended:
    preset = write_preset(folder / "small.toml")
    return pw(
        "fleet", "run", "--model", bundle, "--preset", preset, "--out", folder / "out",
        "--prompt", "a cat", "--prompt", "a dog", "--dry-run", "--conv", "onednn", *more,
    )  # fmt: skip


def test_every_option_of_generate_is_there_or_left_out_by_name() -> None:
    of_generate = {option.name for option in generate.params}
    of_fleet = {option.name for option in command.run.params}
    assert command.LEFT_OUT.keys() <= of_generate
    assert of_generate - of_fleet == command.LEFT_OUT.keys()
    assert len(of_fleet) == len(command.run.params)


def test_a_dry_run_shows_workers_batches_and_memory_and_makes_nothing(
    pw: Pw, bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connected", nowhere)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    more = ("--gpus-per-worker", 0, "--cpus-per-worker", 2, "--host-memory", "8GiB")
    ended = dry_run(pw, bundle_dir, tmp_path, *more)
    assert ended.code == 0, ended.err
    assert "no Ray cluster runs here" in ended.out
    assert ": 3 workers with 2 CPUs each" in ended.out
    assert "2 prompts: 0 are finished, 2 to make" in ended.out
    assert "3 workers, up to 1 prompts at a time" in ended.out
    assert "budget: 8.0 GiB of host memory" in ended.out
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_the_clips_that_would_be_skipped(
    pw: Pw, bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connected", nowhere)
    preset = write_preset(tmp_path / "small.toml")
    made = pw(
        "generate", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "out",
        "--prompt", "a cat", "--conv", "onednn",
    )  # fmt: skip
    assert made.code == 0
    ended = dry_run(pw, bundle_dir, tmp_path, "--skip-existing")
    assert "2 prompts: 1 are finished, 1 to make" in ended.out
    refused = dry_run(pw, bundle_dir, tmp_path)
    assert refused.code == 2
    assert "contains files of an earlier run" in refused.err
    receipt = json.loads((tmp_path / "out" / "0.json").read_text())
    assert receipt["options"]["device"] == "cpu"


def test_without_ray_it_says_what_to_install(
    pw: Pw, bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    ended = dry_run(pw, bundle_dir, tmp_path)
    assert ended.code == 2
    assert "`pw fleet run` needs ray" in ended.err
    assert "do this: pip install 'ray" in ended.err


def test_a_dry_run_shows_what_makes_a_clip_together(
    pw: Pw, bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connected", nowhere)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    more = ("--gpus-per-worker", 0, "--processes-per-worker", 2, "--host-memory", "8GiB")
    ended = dry_run(pw, bundle_dir, tmp_path, *more)
    assert ended.code == 0, ended.err
    assert ": 2 workers with 2 CPUs, 2 processes that make each clip together each" in ended.out
    assert "2 processes on the CPU, 8.0 GiB of host memory for all" in ended.out


def test_more_gpus_per_worker_than_any_node_has_are_one_clear_error(
    pw: Pw, bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connected", nowhere)
    ended = dry_run(pw, bundle_dir, tmp_path, "--gpus-per-worker", 32)
    assert ended.code == 2
    assert "no node of the cluster has room for a worker\n  got: " in ended.err
    assert "wanted: 32 GPUs and " in ended.err


def test_the_command_that_goes_on_keeps_what_was_asked_for_and_the_drawn_seed() -> None:
    words = ["fleet", "run", "--out", "my clips", "--seed", "-1", "--overwrite"]
    assert command._continuing(words, ["--seed", "42"]) == (
        "pw fleet run --out 'my clips' --seed -1 --seed 42 --skip-existing"
    )


@pytest.mark.parametrize(
    ("number", "second"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_the_first_signal_is_noted_and_the_second_interrupts(
    number: signal.Signals, second: type[BaseException]
) -> None:
    inherited = signal.signal(number, signal.SIG_DFL)  # ignored where tests run in the background
    try:
        with command._stop_signals() as stopped:
            assert not stopped.is_set()
            signal.raise_signal(number)
            assert (stopped.is_set(), stopped.number) == (True, number)
            with pytest.raises(second):
                signal.raise_signal(number)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, inherited)


def test_a_machine_without_this_project_is_told_apart_from_a_dead_one() -> None:
    with pytest.raises(BadRequest, match="has no pixelwizard-runtime that can be a worker"):
        raise cluster._lost(RuntimeError("died\nModuleNotFoundError: No module named 'pw_runtime'"))
    with pytest.raises(WorkerLost, match=r"^its node has died$"):
        raise cluster._lost(RuntimeError("The actor died.\n  its node has died\n"))


def test_a_cluster_that_was_killed_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert cluster.cluster_of_this_machine() is None
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        assert cluster.cluster_of_this_machine() == address
    assert cluster.cluster_of_this_machine() is None


def test_what_ray_prints_loses_its_excerpts_from_logs() -> None:
    stream = io.StringIO()
    words = cluster._FirstLines(stream)
    words.write("(raylet) A node has died. Its last lines:\n    [state-dump] 1\n\t2\n")
    words.write("\n")
    assert stream.getvalue() == "(raylet) A node has died. Its last lines:\n"
