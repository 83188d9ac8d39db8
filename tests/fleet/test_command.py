# SPDX-License-Identifier: Apache-2.0
"""`pw fleet run` has the options of `pw generate`, says what it would do, and ends as asked."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
from PIL import Image

from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.cli import fleet as command
from pw_runtime.cli.fast import fast_options
from pw_runtime.cli.generate import generate
from pw_runtime.cli.main import Terminated
from pw_runtime.errors import BadRequest
from pw_runtime.fleet import cluster
from pw_runtime.fleet.cluster import WorkerLost
from pw_runtime.fleet.run import finished_clips
from pw_runtime.job.sources import located
from pw_runtime.presets import PRESETS, find_preset
from pw_runtime.types import Prompt, Request, RunOptions
from tests.e2e.pw import Ended, Pw, write_preset
from tests.inputs.videos import corners, shades, write_video

# Two signals to a process of its own, which prints what became of them.
TWO_SIGNALS = """
import signal, sys
from pw_runtime.cli import fleet
number = int(sys.argv[1])
outer = lambda number, frame: None
signal.signal(number, outer)
try:
    with fleet._stop_signals() as stopped:
        print(stopped.is_set())
        signal.raise_signal(number)
        print(stopped.is_set(), stopped.number)
        signal.raise_signal(number)
except BaseException as error:
    print(type(error).__name__)
print(signal.getsignal(number) is outer)
"""


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


def test_a_dry_run_plans_what_prompts_with_a_video_compute(
    pw: Pw, bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connected", nowhere)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    video = write_video(tmp_path / "walk.mp4", [corners(96, 64)] * 16, 24)
    more = ("--gpus-per-worker", 0, "--host-memory", "8GiB", "--draft-video", video)
    ended = dry_run(pw, bundle_dir, tmp_path, *more)
    assert ended.code == 0, ended.err
    stages = {line.split()[0] for line in ended.out.splitlines() if line}
    assert "encode" in stages
    assert "draft" not in stages


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
    ended = dry_run(pw, bundle_dir, tmp_path)
    assert "2 prompts: 1 are finished, 1 to make" in ended.out
    refused = dry_run(pw, bundle_dir, tmp_path, "--seed", 7)
    assert refused.code == 2
    assert "seeds.base is 0, wanted 7" in refused.err
    receipt = json.loads((tmp_path / "out" / "0.json").read_text())
    assert receipt["options"]["device"] == "cpu"


def test_a_clip_of_a_gpu_is_finished_whatever_kernels_were_settled_there(
    pw: Pw, bundle_dir: Path, tmp_path: Path
) -> None:
    """Seen: a fleet of GPUs could not go on, because "auto" was settled as on a CPU."""
    preset = write_preset(tmp_path / "small.toml")
    words = ["generate", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "out"]
    assert pw(*words, "--prompt", "a cat", "--conv", "onednn").code == 0
    file = tmp_path / "out" / "0.json"
    receipt = json.loads(file.read_text())
    receipt["options"] |= {"device": "cuda:0", "kernels": "triton", "attention": "gluon"}
    file.write_text(json.dumps(receipt))
    options = RunOptions(device="cuda", precision="fp32", conv="onednn")
    request = Request(
        prompts=(Prompt("a cat"),),
        preset=find_preset(str(preset)),
        out=tmp_path / "out",
        options=options,
    )
    bundle = open_bundle(bundle_dir)
    assert finished_clips(request, bundle) == {"0": tmp_path / "out" / "0.mp4"}
    named = replace(request, options=replace(options, kernels="reference"))
    with pytest.raises(BadRequest, match=r'kernels is "triton", wanted "reference"'):
        finished_clips(named, bundle)


def test_pictures_and_videos_are_found_from_everywhere_and_looked_at_before_any_works(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("start.png")
    Image.new("RGB", (64, 48)).save(path)
    prompts = located((Prompt("a cat", image=path), Prompt("a dog", id="1", position=2)))
    assert [prompt.image for prompt in prompts] == [tmp_path / path, None]
    preset = find_preset(str(write_preset(tmp_path / "small.toml")))
    options = RunOptions(device="cpu", conv="onednn")
    request = Request(prompts=prompts, preset=preset, out=tmp_path / "out", options=options)
    assert finished_clips(request, open_bundle(bundle_dir)) == {}
    path.write_bytes(b"no picture")
    with pytest.raises(BadRequest, match=r"start\.png cannot be used"):
        finished_clips(request, open_bundle(bundle_dir))
    video = write_video(tmp_path / "draft.mp4", shades(3), 24)
    request = replace(request, prompts=located((Prompt("a cat", draft_video=video),)))
    with pytest.raises(BadRequest, match=r"draft\.mp4 is shorter than the clip"):
        finished_clips(request, open_bundle(bundle_dir))


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


def test_what_processes_cannot_share_is_refused_before_any_starts(
    pw: Pw, bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connected", nowhere)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    more = ("--gpus-per-worker", 0, "--processes-per-worker", 2, "--blocks", "whole")
    ended = dry_run(pw, bundle_dir, tmp_path, *more)
    assert ended.code == 2
    assert "where it is not divided" in ended.err


@pytest.mark.parametrize("workers_of", ["gpus_per_worker", "processes_per_worker"])
def test_fast_reuses_no_pass_where_several_make_a_clip(workers_of: str) -> None:
    with click.Context(command.run):
        options = {"draft_only": False, workers_of: 4}
        chosen = fast_options(options, PRESETS["2k"], torch.device("cuda"))
        alone = fast_options(options | {workers_of: 1}, PRESETS["2k"], torch.device("cuda"))
    assert "guidance_reuse" in alone
    assert "guidance_reuse" not in chosen


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
        "pw fleet run --out 'my clips' --seed -1 --overwrite --seed 42"
    )


@pytest.mark.parametrize(
    ("number", "second"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_the_first_signal_is_noted_and_the_second_interrupts(
    number: signal.Signals, second: type[BaseException]
) -> None:
    words = [sys.executable, "-c", TWO_SIGNALS, str(int(number))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ended = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.split() == ["False", "True", str(int(number)), second.__name__, "True"]


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
