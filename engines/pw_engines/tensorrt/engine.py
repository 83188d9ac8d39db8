# SPDX-License-Identifier: Apache-2.0
"""Run TensorRT plans.

All engines of a device share one scratch buffer and one side stream (`Lane`), so they run one
after another, whichever thread or stream calls. A call waits for the caller's stream and the
caller's stream waits for the call, as if the engine ran on it. Nothing synchronises the host.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from pw_engines.engine import EngineError
from pw_engines.spec import Backend, EngineSpec
from pw_engines.tensorrt.library import (
    TENSORRT,
    Library,
    Messages,
    TensorInfo,
    bindings,
    check_tensors,
    dtype_names,
    match_by_order,
)
from pw_engines.tensorrt.plan_file import split_plan
from pw_engines.tensorrt.runtime_cache import RuntimeCache

ALIGNMENT: Final = 256  # of every address that TensorRT is given, in bytes


class Lane:
    """State that the engines of one device share."""

    def __init__(self, device: torch.device, library: Library) -> None:
        self.library, self.trt = library, bindings(library)
        self.messages = Messages(self.trt)
        self.lock = threading.Lock()  # concurrent calls would overwrite each other's scratch
        # A stream of its own: on the default stream TensorRT synchronises the device.
        self.stream = torch.cuda.Stream(device)
        try:
            with torch.cuda.device(device):
                self.runtime = self.trt.Runtime(self.messages.logger)
        except TypeError as error:  # raised by the package where there is no runtime
            raise self.messages.error(f"{library.title} cannot start on {device}") from error
        self._scratch = torch.empty(ALIGNMENT, dtype=torch.uint8, device=device)
        self._captured: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        """The device, with its index."""
        return self._scratch.device

    @property
    def scratch(self) -> tuple[int, int]:
        """Aligned address and size in bytes of the scratch buffer."""
        padding = -self._scratch.data_ptr() % ALIGNMENT
        return self._scratch.data_ptr() + padding, self._scratch.numel() - ALIGNMENT

    def reserve(self, size: int) -> None:
        """Grow the scratch buffer to at least `size` bytes; engines use it from their next call."""
        if size > self.scratch[1]:
            self.stream.synchronize()  # running work may use the old buffer
            self._scratch = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=self.device)

    def keep_scratch(self) -> None:
        """Never free the current buffer: a CUDA graph has its address."""
        if not any(buffer is self._scratch for buffer in self._captured):
            self._captured.append(self._scratch)


@functools.cache
def lane(device: torch.device, library: Library) -> Lane:
    """Return the lane of a device for a library, created at first use."""
    return Lane(device, library)


class TensorrtEngine:
    """A loaded plan. All calls but the first can be captured in a CUDA graph.

    A plan of TensorRT has one size, and callers pad; one of TensorRT for RTX has every size up to
    the limits of its spec.
    """

    granularity = 128  # rows of any tensor of ours: a multiple of ALIGNMENT

    def __init__(
        self, spec: EngineSpec, path: Path, device: torch.device, library: Library = TENSORRT
    ) -> None:
        """Open a plan that the store has verified. Raises EngineError."""
        self.spec = spec
        self.backend: Backend = library.name
        self.padded = not library.targets
        self._sizes: dict[str, int] = {}  # of the named dimensions, as the context has them
        plan, facts = split_plan(path.read_bytes())
        stored_names = facts.names
        spec_names = [tensor_spec.name for tensor_spec in (*spec.inputs, *spec.outputs)]
        # of the plan's tensors, in the order of the spec
        self._names = spec_names if stored_names is None else list(stored_names)
        self._lane = lane(device, library)
        self._bound = (0, 0)  # scratch that the context uses
        self._has_run = False
        trt, messages = self._lane.trt, self._lane.messages
        name = f"{path}, a plan of {spec.segment},"
        with torch.cuda.device(device):
            if library.targets:
                _require_valid(self._lane, plan, name)
            engine = messages.need(
                self._lane.runtime.deserialize_cuda_engine(plan),
                f"{library.title} {trt.__version__} cannot open {name} on this device: build it "
                "again",
            )
            if stored_names is None:
                check_tensors(spec, tensors_of(trt, engine), name)
            elif match_by_order(spec, tensors_of(trt, engine), name) != stored_names:
                raise EngineError(
                    f"{name} does not have the tensor names it was built with; build it again"
                )
            strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            self.kernels: RuntimeCache | None = None
            if library.targets:
                runtime_config = engine.create_runtime_config()
                runtime_config.set_execution_context_allocation_strategy(strategy)
                self.kernels = RuntimeCache(trt, runtime_config, path, device)
                context = engine.create_execution_context(runtime_config)
            else:
                context = engine.create_execution_context(strategy)
            failure = f"{library.title} cannot make a context of {name}"
            self._context = messages.need(context, failure)
        self._engine = engine  # must outlive its context
        self._set_sizes(dict(spec.limits), name)
        self.scratch: int = engine.get_device_memory_size_for_profile_v2(0)
        self._lane.reserve(self.scratch)

    def _set_sizes(self, sizes: dict[str, int], plan_name: str) -> None:
        """Set the named dimensions of the next calls. Raises EngineError for what it lacks."""
        if sizes == self._sizes:
            return
        context = self._context
        count = len(self.spec.inputs)
        for name, tensor_spec in zip(self._names[:count], self.spec.inputs, strict=True):
            shape = tensor_spec.numbers(sizes)
            done = context.set_input_shape(name, shape)
            failure = f"{plan_name} does not take {tensor_spec.name} of {shape}"
            self._lane.messages.need(done, failure)
        for name, tensor_spec in zip(self._names[count:], self.spec.outputs, strict=True):
            got, expected = tuple(context.get_tensor_shape(name)), tensor_spec.sized(sizes)
            if got != expected:
                raise EngineError(
                    f"{plan_name} returns {tensor_spec.name} of {got}, expected {expected}; "
                    "export and build it again"
                )
        self._sizes = sizes

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Compute `outputs`. Raises ValueError for tensors that the spec does not allow.

        The check comes first: TensorRT is given only addresses. Raises EngineError when TensorRT
        fails, or when the very first call is captured in a CUDA graph.
        """
        sizes = self._check(inputs, outputs)
        shared, context = self._lane, self._context
        with torch.cuda.device(shared.device), shared.lock:
            self._set_sizes(sizes, f"the plan of {self.spec.segment}")
            if torch.cuda.is_current_stream_capturing():
                self._prepare_for_capture()
            if self._bound != shared.scratch:
                context.set_device_memory(*shared.scratch)
                self._bound = shared.scratch
            for name, x in zip(self._names, (*inputs, *outputs), strict=True):
                done = context.set_tensor_address(name, x.data_ptr())
                shared.messages.need(done, f"TensorRT does not take the address of {name}")
            current = torch.cuda.current_stream()
            shared.stream.wait_stream(current)
            done = context.execute_async_v3(shared.stream.cuda_stream)
            current.wait_stream(shared.stream)
            shared.messages.need(done, f"{self.spec.segment} failed in {shared.library.title}")
        self._has_run = True

    def _check(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> dict[str, int]:
        """Return the named dimensions of a call. Raises ValueError for what it may not have."""
        sizes = self.spec.sizes(inputs)
        for name, limit in self.spec.limits if self.padded else ():
            if sizes.get(name, limit) != limit:
                self._refuse(f"expected {name} padded to {limit}, got {sizes[name]}")
        self.spec.check_outputs(outputs, sizes)
        tensor_specs = (*self.spec.inputs, *self.spec.outputs)
        for tensor_spec, x in zip(tensor_specs, (*inputs, *outputs), strict=True):
            name = tensor_spec.name
            if x.device != self._lane.device:
                self._refuse(f"tensor {name}: expected it on {self._lane.device}, got {x.device}")
            if not x.is_contiguous():
                self._refuse(f"tensor {name}: expected contiguous, got strides {x.stride()}")
            if x.data_ptr() % ALIGNMENT:
                self._refuse(
                    f"tensor {name}: expected an address that is a multiple of {ALIGNMENT}, got "
                    f"{x.data_ptr() % ALIGNMENT} more; pass a whole tensor, not a slice"
                )
        return sizes

    def _refuse(self, reason: str) -> None:
        raise ValueError(f"{self.spec.segment}, {reason}")

    def _prepare_for_capture(self) -> None:
        """Ensure what a CUDA graph needs: kernels that are loaded, and memory that stays."""
        if not self._has_run:
            raise EngineError(
                f"{self.spec.segment} has not run yet, and its first run cannot be captured in a "
                "CUDA graph: run it once first"
            )
        self._lane.keep_scratch()


# What makes a plan unusable here, by the bits of the library's diagnosis.
_INVALID: Final = (
    (1, "it was built by another version"),
    (2, "it was built for other GPUs"),
    (4, "the driver is too old"),
    (8, "the CUDA runtime is too old"),
    (16, "the GPU has too little memory"),
    (32, "it is damaged"),
    (64, "CUDA failed"),
)


def _require_valid(shared: Lane, plan: bytes | memoryview, name: str) -> None:
    """Raise EngineError with the reason where a plan cannot be used on this device."""
    validity, bits = shared.runtime.get_engine_validity(plan)
    if validity == shared.trt.EngineValidity.INVALID:
        reasons = [text for bit, text in _INVALID if bits & bit]
        raise shared.messages.error(
            f"{name} cannot be used on this device: {', '.join(reasons) or 'no reason given'}; "
            "build it again, for this GPU"
        )


def tensors_of(trt: Any, engine: Any) -> Iterator[TensorInfo]:
    """Yield the inputs and outputs of a plan, in its order."""
    names = dtype_names(trt)
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = engine.get_tensor_dtype(name)
        yield TensorInfo(
            name=name,
            is_input=engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            dtype=names.get(dtype, str(dtype)),
            shape=tuple(engine.get_tensor_shape(name)),
        )
