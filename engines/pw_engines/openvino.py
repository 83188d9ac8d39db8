# SPDX-License-Identifier: Apache-2.0
"""Engines compiled by OpenVINO for the CPU, from ONNX models with weights as inputs.

fp32 only: with the precision hint bf16 `block_out` was off by a fifth, on a CPU that has bf16.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from pw_engines.aoti import processor
from pw_engines.engine import EngineError
from pw_engines.onnx_recipe import RECIPE
from pw_engines.spec import SMALLEST, Backend, EngineSpec, digest_of

FILE: Final = "engine.blob"
INSTALL: Final = 'pip install "pixelwizard-runtime[openvino]"'
# A CPU with bf16 arithmetic would otherwise use it; streams and pinning depend on the machine.
_SETTINGS: Final[Mapping[str, Any]] = {
    "INFERENCE_PRECISION_HINT": "f32",
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": 1,
    "ENABLE_CPU_PINNING": False,
}


def unavailable(device: torch.device) -> str | None:
    """Return why engines cannot be built or run on `device`, and what to do; None if they can."""
    if device.type != "cpu":
        return f"OpenVINO's engines are for the CPU, got the device {device}: use --device cpu"
    if importlib.util.find_spec("openvino") is None:
        return f"OpenVINO is not installed: {INSTALL}"
    try:
        importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:  # any folder named openvino will be found
        return f"openvino is found, but no package of this name is installed: {INSTALL}"
    return None


def openvino_platform(device: torch.device) -> tuple[tuple[str, str], ...]:
    """Describe what an engine depends on. Does not import OpenVINO, which must be installed."""
    facts = {
        "openvino": importlib.metadata.version("openvino"),
        "torch": torch.__version__,  # which makes the model that OpenVINO is given
        "machine": platform.machine(),
        "processor": processor(),
        "recipe": digest_of([Path(__file__).read_bytes(), RECIPE.encode()]),
    }
    return tuple(sorted(facts.items()))


def build(spec: EngineSpec, onnx: bytes, path: Path) -> None:
    """Compile a model to the file `path`, for every size up to the limits of the spec.

    Args:
        spec: of the segment.
        onnx: the model; its inputs and outputs have the names and the order of the spec, and their
            named dimensions vary.
        path: to write.

    Raises:
        EngineError: the spec is not fp32, or OpenVINO refuses the model or is broken.
    """
    dtypes = {tensor.dtype for tensor in (*spec.inputs, *spec.outputs)}
    if others := dtypes - {"fp32", "int64"}:
        raise EngineError(
            f"OpenVINO's engines are fp32, and {spec.segment} has tensors of "
            f"{', '.join(sorted(others))}: use --precision fp32, or --backend aoti"
        )
    openvino = _bindings()
    limits = dict(spec.limits)
    try:
        core = _core()
        model = core.read_model(onnx)
        model.reshape(
            {
                tensor.name: openvino.PartialShape(
                    [
                        openvino.Dimension(SMALLEST, limits[dim]) if isinstance(dim, str) else dim
                        for dim in tensor.shape
                    ]
                )
                for tensor in spec.inputs
            }
        )
        exported = core.compile_model(model, "CPU", dict(_SETTINGS)).export_model()
    except RuntimeError as error:
        raise EngineError(f"OpenVINO cannot compile {spec.segment}: {_reason(error)}") from error
    path.write_bytes(exported if isinstance(exported, bytes) else exported.getvalue())


def load(spec: EngineSpec, path: Path, device: torch.device) -> OpenvinoEngine:
    """Open an engine that the store has verified. Raises EngineError."""
    return OpenvinoEngine(spec, path)


class OpenvinoEngine:
    """A loaded engine, which runs on as many threads as PyTorch had when it was opened.

    It reads and writes the caller's memory. What it needs in between it keeps for its next call.
    """

    backend: Backend = "openvino"
    padded = False
    granularity = 1
    scratch = 0

    def __init__(self, spec: EngineSpec, path: Path) -> None:
        """Open an engine that the store has verified. Raises EngineError."""
        self.spec = spec
        self._openvino = _bindings()
        settings = {**_SETTINGS, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        try:
            compiled = _core().import_model(path.read_bytes(), "CPU", settings)
            self._request: Any = compiled.create_infer_request()
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot open {path}: {_reason(error)}") from error
        found = [port.any_name for port in compiled.inputs]
        wanted = [tensor.name for tensor in spec.inputs]
        if found != wanted:
            raise EngineError(f"{path} takes {', '.join(found)}, expected {', '.join(wanted)}")

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Compute `outputs`. Raises ValueError for tensors that the spec does not allow."""
        self.spec.check_outputs(outputs, self.spec.sizes(inputs))
        for tensor, x in zip(
            (*self.spec.inputs, *self.spec.outputs), (*inputs, *outputs), strict=True
        ):
            if not x.is_contiguous():
                raise ValueError(
                    f"{self.spec.segment}, tensor {tensor.name}: expected contiguous, "
                    f"got strides {x.stride()}"
                )
        # The caller's tensors keep the memory alive that these share.
        for index, x in enumerate(inputs):
            self._request.set_input_tensor(index, self._shared(x))
        for index, x in enumerate(outputs):
            self._request.set_output_tensor(index, self._shared(x))
        try:
            self._request.infer()
        except RuntimeError as error:
            raise EngineError(
                f"{self.spec.segment} failed in OpenVINO: {_reason(error)}"
            ) from error

    def _shared(self, x: Tensor) -> Any:
        return self._openvino.Tensor(x.detach().numpy(), shared_memory=True)


def _bindings() -> Any:
    """Import OpenVINO, without its telemetry. Raises EngineError where the import fails.

    Where openvino_telemetry is installed, the import reports to an analytics service; where it is
    not, OpenVINO works the same.
    """
    hidden = "openvino_telemetry"
    known = sys.modules.get(hidden)
    if known is None:
        sys.modules[hidden] = None  # type: ignore[assignment]  # imports of it fail
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise EngineError(f"OpenVINO cannot be imported ({error}): {INSTALL}") from error
    finally:
        if known is None:
            del sys.modules[hidden]


def _core() -> Any:
    """Return a new Core of OpenVINO's whose plugin for CPUs was loaded in a thread of its own.

    It replaces the signal stack of the thread that loads it by one of some 11 KiB, which would have
    to hold all signals that Python gets at once there: three of them ended the process by SIGSEGV.

    Raises:
        EngineError: the import fails.
        RuntimeError: the plugin cannot be loaded.
    """
    core = _bindings().Core()
    with ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(core.get_property, "CPU", "FULL_DEVICE_NAME").result()
    return core


def _reason(error: Exception) -> str:
    """Return the last line that OpenVINO says; those before it name places in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
