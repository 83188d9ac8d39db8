# SPDX-License-Identifier: Apache-2.0
"""The TensorRT backend: plans for one GPU model and one version of TensorRT.

This module builds plans from ONNX models and loads plans; `torch_tensorrt` is the other front end,
and `rtx` the backend of the other library.

    library              the packages: versions, messages, description of tensors
    onnx_rules           what an ONNX model may contain
    process, request     a build in a process of its own
    onnx_build, torch_tensorrt_build   the programs of that process
    engine               running a plan
    plan_file            facts stored behind a plan
    rtx                  the same for TensorRT for RTX: named targets, no GPU to build
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from pw_engines.engine import EngineError
from pw_engines.onnx_recipe import RECIPE
from pw_engines.spec import EngineSpec
from pw_engines.tensorrt.driver import driver_version
from pw_engines.tensorrt.engine import TensorrtEngine
from pw_engines.tensorrt.library import bindings
from pw_engines.tensorrt.onnx_rules import check_importable
from pw_engines.tensorrt.process import build_in_process
from pw_engines.tensorrt.request import PLAN, Request

FILE: Final = PLAN


def unavailable(device: torch.device) -> str | None:
    """Return why engines cannot be built or run on `device`, and what to do; None if they can."""
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
    """Describe what a plan depends on. Raises EngineError without a usable TensorRT."""
    properties = torch.cuda.get_device_properties(device)
    facts = {
        "tensorrt": bindings().__version__,
        "torch": torch.__version__,  # which made the model that TensorRT was given
        "recipe": RECIPE,
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "machine": f"{platform.system()} {platform.machine()}",
    }
    if driver := driver_version():
        facts["driver"] = driver
    return tuple(sorted(facts.items()))


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
        spec: of the segment; named dimensions of the ONNX model are fixed at its limits.
        onnx: the model; its inputs and outputs have the names of the spec.
        path: to write.
        device: to build on and for.
        timing_cache: a file that speeds up the next build on this device; created if missing.
        say: called with lines for the user, the estimate first.

    Raises:
        EngineError: the model cannot be imported, TensorRT refuses it, or the build was killed.
    """
    check_importable(onnx, weights_inside=spec.weights is not None)

    def prepare(folder: Path) -> Request:
        request = Request(
            spec=spec,
            model=folder / "model.onnx",
            plan=folder / PLAN,
            device=device.index,
            timing_cache=timing_cache,
        )
        request.model.write_bytes(onnx)
        return request

    build_in_process(spec, "pw_engines.tensorrt.onnx_build", prepare, path, say)


def load(spec: EngineSpec, path: Path, device: torch.device) -> TensorrtEngine:
    """Open a plan that the store has verified.

    Raises EngineError where the plan is not for this TensorRT, this GPU and this spec.
    """
    return TensorrtEngine(spec, path, device)
