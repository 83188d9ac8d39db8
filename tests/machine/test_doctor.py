# SPDX-License-Identifier: Apache-2.0
"""The doctor tells the truth, most of all where much is missing."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch

from pw_runtime.cli import doctor
from pw_runtime.cli.doctor import doctor_report
from pw_runtime.job.receipt import versions
from pw_runtime.system import packages
from pw_runtime.system.machine import Gpu, Machine, cpp_compiler, describe
from pw_runtime.system.packages import KNOWN, Package, declared, inspect_package

ROOT = Path(__file__).parents[2]
REPORT = "from pw_runtime.cli.doctor import report; print(report())"
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top != "pw_runtime":
            kind = OSError if top == "torch" else ImportError
            raise kind(f"{top} is blocked\\nlibcudart.so.13: cannot open")

sys.meta_path.insert(0, Block())
"""


def report_of(*arguments: str) -> str:
    """Run Python in the checkout's folder and return what it prints."""
    run = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture
def whole() -> Machine:
    """A machine that has every package and two GPUs."""
    return Machine(
        python="3.12.1",
        os="Linux",
        cpu="a fast one",
        cores=16,
        memory_bytes=128 * 2**30,
        packages=tuple(Package(name=name, version="1.2.3") for name in KNOWN),
        gpus=(Gpu(name="NVIDIA H200", memory_bytes=139 * 2**30, capability="9.0"),) * 2,
        driver="580.65",
    )


def without(whole: Machine, *names: str) -> Machine:
    packages = tuple(replace(p, version=None) if p.name in names else p for p in whole.packages)
    return replace(whole, packages=packages)


def test_report_without_any_package_says_what_is_disabled() -> None:
    """-S leaves out site-packages: a Python with nothing installed."""
    report = report_of("-S", "-c", REPORT)
    lines = [line.split() for line in report.splitlines()]
    states = [words[:2] for words in lines if words and words[0] in ("ok", "missing", "broken")]
    assert states == [["missing", name] for name in KNOWN]
    assert report.count("disables ") == len(KNOWN)
    assert "fix       pip install 'onnx>=1.18' 'onnxscript>=0.5'\n" in report
    assert report.splitlines()[-1].startswith("pw generate: not ready: torch is missing, numpy is")


def test_packages_that_fail_to_import_are_broken_with_the_reason() -> None:
    report = report_of("-c", BLOCK + REPORT)
    assert "why       OSError: torch is blocked libcudart.so.13: cannot open" in report
    assert "pip install --force-reinstall 'torch" in report
    assert report.splitlines()[-1].startswith("pw generate: not ready: torch is broken")


def test_describe_sees_this_machine() -> None:
    seen = describe()
    found = {package.name: package.version for package in seen.packages}
    assert found["torch"] == torch.__version__
    assert found["pillow"] == importlib.metadata.version("pillow")
    assert seen.python == ".".join(map(str, sys.version_info[:3]))
    assert seen.cores >= 1
    assert seen.memory_bytes is None or seen.memory_bytes > 2**28
    assert "pw generate: ready on " in doctor_report(seen)


def test_whole_machine_is_ready_on_its_gpu(whole: Machine) -> None:
    report = doctor_report(whole)
    assert report.count("NVIDIA H200, 139.0 GiB, sm 9.0") == 2
    assert "disables" not in report
    assert report.splitlines()[-1] == "pw generate: ready on cuda (NVIDIA H200)"


def test_without_a_gpu_it_is_ready_on_cpu(whole: Machine) -> None:
    report = doctor_report(replace(whole, gpus=(), driver=None, memory_bytes=None))
    assert "gpu        none that torch can use" in report
    assert "memory     unknown" in report
    assert report.splitlines()[-1] == "pw generate: ready on cpu"


def test_missing_extras_do_not_stop_generate(whole: Machine) -> None:
    report = doctor_report(without(whole, "triton", "tensorrt", "flash-attn"))
    assert "pip install --no-build-isolation 'flash-attn'" in report
    assert report.splitlines()[-1] == "pw generate: ready on cuda (NVIDIA H200)"


