# SPDX-License-Identifier: Apache-2.0
"""Facts about this machine, gathered with the standard library alone: anything may be missing."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    import torch

Group = Literal["base", "cuda", "tensorrt", "optional"]

DISTRIBUTION: Final = "pixelwizard-runtime"

_GROUPS: Final[dict[Group, str]] = {
    "base": "everything",
    "cuda": "NVIDIA GPUs [cuda]",
    "tensorrt": "engines [tensorrt]",
    "optional": "more speed",
}


@dataclass(frozen=True, slots=True)
class _Known:
    name: str  # on PyPI
    module: str
    group: Group
    disables: str  # what is lost without it
    pip: str = ""  # options that its installation needs


_KNOWN: Final = (
    _Known("torch", "torch", "base", "everything but this report"),
    _Known("numpy", "numpy", "base", "everything but this report"),
    _Known("safetensors", "safetensors", "base", "reading and writing weights"),
    _Known("transformers", "transformers", "base", "the text encoder: pw generate"),
    _Known("tokenizers", "tokenizers", "base", "reading prompts: pw generate"),
    _Known("ftfy", "ftfy", "base", "cleaning prompts: pw generate"),
    _Known("av", "av", "base", "writing videos: pw generate"),
    _Known("click", "click", "base", "the command line"),
    _Known("rich", "rich", "base", "progress and tables"),
    _Known("pydantic", "pydantic", "base", "reading bundles, presets and prompt files"),
    _Known("pillow", "PIL", "base", "contact sheets"),
    _Known("triton", "triton", "cuda", "--kernels triton, where no compiled library is installed"),
    _Known("nvidia-ml-py", "pynvml", "cuda", "the driver's version in reports"),
    _Known("tensorrt", "tensorrt", "tensorrt", "engines by TensorRT; pw build uses AOTInductor"),
    _Known(
        "torch-tensorrt",
        "torch_tensorrt",
        "tensorrt",
        "nothing: TensorRT engines are built from ONNX",
    ),
    _Known("onnx", "onnx", "tensorrt", "pw build --onnx-only, and engines by TensorRT"),
    _Known(
        "flash-attn",
        "flash_attn",
        "optional",
        "--attention flash-attn",
        "--no-build-isolation ",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One Python package: no version means missing, `broken` says why its import fails."""

    name: str
    version: str | None
    broken: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One CUDA device."""

    name: str
    memory_bytes: int
    capability: str  # "9.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Hardware and software, as far as they can be seen; None where they cannot."""

    python: str
    os: str
    cpu: str
    cores: int  # that this process may use
    memory_bytes: int | None
    packages: tuple[Package, ...]
    gpus: tuple[Gpu, ...]
    driver: str | None  # NVIDIA's


def describe() -> Machine:
    """Look at this machine. Every known package is imported, to find the broken ones: this
    takes seconds."""
    return Machine(
        python=platform.python_version(),
        os=_system(),
        cpu=cpu_model(),
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        memory_bytes=_memory_bytes(),
        packages=tuple(_package(known) for known in _KNOWN),
        gpus=_gpus(),
        driver=_driver(),
    )


def doctor_report(machine: Machine) -> str:
    """Say what is installed, what is missing, broken or outside the supported range, what that
    disables and which command fixes it. The last line tells whether `pw generate` can run."""
    lines = [
        f"python   {machine.python}",
        f"system   {machine.os}",
        f"cpu      {machine.cpu}, {machine.cores} cores",
        f"memory   {_gib(machine.memory_bytes)}",
        *(f"gpu      {g.name}, {_gib(g.memory_bytes)}, sm {g.capability}" for g in machine.gpus),
        *([] if machine.gpus else ["gpu      none that torch can use"]),
        f"driver   {machine.driver or 'unknown'}",
        "",
        f"{'state':<8} {'package':<15} {'version':<16} needed for",
    ]
    requirements = _requirements()
    for known, package in zip(_KNOWN, machine.packages, strict=True):
        lines += _package_lines(known, package, requirements.get(known.name, known.name))
    lines += ["", f"pw generate: {_verdict(machine)}"]
    return "\n".join(lines)


def cpu_features() -> frozenset[str]:
    """Return the CPU's features by Linux's names ("avx512f"); none where there is no /proc."""
    return frozenset((_proc_field(Path("/proc/cpuinfo"), "flags") or "").split())


def available_memory_bytes() -> int | None:
    """Bytes of memory that this process could still take, by the system and by its control group;
    None where the system does not tell."""
    with_unit = _proc_field(Path("/proc/meminfo"), "MemAvailable")
    if with_unit is None:
        return None
    available = int(with_unit.removesuffix("kB")) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text().strip()
        taken = int((group / "memory.current").read_text())
        cached = _proc_field(group / "memory.stat", "inactive_file")
    except OSError:
        return available
    if most == "max":
        return available
    return min(available, max(0, int(most) - taken + int(cached or 0)))


def rss_bytes() -> int:
    """Bytes of memory that this process holds now; its peak where the system tells no more."""
    with_unit = _proc_field(Path("/proc/self/status"), "VmRSS")
    return peak_rss_bytes() if with_unit is None else int(with_unit.removesuffix("kB")) * 1024


