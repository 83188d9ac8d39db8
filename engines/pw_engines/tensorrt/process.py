# SPDX-License-Identifier: Apache-2.0
"""Run a TensorRT build in a process of its own: the estimate, the end, and what it reported.

A builder takes gigabytes, and a system that runs out of memory kills it: the caller survives and
reports it.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pw_engines.child import child_environment
from pw_engines.engine import EngineError
from pw_engines.spec import DTYPES, EngineSpec
from pw_engines.tensorrt.library import TENSORRT, Library
from pw_engines.tensorrt.plan_file import read_facts
from pw_engines.tensorrt.request import LOG, PLAN, REFUSED, Request

GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Estimated resources of a build, guessed from the sizes of the tensors."""

    seconds: float
    host_bytes: float
    gpu_bytes: float

    def __str__(self) -> str:
        parts = [
            f"{max(1, round(self.seconds / 60))} min",
            f"{self.host_bytes / GIB:.0f} GiB of memory",
        ]
        if self.gpu_bytes:
            parts.append(f"{self.gpu_bytes / GIB:.0f} GiB of GPU memory")
        return f"{', '.join(parts)} (estimate)"


def forecast(spec: EngineSpec, model_bytes: int, library: Library) -> Forecast:
    """Estimate the build of a segment.

    TensorRT for RTX times no kernels and needs no GPU: its builder took 0.5 GiB at most for models
    of a few KB. Of TensorRT this assumes 4 GiB for its own code, three copies of the model,
    intermediate tensors of eight times the largest one, and as many timed kernels as move every
    tensor 20,000 times at 2 TB/s.
    """
    if library.targets:
        return Forecast(seconds=30, host_bytes=GIB + 4 * model_bytes, gpu_bytes=0)
    sizes = dict(spec.limits)
    tensor_bytes = [
        math.prod(tensor_spec.sized(sizes)) * DTYPES[tensor_spec.dtype].itemsize
        for tensor_spec in (*spec.inputs, *spec.outputs)
    ]
    return Forecast(
        seconds=60 + 20_000 * sum(tensor_bytes) / 2e12,
        host_bytes=4 * GIB + 3 * model_bytes,
        gpu_bytes=GIB + sum(tensor_bytes) + 8 * max(tensor_bytes) + model_bytes,
    )


def build_in_process(
    spec: EngineSpec,
    module: str,
    prepare: Callable[[Path], Request],
    path: Path,
    say: Callable[[str], None],
    library: Library = TENSORRT,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> None:
    """Build the plan `path` of a segment by `python -m module REQUEST.json DESCRIPTOR`.

    Args:
        spec: of the segment.
        module: the builder: it writes the file PLAN of its folder, and exits with REFUSED and the
            reason on standard error where it cannot.
        prepare: writes the model into the folder and returns the request.
        path: to write.
        say: called with lines for the user, the estimate first.
        library: that builds.
        on_phase: called with the names of phases that the builder writes to DESCRIPTOR.

    Raises:
        EngineError: the builder refused, or was killed.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".tensorrt-", dir=path.parent) as name:
        folder = Path(name)
        request = prepare(folder)
        estimate = forecast(spec, request.model.stat().st_size, library)
        say(f"building {spec.segment} with {library.title}: {estimate}")
        (folder / "request.json").write_text(request.to_json(), encoding="utf-8")
        code, peak = _run_builder(module, folder, on_phase)
        if code != 0:
            raise EngineError(_reason(spec.segment, code, peak, estimate, folder))
        for line in (folder / "stdout").read_text(encoding="utf-8", errors="replace").splitlines():
            say(line)
        size, scratch = (folder / PLAN).stat().st_size, read_facts(folder / PLAN).scratch
        (folder / PLAN).replace(path)
    say(
        f"built {spec.segment} in {time.monotonic() - start:.0f} s: {size / 2**20:.1f} MiB, "
        + ("" if scratch is None else f"{scratch / 2**20:.0f} MiB of scratch memory on the GPU, ")
        + f"peak memory {peak / GIB:.1f} GiB"
    )


def _run_builder(
    module: str, folder: Path, on_phase: Callable[[str], None] = lambda phase: None
) -> tuple[int, int]:
    """Run the build process; return its exit code (negative: a signal) and peak memory in bytes."""
    # why the path: the child must find what this process found, installed or not
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment = child_environment({**os.environ, **path})
    read, write = os.pipe()
    command = (sys.executable, "-m", module, str(folder / "request.json"), str(write))
    with (
        (folder / "stdout").open("wb") as out,
        (folder / "stderr").open("wb") as err,
        os.fdopen(read, encoding="utf-8", errors="replace") as phases,
    ):
        try:
            process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=err, pass_fds=(write,)
            )
        finally:
            os.close(write)  # the builder has its own: when it has ended, there are no more phases
        try:
            for phase in phases:
                on_phase(phase.strip())
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # Ctrl-C: the builder must not outlive its caller
            process.kill()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * 1024


def _reason(segment: str, code: int, peak: int, estimate: Forecast, folder: Path) -> str:
    """Say why a build process failed, and what to do."""
    if code == REFUSED:
        return (folder / "stderr").read_text(encoding="utf-8", errors="replace").strip()
    if code == -9:
        return (
            f"the build of {segment} was killed (signal 9), as a system does that runs out of "
            f"memory\n  got to: {peak / GIB:.1f} GiB\n  expected: {estimate}\n"
            "  do this: close other programs, or allow this one more memory, and build again"
        )
    files = (folder / LOG, folder / "stderr")
    output = "\n".join(
        x.read_text(encoding="utf-8", errors="replace").strip() for x in files if x.exists()
    )
    end = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"the build process of {segment} {end}: {output[-2000:].strip() or 'no output'}"
