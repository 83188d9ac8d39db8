# SPDX-License-Identifier: Apache-2.0
"""Engines compiled by AOTInductor into packages of machine code that PyTorch opens."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pw_engines.engine import EngineError, Positional, random_inputs
from pw_engines.spec import SMALLEST, Backend, EngineSpec, digest_of

FILE = "engine.pt2"
_MODEL = "model"  # name of the only one in a package
# Code for any number of threads, however many the building process has.
_PARALLEL = {"cpp.threads": max(2, os.cpu_count() or 1), "cpp.dynamic_threads": True}


def aoti_platform(device: torch.device) -> tuple[tuple[str, str], ...]:
    """Describe what a package depends on: machine code for this processor and this PyTorch."""
    facts = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "processor": processor(),  # a package for a GPU has code for the CPU too
        "recipe": digest_of([Path(__file__).read_bytes()]),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": str(torch.version.cuda),
        }
    return tuple(sorted(facts.items()))


def processor() -> str:
    """Compute a digest of the processor's features, which compiled code is for."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    prefixes = ("flags", "Features", "model name")
    features = sorted({line for line in lines if line.startswith(prefixes)})
    return digest_of(line.encode() for line in features)


def unavailable_to_run(device: torch.device) -> str | None:
    """Return why packages cannot be run here: None, as they can be run everywhere."""
    return None


def unavailable(device: torch.device) -> str | None:
    """Return why packages cannot be built here; None if they can."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        return (
            f"AOTInductor compiles C++ for a CPU and there is no C++ compiler {compiler}: "
            "install g++, or set CXX to the one you have"
        )
    return None


def build(spec: EngineSpec, segment: nn.Module, path: Path, device: torch.device) -> None:
    """Compile a segment into the package `path`, for every size up to the limits of the spec.

    Raises EngineError quoting Inductor.
    """
    # Neither a limit nor a power of two, so that nothing is specialised for this size.
    sizes = {name: max(SMALLEST, limit * 3 // 5) for name, limit in spec.limits}
    dims = {name: torch.export.Dim(name, min=SMALLEST, max=limit) for name, limit in spec.limits}
    examples = tuple(random_inputs(spec, sizes, device, seed=0))
    dynamic_shapes = tuple(
        {axis: dims[dim] for axis, dim in enumerate(tensor.shape) if isinstance(dim, str)}
        for tensor in spec.inputs
    )
    try:
        program = torch.export.export(
            Positional(segment), examples, dynamic_shapes=(dynamic_shapes,), strict=False
        )
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=_PARALLEL
        )
    except Exception as error:  # Inductor may raise anything
        raise EngineError(f"AOTInductor cannot compile {spec.segment}: {error}") from error


def load(spec: EngineSpec, path: Path, device: torch.device) -> AotiEngine:
    """Open a package that the store has verified. Raises EngineError."""
    return AotiEngine(spec, path, device)


class AotiEngine:
    """A loaded package."""

    backend: Backend = "aoti"
    padded = False
    granularity = 1
    scratch = 0

    def __init__(self, spec: EngineSpec, package: Path, device: torch.device) -> None:
        """Open a package that the store has verified. Raises EngineError."""
        self.spec = spec
        index = -1 if device.index is None else device.index
        try:
            # What `torch._inductor.aoti_load_package` opens after importing a thousand modules.
            self._model: Any = torch._C._aoti.AOTIModelPackageLoader(
                str(package), _MODEL, False, 1, index
            )
        except RuntimeError as error:
            raise EngineError(f"PyTorch cannot open {package}: {error}") from error

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Compute `outputs`. Raises ValueError for tensors that the spec does not allow.

        The check comes first: a package would read past the end of a tensor that is too small.
        """
        self.spec.check_outputs(outputs, self.spec.sizes(inputs))
        for index, x in enumerate(inputs):
            if not x.is_contiguous():
                name = self.spec.inputs[index].name
                raise ValueError(
                    f"{self.spec.segment}, tensor {name}: expected contiguous, "
                    f"got strides {x.stride()}"
                )
        try:
            with torch.cuda.device_of(inputs[0]):
                results = self._model.run(list(inputs))
        except torch.OutOfMemoryError:
            raise  # the caller may retry with less
        except RuntimeError as error:
            raise EngineError(f"{self.spec.segment} failed in AOTInductor: {error}") from error
        for target, result in zip(outputs, results, strict=True):
            target.copy_(result)
