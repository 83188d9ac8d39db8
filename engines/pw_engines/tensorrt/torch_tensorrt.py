# SPDX-License-Identifier: Apache-2.0
"""TensorRT plans made by torch-tensorrt, from what torch.export makes of a segment.

Another front end for the same engines: `tensorrt.load` opens these plans too. torch-tensorrt is
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
from pw_engines.tensorrt.process import PLAN, build_elsewhere
from pw_engines.tensorrt.torch_tensorrt_build import TorchRequest

# Raise it when tensorrt_torch_build.py makes another plan of the same program.
RECIPE: Final = "1"
# A torch-tensorrt is for one PyTorch, whose number it has, and for one TensorRT: its metadata.
FITTING: Final[Mapping[str, str]] = MappingProxyType(
    {"2.11": "10.15", "2.12": "10.16", "2.13": "11.0"}
)


def unavailable(device: torch.device) -> str | None:
    """Why torch-tensorrt cannot build for `device`, and the remedy; None if it can.

    Nothing of it is imported: that takes seconds, and the builder is another process.
    """
    return tensorrt.unavailable(device) or _misfit()


def _misfit() -> str | None:
    """What is wrong with the installed versions."""
    ours = _minor(torch.__version__)
    if ours not in FITTING:
        return (
            f"which torch-tensorrt fits PyTorch {torch.__version__} is not known, wanted PyTorch "
            f"{', '.join(FITTING)}: use --frontend onnx"
        )
    remedy = f'pip install "torch-tensorrt=={ours}.*" "tensorrt=={FITTING[ours]}.*"'
    try:
        found = version("torch-tensorrt")
    except PackageNotFoundError:
        return f"torch-tensorrt is not installed: {remedy}"
    if _minor(found) != ours:
        return (
            f"torch-tensorrt {found} is installed, wanted {ours} for PyTorch "
            f"{torch.__version__}: {remedy}"
        )
    library = bindings().__version__
    if _minor(library) != FITTING[ours]:
        return (
            f"TensorRT {library} is installed, wanted {FITTING[ours]} for torch-tensorrt {found}: "
            f"{remedy}, or use --frontend onnx"
        )
    return None


def _minor(text: str) -> str:
    """2.13 of 2.13.0+cu132 and so on."""
    return ".".join(text.split(".")[:2])


def torch_platform(device: torch.device) -> tuple[tuple[str, str], ...]:
    """What a plan depends on. Raises EngineError without a usable TensorRT.

    torch-tensorrt is not named: PyTorch is, and each has its own.
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
    """Build the plan `path` of a segment, in a process of its own, all sizes at their limits.

    Args:
        spec: of the segment.
        segment: called with the inputs of the spec in order.
        path: to write.
        device: to build on and for.
        say: takes lines for the user: the estimate first.

    Raises:
        EngineError: PyTorch cannot export the segment, torch-tensorrt refuses it, or the build
            was killed.
    """
    program = export(spec, segment, device)

    def prepare(folder: Path) -> str:
        request = TorchRequest(
            spec=spec,
            program=folder / "program.pt2",
            plan=folder / PLAN,
            device=device.index,
        )
        torch.export.save(program, request.program)
        return request.to_json()

    build_elsewhere(spec, "pw_engines.tensorrt.torch_tensorrt_build", prepare, path, say)


def export(
    spec: EngineSpec, segment: nn.Module, device: torch.device
) -> torch.export.ExportedProgram:
    """The program of a segment, of its limits alone. Raises EngineError with PyTorch's words."""
    sizes = dict(spec.limits)
    examples = tuple(
        torch.empty(one.sized(sizes), dtype=DTYPES[one.dtype], device=device) for one in spec.inputs
    )
    try:
        program = torch.export.export(Positional(segment), examples, strict=False)
    except Exception as error:  # it runs the segment, and raises what that or Dynamo does
        raise EngineError(f"PyTorch cannot export {spec.segment}: {error}") from error
    program.example_inputs = None  # or all of them would be in its file
    return program
