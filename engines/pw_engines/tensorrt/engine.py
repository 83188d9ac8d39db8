# SPDX-License-Identifier: Apache-2.0
"""The running of TensorRT plans.

All engines of a device share one scratch buffer and one side stream (`Lane`), so they run one
after another, whichever thread or stream calls. A call waits for the caller's stream and the
caller's stream waits for the call: to the caller it is as if the engine ran there. Nothing
synchronises the host.
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
    Found,
    Messages,
    bindings,
    check_tensors,
    dtype_names,
    match_by_order,
)
from pw_engines.tensorrt.plan_names import split_plan

ALIGNMENT: Final = 256  # bytes, of every address that TensorRT is given


class Lane:
    """What the engines of one device share."""

    def __init__(self, device: torch.device) -> None:
        self.trt = bindings()
        self.messages = Messages(self.trt)
        self.lock = threading.Lock()  # two calls at once would write into each other's scratch
        # A stream of its own: on the default stream TensorRT synchronises the device.
        self.stream = torch.cuda.Stream(device)
        try:
            with torch.cuda.device(device):
                self.runtime = self.trt.Runtime(self.messages.logger)
        except TypeError as error:  # the package's way of saying that there is no runtime
            raise self.messages.error(f"TensorRT cannot start on {device}") from error
        self._scratch = torch.empty(ALIGNMENT, dtype=torch.uint8, device=device)
        self._captured: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        """With its index."""
        return self._scratch.device

    @property
    def scratch(self) -> tuple[int, int]:
        """Aligned address and size in bytes of the scratch buffer."""
        padding = -self._scratch.data_ptr() % ALIGNMENT
        return self._scratch.data_ptr() + padding, self._scratch.numel() - ALIGNMENT

    def reserve(self, size: int) -> None:
        """Make the scratch buffer at least `size` bytes; engines take it up at their next call."""
        if size > self.scratch[1]:
            self.stream.synchronize()  # what still runs there may use the old one
            self._scratch = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=self.device)

    def keep_scratch(self) -> None:
        """Never free the present buffer: a CUDA graph has its address."""
        if not any(one is self._scratch for one in self._captured):
            self._captured.append(self._scratch)


@functools.cache
def lane(device: torch.device) -> Lane:
    """The lane of a device, made at first use."""
    return Lane(device)


class TensorrtEngine:
    """A loaded plan. Its second call and all later ones can be captured in a CUDA graph."""

    backend: Backend = "tensorrt"
    padded = True

    def __init__(self, spec: EngineSpec, path: Path, device: torch.device) -> None:
        """Open a plan that the store has verified. Raises EngineError."""
        self.spec = spec
        plan, own = split_plan(path.read_bytes())
        ours = [one.name for one in (*spec.inputs, *spec.outputs)]
        self._names = ours if own is None else own  # that the plan has, in the order of the spec
        self._lane = lane(device)
        self._bound = (0, 0)  # scratch that the context knows
        self._has_run = False
        trt, messages = self._lane.trt, self._lane.messages
        what = f"{path}, a plan of {spec.segment},"
        with torch.cuda.device(device):
            engine = messages.need(
                self._lane.runtime.deserialize_cuda_engine(plan),
                f"TensorRT {trt.__version__} cannot open {what} on this device: build it again",
            )
            if own is None:
                check_tensors(spec, tensors_of(trt, engine), what)
            elif match_by_order(spec, tensors_of(trt, engine), what) != tuple(own):
                raise EngineError(f"{what} has other names than it was built with; build it again")
            strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = engine.create_execution_context(strategy)
            self._context = messages.need(context, f"TensorRT cannot make a context of {what}")
        self._engine = engine  # must outlive its context
        self._fix_shapes(what)
        self._lane.reserve(engine.get_device_memory_size_for_profile_v2(0))

    def _fix_shapes(self, what: str) -> None:
        """Tell the context the sizes of the spec, the only ones there are."""
        sizes = dict(self.spec.limits)
        context = self._context
        count = len(self.spec.inputs)
        for name, one in zip(self._names[:count], self.spec.inputs, strict=True):
            shape = one.sized(sizes)
            done = context.set_input_shape(name, shape)
            self._lane.messages.need(done, f"{what} does not take {one.name} of {shape}")
        for name, one in zip(self._names[count:], self.spec.outputs, strict=True):
            got, wanted = tuple(context.get_tensor_shape(name)), one.sized(sizes)
            if got != wanted:
                raise EngineError(
                    f"{what} gives {one.name} of {got}, wanted {wanted}; export and build it again"
                )

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Compute `outputs`. Raises ValueError for tensors that the spec does not allow.

        The check comes first: TensorRT is given nothing but addresses. Raises EngineError when
        TensorRT refuses, or when the first call of all is captured in a CUDA graph.
        """
        self._check(inputs, outputs)
        shared, context = self._lane, self._context
        with torch.cuda.device(shared.device), shared.lock:
            if torch.cuda.is_current_stream_capturing():
                self._require_captured()
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
            shared.messages.need(done, f"{self.spec.segment} failed in TensorRT")
        self._has_run = True

    def _check(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        sizes = self.spec.sizes(inputs)
        for name, limit in self.spec.limits:
            if sizes.get(name, limit) != limit:
                self._refuse(f"wanted {name} padded to {limit}, got {sizes[name]}")
        self.spec.check_outputs(outputs, sizes)
        tensors = (*self.spec.inputs, *self.spec.outputs)
        for name, x in zip((one.name for one in tensors), (*inputs, *outputs), strict=True):
            if x.device != self._lane.device:
                self._refuse(f"tensor {name}: wanted it on {self._lane.device}, got {x.device}")
            if not x.is_contiguous():
                self._refuse(f"tensor {name}: wanted contiguous")
            if x.data_ptr() % ALIGNMENT:
                self._refuse(
                    f"tensor {name}: wanted an address of a multiple of {ALIGNMENT} bytes, got "
                    f"{x.data_ptr() % ALIGNMENT} more; pass a tensor of its own, not a slice"
                )

    def _refuse(self, why: str) -> None:
        raise ValueError(f"{self.spec.segment}, {why}")

    def _require_captured(self) -> None:
        """What a CUDA graph needs: kernels that are loaded, and memory that stays."""
        if not self._has_run:
            raise EngineError(
                f"{self.spec.segment} has not run yet, and its first run cannot be captured in a "
                "CUDA graph: run it once before"
            )
        self._lane.keep_scratch()


def tensors_of(trt: Any, engine: Any) -> Iterator[Found]:
    """Inputs and outputs of a plan, in its order."""
    names = dtype_names(trt)
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = engine.get_tensor_dtype(name)
        yield Found(
            name=name,
            is_input=engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            dtype=names.get(dtype, str(dtype)),
            shape=tuple(engine.get_tensor_shape(name)),
        )
