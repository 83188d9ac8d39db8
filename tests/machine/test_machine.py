# SPDX-License-Identifier: Apache-2.0
"""The doctor tells the truth, most of all where much is missing."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pw_runtime.job.receipt import versions
from pw_runtime.system import machine
from pw_runtime.system.machine import (
    Gpu,
    Machine,
    Package,
    describe,
    doctor_report,
    peak_rss_bytes,
    reset_peak_rss,
)

ROOT = Path(__file__).parents[2]
REPORT = (
    "from pw_runtime.system.machine import describe, doctor_report; "
    "print(doctor_report(describe()))"
)
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
        packages=tuple(Package(name=k.name, version="1.2.3") for k in machine._KNOWN),
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
    assert states == [["missing", known.name] for known in machine._KNOWN]
    assert report.count("disables ") == report.count("pip install ") == len(machine._KNOWN)
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
    assert "gpu      none that torch can use" in report
    assert "memory   unknown" in report
    assert report.splitlines()[-1] == "pw generate: ready on cpu"


def test_missing_extras_do_not_stop_generate(whole: Machine) -> None:
    report = doctor_report(without(whole, "triton", "tensorrt", "flash-attn"))
    assert "pip install --no-build-isolation 'flash-attn'" in report
    assert report.splitlines()[-1] == "pw generate: ready on cuda (NVIDIA H200)"


def test_missing_base_package_is_named_in_the_verdict(whole: Machine) -> None:
    report = doctor_report(without(whole, "torch"))
    assert report.splitlines()[-1] == "pw generate: not ready: torch is missing"
    assert "disables  everything but this report" in report


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
    torch_package = machine._package(machine._KNOWN[0])
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
    lines = importlib.metadata.requires(machine.DISTRIBUTION)
    assert lines
    for requirement in (line.partition(";")[0] for line in lines):
        assert re.fullmatch(r"[\w.-]+((>=|<)[\d.]+,?)*\s*", requirement), requirement


def test_peak_memory_sees_a_large_block_and_forgets_it_after_reset() -> None:
    size = 256 * 2**20
    before = peak_rss_bytes()
    block = bytearray(b"x") * size
    assert peak_rss_bytes() >= before
    assert peak_rss_bytes() >= size
    with_block = peak_rss_bytes()
    del block
    if not reset_peak_rss():
        pytest.skip("this system cannot reset a process's memory peak")
    assert peak_rss_bytes() <= with_block - size // 2


def test_peak_memory_without_proc_comes_from_getrusage(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = peak_rss_bytes()
    monkeypatch.setattr(machine, "_proc_field", lambda path, name: None)
    assert peak_rss_bytes() >= exact * 0.9


def test_gpus_and_driver_come_from_torch_and_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA H200", total_memory=150_000_000_000, major=9, minor=0)
    cuda = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, get_device_properties=lambda i: card
    )
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.65",
    )
    modules = {"torch": SimpleNamespace(cuda=cuda), "pynvml": nvml}
    monkeypatch.setattr("importlib.import_module", modules.__getitem__)
    gpu = Gpu(name="NVIDIA H200", memory_bytes=150_000_000_000, capability="9.0")
    assert machine._gpus() == (gpu, gpu)
    assert machine._driver() == "580.65"


def test_nvml_without_a_driver_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library() -> None:
        raise RuntimeError("NVML Shared Library Not Found")

    nvml = SimpleNamespace(NVMLError=RuntimeError, nvmlInit=no_library)
    monkeypatch.setattr("importlib.import_module", lambda name: nvml)
    assert machine._driver() is None