def test_missing_base_package_is_named_in_the_verdict(whole: Machine) -> None:
    report = doctor_report(without(whole, "torch"))
    assert report.splitlines()[-1] == "pw generate: not ready: torch is missing"
    assert "disables  everything but `pw doctor`" in report


def test_pip_is_asked_for_what_this_project_declares(
    whole: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = ["torch<2.14,>=2.11", 'triton>=3.6; extra == "cuda"', "av>=14"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: declared)
    report = doctor_report(without(whole, "torch", "triton", "onnx"))
    assert "pip install 'torch<2.14,>=2.11'" in report
    assert "pip install 'triton>=3.6'" in report
    assert "pip install 'onnx'" in report


def test_torch_is_named_with_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata of the CUDA wheel on PyPI says "2.14.1" where torch says "2.14.1+cu130"."""
    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.14.1")
    torch_package = inspect_package("torch")
    assert (torch_package.name, torch_package.version) == ("torch", "2.14.1+cu130")
    assert versions()["torch"] == "2.14.1+cu130"


@pytest.mark.parametrize(
    ("version", "outside"),
    [
        ("2.13.0+cpu", False),
        ("2.11.0", False),
        ("2.10.1", True),
        ("2.14.0", True),
        ("2.14.0a0+git1234", True),
        ("2.9.1+cu130", True),
        ("3.0", True),
    ],
)
def test_versions_outside_the_declared_range_are_warned_of(
    whole: Machine, monkeypatch: pytest.MonkeyPatch, version: str, outside: bool
) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["torch<2.14,>=2.11", "av>=14"])
    torch_package, *others = (
        replace(p, version=version if p.name == "torch" else "14.0.0") for p in whole.packages
    )
    report = doctor_report(replace(whole, packages=(torch_package, *others)))
    warnings = [line.strip() for line in report.splitlines() if "outside" in line]
    warning = f"warning   {version} is outside the supported range torch<2.14,>=2.11"
    assert warnings == ([warning] if outside else [])
    assert report.splitlines()[-1] == "pw generate: ready on cuda (NVIDIA H200)"


def test_every_declared_range_is_one_that_the_doctor_understands() -> None:
    lines = importlib.metadata.requires(packages.DISTRIBUTION)
    assert lines
    for requirement in (line.partition(";")[0] for line in lines):
        if requirement.startswith(packages.DISTRIBUTION):
            continue  # an extra that has the packages of another one
        assert re.fullmatch(r"[\w.-]+((>=|<)[\d.]+,?)*\s*", requirement), requirement


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the project declare these lines; the list may be changed."""
    lines = [
        "torch<2.14,>=2.11",
        'onnx>=1.18; extra == "onnx"',
        'onnxscript>=0.5; extra == "onnx"',
        'pixelwizard-runtime[onnx]; extra == "tensorrt"',
        'tensorrt<12,>=10.8; extra == "tensorrt"',
        "triton>=3.6; sys_platform == 'linux' and extra == 'dev'",
        'pixelwizard-runtime[onnx]; extra == "dev"',
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: lines)
    return lines


def test_extras_come_from_the_metadata_and_have_the_packages_of_those_they_name(
    metadata: list[str],
) -> None:
    onnx = {"onnx": "onnx>=1.18", "onnxscript": "onnxscript>=0.5"}
    assert declared() == {
        "": {"torch": "torch<2.14,>=2.11"},
        "onnx": onnx,
        "tensorrt": {"tensorrt": "tensorrt<12,>=10.8"} | onnx,
        "dev": {"triton": "triton>=3.6"} | onnx,
    }


def test_a_package_of_an_extra_that_nobody_described_is_reported(
    metadata: list[str], whole: Machine
) -> None:
    metadata.append('new-thing>=3; extra == "novel"')
    package = Package(name="new-thing", version=None)
    report = doctor_report(replace(whole, packages=(*whole.packages, package)))
    assert "missing  new-thing       -                [novel]" in report
    assert "fix       pip install 'new-thing>=3'" in report


def test_an_onnx_file_takes_two_small_packages_and_no_tensorrt(
    metadata: list[str], whole: Machine
) -> None:
    report = doctor_report(without(whole, "onnx", "onnxscript", "tensorrt"))
    assert report.count("fix       pip install 'onnx>=1.18' 'onnxscript>=0.5'\n") == 2


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the project not be installed: its pyproject.toml is what the next one will declare."""

    def not_installed(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", not_installed)


@pytest.mark.usefixtures("checkout")
def test_every_declared_package_for_users_has_its_module_and_purpose() -> None:
    groups = declared()
    names = {name for group in groups if group != packages.DEVELOPMENT for name in groups[group]}
    assert names <= KNOWN.keys()
    assert set(packages.UNDECLARED) <= KNOWN.keys()


@pytest.mark.usefixtures("checkout")
def test_a_checkout_that_is_not_installed_declares_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = declared()
    assert groups.keys() == {"", *project["optional-dependencies"]}
    assert groups["onnx"].keys() == {"onnx", "onnxscript"}
    assert groups["onnx"].keys() < groups["tensorrt"].keys()
    assert groups["onnx"].keys() < groups["dev"].keys()


@pytest.mark.parametrize(
    ("cxx", "line"),
    [
        ("no-such-compiler", "compiler   none (no-such-compiler is not there): pw build needs one"),
        ("false", "which does not run (exit code 1)"),
    ],
)
def test_a_compiler_that_is_missing_or_broken_is_said(
    whole: Machine, monkeypatch: pytest.MonkeyPatch, cxx: str, line: str
) -> None:
    monkeypatch.setenv("CXX", cxx)
    assert line in doctor_report(whole)


def test_places_are_told_with_their_free_room(
    whole: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 2**29))
    report = doctor_report(whole)
    assert f"cache      {tmp_path}/cache, 1.5 GiB free" in report
    assert f"temporary  {tmp_path}, 1.5 GiB free" in report
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    report = doctor_report(whole)
    assert f"cannot be used: {tmp_path}/cache is a file" in report
    assert f"temporary  TMPDIR={tmp_path}/none, which is no folder: set TMPDIR" in report


def test_encoders_that_are_missing_are_named(
    whole: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "encoders   h264, hevc, av1, ffv1, png\n" in doctor_report(whole)
    codec = av.Codec

    def without_av1(name: str, mode: str) -> object:
        return codec("no such encoder" if name == "libsvtav1" else name, mode)

    monkeypatch.setattr(av, "Codec", without_av1)
    assert "encoders   h264, hevc, ffv1, png; av lacks av1 (libsvtav1)\n" in doctor_report(whole)


def test_the_compiler_that_is_reported_is_the_one_that_pytorch_calls() -> None:
    from torch._inductor import config

    if "CXX" not in os.environ:
        assert cpp_compiler() in config.cpp.cxx


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ({"avx2"}, "no bf16 arithmetic: keep to fp32"),
        ({"avx512f", "avx512_bf16", "amx_bf16"}, "bf16 by amx_bf16, avx512_bf16"),
    ],
)
def test_doctor_says_whether_a_cpu_has_bf16(
    features: set[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: the documentation said that bf16 on a CPU is slow; on one that has it, it is not."""
    monkeypatch.setattr(doctor, "cpu_features", lambda: frozenset(features))
    assert doctor._bf16() == said


FATAL = """
import os, signal, sys

class Fatal:
    def find_spec(self, name, path=None, target=None):
        if name == "av":
            os.kill(os.getpid(), signal.SIGSEGV)
        if name == "rich":
            os._exit(3)

sys.meta_path.insert(0, Fatal())
"""


@pytest.mark.slow
def test_a_package_whose_import_ends_the_process_is_one_that_is_broken() -> None:
    report = report_of("-c", FATAL + REPORT)
    assert "why       loading it ends the process: SIGSEGV" in report
    assert "why       loading it ends the process: exit code 3" in report
    assert "encoders   unknown: the package av is missing or cannot be imported" in report
    assert report.splitlines()[-1] == "pw generate: not ready: av is broken, rich is broken"


@pytest.mark.slow
def test_the_process_that_reports_imports_no_package() -> None:
    heavy = "{'torch', 'numpy', 'av', 'pydantic', 'rich', 'transformers', 'scipy', 'triton'}"
    report = report_of("-c", f"{REPORT}; import sys; print({heavy} & set(sys.modules))")
    assert "ready on " in report
    assert report.splitlines()[-1] == "set()"
