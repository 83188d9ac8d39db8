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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from pw_runtime.system.packages import (
    DEVELOPMENT,
    UNDECLARED,
    Package,
    declared,
    inspect_package,
)

if TYPE_CHECKING:
    import torch


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


def describe(
    fatal: Mapping[str, str] = MappingProxyType({}),
    before: Callable[[str], None] = lambda name: None,
) -> Machine:
    """Look at this machine. Every known package is imported, to find the broken ones: this
    takes seconds.

    Args:
        fatal: packages that are not loaded, because that ended a process; and how it ended.
        before: called with the name of each package that is going to be loaded.
    """
    packages = tuple(_packages(fatal, before))
    gpus: tuple[Gpu, ...] = ()
    driver = None
    if "torch" not in fatal:
        before("torch")  # looking at a GPU may end the process too
        gpus = _gpus()
    if "nvidia-ml-py" not in fatal:
        before("nvidia-ml-py")
        driver = _driver()
    return Machine(
        python=platform.python_version(),
        os=_system(),
        cpu=cpu_model(),
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        memory_bytes=_memory_bytes(),
        packages=packages,
        gpus=gpus,
        driver=driver,
    )


def _packages(fatal: Mapping[str, str], before: Callable[[str], None]) -> Iterator[Package]:
    for name in _package_names():
        if name in fatal:
            broken = f"loading it ends the process: {fatal[name]}"
            yield Package(name=name, version=importlib.metadata.version(name), broken=broken)
        else:
            before(name)
            yield inspect_package(name)


def _package_names() -> list[str]:
    """List the packages to look at: those declared for users, and those that only add speed."""
    groups = declared()
    names = [name for group in groups if group != DEVELOPMENT for name in groups[group]]
    return [*dict.fromkeys((*names, *UNDECLARED))]


def cpu_features() -> frozenset[str]:
    """Return the CPU's features by Linux's names ("avx512f"); none where there is no /proc."""
    return frozenset((_proc_field(Path("/proc/cpuinfo"), "flags") or "").split())


def cpp_compiler() -> str:
    """Return the name of the C++ compiler that PyTorch's compiler calls."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def available_memory_bytes() -> int | None:
    """Bytes of memory that this process could still take, by the system and by its control group;
    None where the system does not tell."""
    with_unit = _proc_field(Path("/proc/meminfo"), "MemAvailable")
    if with_unit is None:
        return None
    available = int(with_unit.removesuffix("kB")) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text(encoding="utf-8").strip()
        taken = int((group / "memory.current").read_text(encoding="utf-8"))
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
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
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
        text = path.read_text(encoding="utf-8")
    except OSError:  # only Linux has /proc
        return None
    found = re.search(rf"^{name}\s*:\s*(.+?)\s*$", text, re.MULTILINE)
    return found.group(1) if found else None
