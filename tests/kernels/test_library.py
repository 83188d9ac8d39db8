# SPDX-License-Identifier: Apache-2.0
"""The library of compiled kernels: built here for one architecture, opened, never launched."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pw_kernels import launcher, library
from pw_kernels.launcher import recording
from pw_kernels.library import ENVIRONMENT, Library, letter, source_digest
from pw_kernels.variant import Kernel, Variant

ROOT = Path(__file__).parents[2]
KERNELS = ("attention_hopper", "norm_modulate")  # one with scratch memory, one without


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder with libpw_kernels.so and the tests of its loader."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("build")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"  # pip's cmake
    options = ("-DPW_ARCHS=90", f"-DPW_KERNELS={';'.join(KERNELS)}", "-DPW_TESTS=ON")
    for command in (
        ("cmake", "-S", ROOT, "-B", folder, f"-DPython3_EXECUTABLE={sys.executable}", *options),
        ("cmake", "--build", folder),
    ):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.fixture(scope="session")
def built(build: Path) -> Library:
    return Library(build / "libpw_kernels.so")


@pytest.mark.slow
def test_loader_against_a_fake_driver(build: Path) -> None:
    done = subprocess.run(
        ["ctest", "--output-on-failure"], cwd=build, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "100% tests passed" in done.stdout


@pytest.mark.slow
def test_manifest_and_table_tell_the_same(built: Library) -> None:
    listed = {(one["key"], one["arch"]): one for one in built.manifest["kernels"]}
    assert listed.keys() == built.kernels.keys()
    assert {one["kernel"] for one in listed.values()} == set(KERNELS)
    for place, kernel in built.kernels.items():
        for name in ("registers", "stack_bytes", "shared_bytes", "scratch_bytes"):
            assert getattr(kernel, name) == listed[place][name]
        assert kernel.num_warps == listed[place]["warps"]
        assert kernel.stack_bytes == 0
        assert kernel.key in built.table()


@pytest.mark.slow
def test_finds_what_a_call_would_launch(built: Library) -> None:
    from pw_kernels.attention import run_kernel

    q = torch.empty(111_600, 24, 128, dtype=torch.bfloat16, device="meta")
    with recording((9, 0)) as variants:
        run_kernel(q, q, q, None, False)
    (variant,) = variants.values()
    found = built.find(variant, (9, 0))
    assert found is not None
    assert found.num_warps == 12  # as compiled, not the 4 asked for
    assert found.parameters == "".join(letter(kind) for _, kind in variant.types)
    assert found.scratch_bytes > 0
    assert built.find(variant, (8, 0)) is None
    assert built.find(variant, (7, 5)) is None


@pytest.mark.slow
def test_a_machine_without_a_driver_is_told(built: Library) -> None:
    if (reason := built.driver()) is None:
        pytest.skip("this machine has a CUDA driver")
    assert "no usable CUDA driver" in reason
    variant = next(iter(built.kernels.values()))
    message = ctypes.create_string_buffer(256)
    failed = built._c.pw_kernels_load(variant.index, message, ctypes.c_size_t(256))
    assert failed == 1
    assert b"no usable CUDA driver" in message.value


@pytest.mark.slow
def test_other_sources_make_it_stale(built: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "source_digest", lambda: "0" * 64)
    with pytest.raises(ValueError, match=r"was made from other kernel sources: build it again"):
        Library(built.path)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As in a new process: no library looked for yet."""
    for cached in (library.library, library._find):
        cached.cache_clear()
        monkeypatch.setattr(library, cached.__name__, cached)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    return monkeypatch


@pytest.fixture(autouse=True)
def _forget() -> None:
    library.library.cache_clear()
    library._find.cache_clear()


@pytest.mark.slow
def test_named_library_is_used(built: Library, fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv(ENVIRONMENT, str(built.path))
    found = library.library()
    assert found is not None
    assert found.path == built.path
    assert library.status().startswith(f"compiled library {built.path}: ")


def test_without_a_library_triton_compiles_and_it_is_said(fresh: pytest.MonkeyPatch) -> None:
    if library._find() != "no compiled library in this installation":
        pytest.skip("this installation has a compiled library")
    assert library.library() is None
    assert library.status().startswith("compiled by Triton when first launched: no compiled lib")


def test_named_library_that_is_none_is_an_error(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "libpw_kernels.so"
    path.write_text("no library")
    fresh.setenv(ENVIRONMENT, str(path))
    with pytest.raises(RuntimeError, match=f"{ENVIRONMENT} names an unusable library"):
        library.library()


def test_digest_follows_the_bodies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "pw_kernels"
    shutil.copytree(Path(library.__file__).parent / "_triton", copy / "_triton")
    before = source_digest()
    monkeypatch.setattr(library, "__file__", str(copy / "library.py"))
    assert source_digest() == before
    (copy / "_triton/norm_modulate.py").write_text("changed")
    assert source_digest() != before


def test_variant_of_a_call() -> None:
    """Types as Triton specialises them: alignment, ones, 64 bits; do_not_specialize stays plain."""
    x = torch.zeros(64, dtype=torch.bfloat16)
    arguments = {"x": x[1:], "y": x, "one": 1, "n": 48, "big": 2**31, "s": 5, "count": 16, "f": 0.5}
    with recording((9, 0)) as variants:
        launcher.launch(Kernel("any", frozenset({"count"})), (1,), arguments, {"D": 4}, num_warps=2)
    assert [*variants] == [
        "any(*bf16,*bf16:16,1,i32:16,i64:16,i32,i32,fp32)[D=4]w2s3",
    ]
    (variant,) = variants.values()
    assert isinstance(variant, Variant)
    values, letters = library._packed(variant, arguments)
    assert letters == "ppiliif"
    assert [value.value for value in values] == [
        x[1:].data_ptr(),
        x.data_ptr(),
        48,
        2**31,
        5,
        16,
        0.5,
    ]


def test_recording_launches_nothing_and_does_not_nest() -> None:
    with recording((8, 0)):
        assert launcher.capability(torch.device("meta")) == (8, 0)
        with pytest.raises(AssertionError, match="recording inside recording"), recording((9, 0)):
            pass


@pytest.mark.slow
def test_compiling_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for options, message in (
        (("--arch", "75"), "--arch wants numbers among [80, 89, 90, 100, 120], got [75]"),
        (("--kernel", "nothing"), "the networks launch no kernel nothing"),
    ):
        command = [sys.executable, "-m", "pw_export.kernel_library", "--out", tmp_path, *options]
        env["PYTHONPATH"] = ":".join(str(ROOT / at) for at in (".", "kernels", "export", "engines"))
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert message in done.stderr
    assert json.dumps([*tmp_path.iterdir()]) == "[]"
