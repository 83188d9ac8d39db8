# SPDX-License-Identifier: Apache-2.0
"""The C++ for CPUs is compiled once, found again, and named where it cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pw_kernels import cpu_library
from pw_runtime.cli.doctor import report
from pw_runtime.errors import BadRequest
from pw_runtime.job.conv_choice import implementations, settle_conv
from pw_runtime.system import cpu_kernels
from pw_runtime.system.cpu_kernels import library_file, open_cpu_kernels, status
from pw_runtime.types import RunOptions

CPU = RunOptions(device="cpu").resolved()


@pytest.fixture(autouse=True)
def _as_on_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu_library.unavailable():
        pytest.skip(str(cpu_library.unavailable()))
    monkeypatch.setattr(cpu_library, "_library", None)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compiler(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a program the C++ compiler."""
    path = folder / "our-c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return path


@pytest.mark.slow
def test_it_is_compiled_once_and_then_needs_no_compiler(cache, monkeypatch) -> None:
    lines: list[str] = []
    assert status() == "winograd, to be compiled at the first use"
    assert open_cpu_kernels(lines.append) is None
    assert [line.split()[0] for line in lines] == ["compiling", "compiled"]
    assert [path.name for path in (cache / "cpu").iterdir()] == [library_file().name]
    assert status() == f"winograd, {library_file()}"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert open_cpu_kernels(lines.append) is None
    assert len(lines) == 2
    assert cpu_library.library().path == library_file()


def test_another_source_is_another_file(tmp_path: Path, monkeypatch) -> None:
    before = cpu_library.file_name()
    for path in cpu_library.SOURCES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(cpu_library, "SOURCES", tmp_path)
    assert cpu_library.file_name() == before
    (tmp_path / "vectors.h").write_text("//")
    assert cpu_library.file_name() != before


def test_a_missing_compiler_is_named(cache, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = open_cpu_kernels(print)
    assert reason == "there is no C++ compiler no-such-compiler: install it, or set CXX"
    assert status().startswith("onednn: there is no C++ compiler no-such-compiler")


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(cache, tmp_path, monkeypatch) -> None:
    compiler(
        tmp_path, "echo warning: old >&2; echo fatal error: no -mavx2 >&2; exit 1", monkeypatch
    )
    reason = open_cpu_kernels(lambda line: None)
    assert reason is not None
    assert reason.endswith("failed: fatal error: no -mavx2")
    assert list((cache / "cpu").iterdir()) == []


def test_a_compiler_that_writes_nothing_failed(cache, tmp_path, monkeypatch) -> None:
    compiler(tmp_path, "exit 0", monkeypatch)
    assert "failed: exit code 0" in str(open_cpu_kernels(lambda line: None))


def test_a_compiler_that_is_no_program_is_named(cache, tmp_path, monkeypatch) -> None:
    compiler(tmp_path, "", monkeypatch).write_bytes(b"\x7fELF nothing")
    assert "does not run" in str(open_cpu_kernels(lambda line: None))


def test_a_damaged_library_is_named(cache, monkeypatch) -> None:
    path = library_file()
    path.parent.mkdir(parents=True, mode=0o700)
    cache.chmod(0o700)
    path.write_bytes(b"not machine code")
    assert "cannot be loaded" in str(open_cpu_kernels(print))
    assert "remove it" in str(open_cpu_kernels(print))


def test_a_folder_that_others_can_write_to_is_not_trusted(cache) -> None:
    path = library_file()
    path.parent.mkdir(parents=True)
    path.parent.chmod(0o777)
    assert "only you can write to" in str(open_cpu_kernels(print))


def test_a_cache_that_is_a_file_is_named(cache) -> None:
    cache.write_text("")
    assert "cannot create the cache folder" in str(open_cpu_kernels(print))


@pytest.mark.parametrize("capability", ["DEFAULT", "NO AVX"])
def test_a_cpu_without_avx2_keeps_to_onednn(capability: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    lines: list[str] = []
    assert settle_conv(CPU, lines.append).conv == "onednn"
    assert lines == [
        "convolutions run on oneDNN, without our C++: "
        f"it needs AVX2 or AVX-512, PyTorch uses {capability}"
    ]


def test_auto_names_what_will_run(monkeypatch) -> None:
    monkeypatch.setattr("pw_runtime.job.conv_choice.open_cpu_kernels", lambda say: None)
    settled = settle_conv(CPU, print)
    assert settled.conv == "winograd"
    assert implementations(settled) == {
        "attention": "reference",
        "causal_conv3d": "cpu",
        "channel_norm": "cpu",
    }
    reference = settle_conv(RunOptions(device="cpu", conv="onednn").resolved(), print)
    assert implementations(reference) == {"attention": "reference"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (RunOptions(device="cpu", conv="winograd", vae_precision="bf16"), "it computes in fp32"),
        (RunOptions(device="cuda", conv="winograd"), "is for the decoder on a CPU"),
        (RunOptions(device="cuda", conv="onednn"), "is for the decoder on a CPU"),
    ],
)
def test_what_cannot_run_is_refused(options: RunOptions, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        settle_conv(options, print)


def test_auto_leaves_a_gpu_and_bf16_alone() -> None:
    on_gpu = RunOptions(device="cuda")
    assert settle_conv(on_gpu, print) == on_gpu
    assert settle_conv(RunOptions(device="cpu", vae_precision="bf16"), print).conv == "onednn"


def test_winograd_asked_for_and_not_there_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr("pw_runtime.job.conv_choice.open_cpu_kernels", lambda say: "no compiler")
    with pytest.raises(BadRequest, match=r"(?s)cannot run here.*no compiler.*--conv onednn"):
        settle_conv(RunOptions(device="cpu", conv="winograd"), print)


def test_doctor_says_which_convolutions_run() -> None:
    assert f"conv       {cpu_kernels.status()}" in report().splitlines()
