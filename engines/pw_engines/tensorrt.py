# SPDX-License-Identifier: Apache-2.0
"""Engines built by TensorRT: plans for one GPU model and one version of TensorRT."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from pw_engines.engine import EngineError
from pw_engines.onnx_rules import check_importable
from pw_engines.spec import DTYPES, EngineSpec
from pw_engines.tensorrt_build import REFUSED, Request
from pw_engines.tensorrt_engine import TensorrtEngine
from pw_engines.tensorrt_library import bindings

FILE: Final = "engine.plan"
# Raise it when tensorrt_build.py makes another plan of the same ONNX model, or the export another
# model of the same segment: neither is part of a key, as the runtime does not know the exporter.
RECIPE: Final = "1"
GIB: Final = 1 << 30
_DRIVER: Final = Path("/proc/driver/nvidia/version")


def unavailable(device: torch.device) -> str | None:
    """Why TensorRT engines cannot be built or run on `device`, and the remedy; None if they can."""
    if device.type != "cuda":
        return f"TensorRT runs on NVIDIA GPUs, got the device {device}: use --device cuda"
    if not torch.cuda.is_available():
        return "PyTorch finds no usable NVIDIA GPU: install a driver and a CUDA build of PyTorch"
    try:
        bindings()
    except EngineError as error:
        return str(error)
    return None


def tensorrt_platform(device: torch.device) -> tuple[tuple[str, str], ...]:
    """What a plan depends on. Raises EngineError without a usable TensorRT."""
    properties = torch.cuda.get_device_properties(device)
    found = {
        "tensorrt": bindings().__version__,
        "torch": torch.__version__,  # which made the ONNX model
        "recipe": RECIPE,
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "machine": f"{platform.system()} {platform.machine()}",
    }
    if driver := _driver():
        found["driver"] = driver
    return tuple(sorted(found.items()))


def _driver() -> str | None:
    """Version of the NVIDIA driver, where the system tells it."""
    try:
        found = re.search(r"\s(\d+\.\d[\d.]*)\s", _DRIVER.read_text())
    except OSError:
        return None
    return found[1] if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a build will take. Guesses from the sizes of the tensors: nothing is measured."""

    seconds: float
    host_bytes: float
    gpu_bytes: float

    def __str__(self) -> str:
        return (
            f"{max(1, round(self.seconds / 60))} min, {self.host_bytes / GIB:.0f} GiB of memory, "
            f"{self.gpu_bytes / GIB:.0f} GiB of GPU memory (estimate)"
        )


def forecast(spec: EngineSpec, onnx_bytes: int) -> Forecast:
    """Estimate the build of a segment.

    Assumes 4 GiB for TensorRT's own code, three copies of the model, intermediate tensors of
    eight times the largest one, and as many timed kernels as move every tensor 20,000 times at
    2 TB/s.
    """
    sizes = dict(spec.limits)
    each = [
        math.prod(one.sized(sizes)) * DTYPES[one.dtype].itemsize
        for one in (*spec.inputs, *spec.outputs)
    ]
    return Forecast(
        seconds=60 + 20_000 * sum(each) / 2e12,
        host_bytes=4 * GIB + 3 * onnx_bytes,
        gpu_bytes=GIB + sum(each) + 8 * max(each) + onnx_bytes,
    )


def build(
    spec: EngineSpec,
    onnx: bytes,
    path: Path,
    device: torch.device,
    *,
    timing_cache: Path | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Build the plan `path` of a segment, in a process of its own.

    Args:
        spec: of the segment; what varies in the ONNX model is fixed at its limits.
        onnx: the model; its inputs and outputs have the names of the spec.
        path: to write.
        device: to build on and for.
        timing_cache: a file that makes the next build on this device faster; made if missing.
        say: takes lines for the user: the estimate first.

    Raises:
        EngineError: the model cannot be imported, TensorRT refuses it, or the build was killed.
    """
    check_importable(onnx, weights_inside=spec.weights is not None)
    expected = forecast(spec, len(onnx))
    say(f"building {spec.segment} with TensorRT: {expected}")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".tensorrt-", dir=path.parent) as name:
        folder = Path(name)
        request = Request(
            spec=spec,
            onnx=folder / "model.onnx",
            plan=folder / FILE,
            device=device.index,
            timing_cache=timing_cache,
        )
        request.onnx.write_bytes(onnx)
        (folder / "request.json").write_text(request.to_json())
        code, peak = _run_builder(folder)
        if code != 0:
            raise EngineError(_reason(spec.segment, code, peak, expected, folder))
        for line in (folder / "stdout").read_text().splitlines():
            say(line)
        size = request.plan.stat().st_size
        request.plan.replace(path)
    say(
        f"built {spec.segment} in {time.monotonic() - start:.0f} s: {size / 2**20:.1f} MiB, "
        f"peak memory {peak / GIB:.1f} GiB"
    )


def _run_builder(folder: Path) -> tuple[int, int]:
    """Run the build process; give its exit code (negative: a signal) and peak memory in bytes."""
    # why the path: the child must find what this process found, installed or not
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = (sys.executable, "-m", "pw_engines.tensorrt_build", str(folder / "request.json"))
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=err)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # Ctrl-C: the builder must not outlive its caller
            process.kill()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * 1024


def _reason(segment: str, code: int, peak: int, expected: Forecast, folder: Path) -> str:
    """Why a build process failed, and what to do."""
    said = (folder / "stderr").read_text(errors="replace").strip()
    if code == REFUSED:
        return said
    if code == -9:
        return (
            f"the build of {segment} was killed (signal 9), as a system does that runs out of "
            f"memory\n  got to: {peak / GIB:.1f} GiB\n  expected: {expected}\n"
            "  do this: end other programs, or allow this one more memory, and build again"
        )
    ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"the build process of {segment} {ended}: {said[-2000:] or 'it said nothing'}"


def load(spec: EngineSpec, path: Path, device: torch.device) -> TensorrtEngine:
    """Open a plan that the store has verified.

    Raises EngineError where the plan is not one for this TensorRT, this GPU and this spec.
    """
    return TensorrtEngine(spec, path, device)
