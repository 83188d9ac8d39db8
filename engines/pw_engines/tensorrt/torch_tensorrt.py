# SPDX-License-Identifier: Apache-2.0
"""Build TensorRT plans with torch-tensorrt, from the exported program of a segment.

A second front end for the same engines: `tensorrt.load` opens these plans too. torch-tensorrt is
needed to build, not to run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from torch import nn

from pw_engines import tensorrt
from pw_engines.engine import EngineError, Positional
from pw_engines.spec import DTYPES, EngineSpec
from pw_engines.tensorrt.library import bindings
from pw_engines.tensorrt.process import build_in_process
from pw_engines.tensorrt.request import PLAN, Request

# Bump when torch_tensorrt_build.py makes another plan of the same program.
RECIPE: Final = "1"
# A torch-tensorrt is for the PyTorch of its own version, and for one TensorRT (its metadata).
TENSORRT_OF: Final[Mapping[str, str]] = MappingProxyType(
    {"2.11": "10.15", "2.12": "10.16", "2.13": "11.0", "2.14": "11.1"}
)


def unavailable(device: torch.device) -> str | None:
    """Return why torch-tensorrt cannot build for `device`, and what to do; None if it can.

    torch-tensorrt is not imported: that takes seconds, and the builder is another process.
    """
    return tensorrt.unavailable(device) or _version_conflict()


def _version_conflict() -> str | None:
    """Describe what does not match among the installed versions."""
    pytorch = _minor(torch.__version__)
    if pytorch not in TENSORRT_OF:
        return (
            f"no torch-tensorrt is known for PyTorch {torch.__version__}, expected PyTorch "
            f"{', '.join(TENSORRT_OF)}: use --frontend onnx"
        )
    remedy = f'pip install "torch-tensorrt=={pytorch}.*" "tensorrt=={TENSORRT_OF[pytorch]}.*"'
    try:
        installed = version("torch-tensorrt")
    except PackageNotFoundError:
        return f"torch-tensorrt is not installed: {remedy}"
    if _minor(installed) != pytorch:
        return (
            f"torch-tensorrt {installed} is installed, expected {pytorch} for PyTorch "
            f"{torch.__version__}: {remedy}"
        )
    library = bindings().__version__
    if _minor(library) != TENSORRT_OF[pytorch]:
        return (
            f"TensorRT {library} is installed, expected {TENSORRT_OF[pytorch]} for torch-tensorrt "
            f"{installed}: {remedy}, or use --frontend onnx"
        )
    return None


def _minor(text: str) -> str:
    """Cut a version to its minor part: 2.13.0+cu132 becomes 2.13."""
    return ".".join(text.split(".")[:2])


def torch_platform(device: torch.device) -> tuple[tuple[str, str], ...]:
    """Describe what a plan depends on. Raises EngineError without a usable TensorRT.

    The version of torch-tensorrt is implied by that of PyTorch.
    """
    return tuple(sorted({**dict(tensorrt.tensorrt_platform(device)), "recipe": RECIPE}.items()))


def build(
    spec: EngineSpec,
    segment: nn.Module,
    path: Path,
    device: torch.device,
    *,
    say: Callable[[str], None] = print,
) -> None:
    """Build the plan `path` of a segment in a process of its own, all sizes at their limits.

    Args:
        spec: of the segment.
        segment: called with the inputs of the spec in order.
        path: to write.
        device: to build on and for.
        say: called with lines for the user, the estimate first.

    Raises:
        EngineError: PyTorch cannot export the segment, torch-tensorrt refuses it, or the build
            was killed.
    """
    program = export(spec, segment, device)

    def prepare(folder: Path) -> Request:
        request = Request(
            spec=spec, model=folder / "program.pt2", plan=folder / PLAN, device=device.index
        )
        torch.export.save(program, request.model)
        return request

    build_in_process(spec, "pw_engines.tensorrt.torch_tensorrt_build", prepare, path, say)


def export(
    spec: EngineSpec, segment: nn.Module, device: torch.device
) -> torch.export.ExportedProgram:
    """Export the program of a segment at its limits. Raises EngineError quoting PyTorch."""
    sizes = dict(spec.limits)
    examples = tuple(
        torch.empty(tensor_spec.sized(sizes), dtype=DTYPES[tensor_spec.dtype], device=device)
        for tensor_spec in spec.inputs
    )
    try:
        program = torch.export.export(Positional(segment), examples, strict=False)
    except Exception as error:  # it runs the segment: anything may be raised
        raise EngineError(f"PyTorch cannot export {spec.segment}: {error}") from error
    program.example_inputs = None  # or they would be saved with it
    return program