def peak_rss_bytes() -> int:
    """Return the most memory this process has held, in bytes, since it began or since
    `reset_peak_rss`."""
    with_unit = _proc_field(Path("/proc/self/status"), "VmHWM")
    if with_unit is not None:
        return int(with_unit.removesuffix("kB")) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Give what was freed back to the system, where the C library can: glibc keeps it otherwise."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def reset_peak_rss() -> bool:
    """Let `peak_rss_bytes` start again from now; return False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def reset_peak_memory(device: torch.device) -> None:
    """Begin a run: forget earlier peaks of the process (where Linux lets us) and the device."""
    reset_peak_rss()
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak bytes of the process, and of the device's allocator, since the run began."""
    peaks = {"host": peak_rss_bytes()}
    if device.type == "cuda":
        import torch

        peaks["device"] = torch.cuda.max_memory_allocated(device)
    return peaks


def _package_lines(known: _Known, package: Package, requirement: str) -> Iterator[str]:
    state = "broken" if package.broken else "ok" if package.version else "missing"
    yield f"{state:<8} {known.name:<15} {package.version or '-':<16} {_GROUPS[known.group]}"
    if package.version and _is_outside(package.version, requirement):
        yield f"{'':9}warning   {package.version} is outside the supported range {requirement}"
    if state == "ok":
        return
    if package.broken:
        yield f"{'':9}why       {package.broken}"
    again = "--force-reinstall " if package.broken else ""
    yield f"{'':9}disables  {known.disables}"
    yield f"{'':9}fix       pip install {again}{known.pip}'{requirement}'"


def _verdict(machine: Machine) -> str:
    wrong = [
        f"{package.name} is {'broken' if package.broken else 'missing'}"
        for known, package in zip(_KNOWN, machine.packages, strict=True)
        if known.group == "base" and (package.broken or package.version is None)
    ]
    if wrong:
        return f"not ready: {', '.join(wrong)}"
    return f"ready on cuda ({machine.gpus[0].name})" if machine.gpus else "ready on cpu"


def _package(known: _Known) -> Package:
    try:
        version = importlib.metadata.version(known.name)
    except importlib.metadata.PackageNotFoundError:
        return Package(name=known.name, version=None)
    try:
        module = importlib.import_module(known.module)
    except Exception as error:  # whatever a package's import may raise is the finding
        broken = " ".join(f"{type(error).__name__}: {error}".split())
        return Package(name=known.name, version=version, broken=broken)
    if known.name == "torch":  # names its build ("2.14.1+cu130"); a wheel from PyPI does not
        version = str(module.__version__)
    return Package(name=known.name, version=version)


def _requirements() -> dict[str, str]:
    """Map each dependency of this project to what pip should be asked for."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return {}
    plain = (line.partition(";")[0].strip() for line in lines)
    return {re.split(r"[^\w.-]", requirement)[0]: requirement for requirement in plain}


def _is_outside(version: str, requirement: str) -> bool:
    """Return whether a version breaks a bound of a requirement such as "torch<2.14,>=2.11".

    Compares release numbers; of the operators only >= and <, which are all that we declare.
    """
    release = _release(version)
    lowest = [_release(bound) for bound in re.findall(r">=([\d.]+)", requirement)]
    excluded = [_release(bound) for bound in re.findall(r"<([\d.]+)", requirement)]
    return any(release < bound for bound in lowest) or any(release >= bound for bound in excluded)


def _release(version: str) -> tuple[int, ...]:
    """Return the release numbers of "2.14.0a0+git1234" without the zeros at the end: (2, 14)."""
    numbers = [int(number) for number in re.split(r"[^\d.]", version)[0].split(".") if number]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _gpus() -> tuple[Gpu, ...]:
    try:
        cuda = importlib.import_module("torch").cuda
    except Exception:  # missing or broken, which the package list says
        return ()
    if not cuda.is_available():
        return ()
    found = [cuda.get_device_properties(i) for i in range(cuda.device_count())]
    return tuple(
        Gpu(name=p.name, memory_bytes=p.total_memory, capability=f"{p.major}.{p.minor}")
        for p in found
    )


def _driver() -> str | None:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        version = nvml.nvmlSystemGetDriverVersion()
        nvml.nvmlShutdown()
    except nvml.NVMLError:  # no driver
        return None
    return str(version)


def cpu_model() -> str:
    """Return the name of the processor."""
    return _proc_field(Path("/proc/cpuinfo"), "model name") or platform.processor() or "unknown"


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # not on Windows
        return None


def _system() -> str:
    """System and version, without what vendors append to it."""
    number = re.match(r"[\d.]*", platform.release())
    return f"{platform.system()} {number[0] if number else ''}".strip()


def _proc_field(path: Path, name: str) -> str | None:
    try:
        text = path.read_text()
    except OSError:  # only Linux has /proc
        return None
    found = re.search(rf"^{name}\s*:\s*(.+?)\s*$", text, re.MULTILINE)
    return found.group(1) if found else None


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
