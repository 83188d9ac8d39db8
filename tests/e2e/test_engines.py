# SPDX-License-Identifier: Apache-2.0
"""`pw build`, `pw engines` and `pw generate --policy`, as far as nothing has to be compiled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pw_engines import EngineStore, Speed
from pw_export.build import Built
from pw_export.build_jobs import Job
from pw_export.build_speed import Measured
from tests.e2e.pw import Pw


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PW_CACHE", str(tmp_path / "cache"))


def test_dry_run_names_the_engines_and_makes_none(pw: Pw, bundle_dir: Path, tmp_path: Path) -> None:
    ended = pw("build", "--model", bundle_dir, "--dry-run")
    assert ended.code == 0, ended.err
    assert "aoti engines for cpu, fp32, up to 8192 tokens" in ended.err
    assert "0 built, 9 to build" in ended.err
    assert "block_out-aoti-" in ended.err
    assert not (tmp_path / "cache").exists()


def test_an_engine_that_the_measurement_removes_is_told_and_fails_the_build(
    pw: Pw, bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: it vanished, with its figures as the only word."""

    def published(jobs: list[Job], *arguments: object) -> list[Built]:
        for job in jobs:
            store = EngineStore(job.store)
            with store.locked(job.key), store.publishing(job.key, "engine.pt2") as path:
                path.write_text("engine")
        return [Built(job, 1.0) for job in jobs]

    def removed(jobs: list[Job], tokens: object) -> list[Measured]:
        speed = Speed(tokens=64, threads=1, seconds=1.0, eager=2.0, error=0.5)
        return [Measured(jobs[0], speed, error="removed: it is wrong", removed=True)]

    monkeypatch.setattr("pw_export.build.run_jobs", published)
    monkeypatch.setattr("pw_export.build_speed.measure_jobs", removed)
    ended = pw("build", "--model", bundle_dir, "--backend", "aoti")
    assert ended.code == 3, ended.err
    assert "removed: it is wrong" in ended.err
    assert "2.00x" not in ended.err


def test_tensorrt_on_a_cpu_is_refused_with_its_reason(pw: Pw, bundle_dir: Path) -> None:
    ended = pw("build", "--model", bundle_dir, "--backend", "tensorrt", "--device", "cpu")
    assert ended.code == 2
    assert "TensorRT runs on NVIDIA GPUs" in ended.err


def test_an_empty_store_is_no_error(pw: Pw, tmp_path: Path) -> None:
    for verb in ("list", "verify", "prune"):
        assert pw("engines", verb).code == 0
    assert f"0 engines in {tmp_path}/cache/engines" in pw("engines", "list").out


def test_policy_engines_without_engines_computes_nothing(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    ended = pw(
        "generate", "--model", bundle_dir, "--prompt", "a cat", "--preset", preset,
        "--out", tmp_path / "out", "--policy", "engines",
    )  # fmt: skip
    assert ended.code == 2
    assert "no engine is built" in ended.err
    assert "pw build" in ended.err
    assert "text" not in ended.err.split("error:")[0].replace("checking the files", "")
    assert list((tmp_path / "out").iterdir()) == []


def test_without_engines_it_is_said_how_to_make_them(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    ended = pw(
        "generate", "--model", bundle_dir, "--prompt", "a cat", "--preset", preset,
        "--out", tmp_path / "out", "--draft-only",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert f"pw build --model {bundle_dir}" in ended.err
    receipt = json.loads((tmp_path / "out/0.json").read_text())
    assert receipt["engines"]["draft"]["backend"] == "eager"
    assert receipt["engines"]["draft"]["reason"] == "no engine is built"
    opening = ended.err.splitlines()[0]
    assert opening.startswith("running on the CPU in fp32: ")
    assert "TensorRT" not in ended.err
    assert "--device" not in opening


def test_a_damaged_engine_is_listed_and_pruned(pw: Pw, tmp_path: Path) -> None:
    folder = tmp_path / "cache/engines/block_in-aoti-0123"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    ended = pw("engines", "verify")
    assert ended.code == 3
    assert "damaged: its manifest cannot be read" in ended.out
    ended = pw("engines", "prune")
    assert ended.code == 0
    assert "removed block_in-aoti-0123" in ended.out
    assert not folder.exists()


def test_store_that_cannot_be_made_is_one_error(
    pw: Pw, bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PW_CACHE", "/proc/nowhere")
    ended = pw("build", "--model", bundle_dir)
    assert ended.code == 2
    assert ended.err.count("cannot create the engine store") == 1
