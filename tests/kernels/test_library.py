# SPDX-License-Identifier: Apache-2.0
"""The library of compiled kernels: built here for one architecture, opened, never launched."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pw_export import kernel_library
from pw_kernels import launcher, library
from pw_kernels.launcher import recording
from pw_kernels.library import ENVIRONMENT, Library, letter, source_digest
from pw_kernels.variant import Kernel, Variant
from tests.kernels.compiling import ROOT, shared_folder

KERNELS = ("attention_hopper", "norm_modulate")  # one with scratch memory, one without


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder with libpw_kernels.so and the tests of its loader."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"  # pip's cmake
    options = ("-DPW_ARCHS=90", f"-DPW_KERNELS={';'.join(KERNELS)}", "-DPW_TESTS=ON")
    with shared_folder(tmp_path_factory, "library") as (folder, is_new):
        commands = (
            ("cmake", "-S", ROOT, "-B", folder, f"-DPython3_EXECUTABLE={sys.executable}", *options),
            ("cmake", "--build", folder),
        )
        for command in commands if is_new else ():
            process = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    return folder


@pytest.fixture(scope="session")
def built(build: Path) -> Library:
    return Library(build / "libpw_kernels.so")


@pytest.mark.slow
def test_loader_against_a_fake_driver(build: Path) -> None:
    process = subprocess.run(
        ["ctest", "--output-on-failure"], cwd=build, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout
    assert "100% tests passed" in process.stdout


@pytest.mark.slow
def test_manifest_and_table_agree(built: Library) -> None:
    entries = {(entry["key"], entry["arch"]): entry for entry in built.manifest["kernels"]}
    assert entries.keys() == built.kernels.keys()
    assert {entry["kernel"] for entry in entries.values()} == set(KERNELS)
    for place, kernel in built.kernels.items():
        for name in ("registers", "stack_bytes", "shared_bytes", "scratch_bytes"):
            assert getattr(kernel, name) == entries[place][name]
        assert kernel.num_warps == entries[place]["warps"]
        assert kernel.stack_bytes == 0
        assert kernel.key in built.table()


@pytest.mark.slow
def test_table_says_what_assembled_the_code_and_which_driver_it_needs(built: Library) -> None:
    tools = built.manifest["toolchains"]["90"]
    assert tools["driver"] == {"12": 525, "13": 580}[tools["cuda"].partition(".")[0]]
    assert built.table().startswith(
        f"sm_90   CUDA {tools['cuda']} (PTX {tools['ptx']}, ELF ABI {tools['elf_abi']}) and needs "
        f"driver {tools['driver']} or newer\n"
    )


@pytest.mark.slow
def test_finds_what_a_call_would_launch(built: Library) -> None:
    from pw_kernels.attention import run_kernel

    q = torch.empty(111_600, 24, 128, dtype=torch.bfloat16, device="meta")
    with recording((9, 0)) as variants:
        run_kernel(q, q, q, None, False)
    (variant,) = variants.values()
    kernel = built.find(variant, (9, 0))
    assert kernel is not None
    assert kernel.num_warps == 12  # as compiled, not the 4 requested
    assert kernel.parameters == "".join(letter(type_name) for _, type_name in variant.types)
    assert kernel.scratch_bytes > 0
    assert built.find(variant, (8, 0)) is None
    assert built.find(variant, (7, 5)) is None


@pytest.mark.slow
def test_a_missing_driver_is_reported(built: Library) -> None:
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
    with pytest.raises(ValueError, match=r"was built from other kernel sources: rebuild it"):
        Library(built.path)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Forget the library that was found, as in a new process."""
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
    opened = library.library()
    assert opened is not None
    assert opened.path == built.path
    assert library.status().startswith(f"compiled library {built.path}: ")


def test_without_a_library_status_says_that_triton_compiles(fresh: pytest.MonkeyPatch) -> None:
    if library._find() != "no compiled library in this installation":
        pytest.skip("this installation has a compiled library")
    assert library.library() is None
    assert library.status().startswith("compiled by Triton at the first launch: no compiled lib")


def test_a_named_file_that_is_no_library_is_refused(
    fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "libpw_kernels.so"
    path.write_text("no library")
    fresh.setenv(ENVIRONMENT, str(path))
    with pytest.raises(RuntimeError, match=f"{ENVIRONMENT} names an unusable library"):
        library.library()


def test_digest_covers_bodies_and_compile_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "pw_kernels"
    shutil.copytree(Path(library.__file__).parent / "_triton", copy / "_triton")
    before = source_digest()
    monkeypatch.setattr(library, "__file__", str(copy / "library.py"))
    assert source_digest() == before
    with monkeypatch.context() as patch:
        patch.setattr(library, "COMPILE_OPTIONS", {"enable_fp_fusion": False})
        assert source_digest() != before
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--arch", "75"),
            "--arch expects numbers among [80, 89, 90, 100, 103, 110, 120, 121], got [75]",
        ),
        (("--arch", "89", "--kernel", "nothing"), "the networks launch no kernel nothing"),
    ],
)
def test_compiling_refuses_what_it_does_not_know(
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = Variant("gate_residual", (), (), 4, 3)
    monkeypatch.setattr(kernel_library, "variants_for", lambda gpu: {known.key: known})
    with pytest.raises(SystemExit) as ended:
        kernel_library.main(["--out", str(tmp_path / "out"), *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
