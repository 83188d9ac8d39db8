# SPDX-License-Identifier: Apache-2.0
"""Build a TensorRT plan from an ONNX model; `process` starts this program.

python -m pw_engines.tensorrt.onnx_build REQUEST.json DESCRIPTOR

DESCRIPTOR is that of an open file: the names of the phases of the build are written to it as they
begin, one on a line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pw_engines.child import end_with_parent
from pw_engines.engine import EngineError
from pw_engines.spec import SMALLEST, EngineSpec
from pw_engines.tensorrt.library import (
    LIBRARIES,
    Library,
    Messages,
    TensorInfo,
    bindings,
    check_tensors,
    dtype_names,
    version,
)
from pw_engines.tensorrt.plan_file import PlanFacts, append_facts
from pw_engines.tensorrt.request import REFUSED, Request


def build_plan(request: Request, on_phase: Callable[[str], None] = lambda phase: None) -> list[str]:
    """Build and write a plan; return notes for the user. Raises EngineError quoting TensorRT.

    `on_phase` is called with the name of each phase that begins, by TensorRT for RTX alone.
    """
    library = LIBRARIES[request.library]
    trt = bindings(library)
    messages = Messages(trt)
    name = request.spec.segment
    try:
        builder = trt.Builder(messages.logger)
    except TypeError as error:  # raised by the package where there is no builder
        failure = f"{library.title} {trt.__version__} cannot start on this device"
        raise messages.error(failure) from error
    network = messages.need(builder.create_network(_network_flags(trt, library)), "no network")
    _parse(trt, network, request, messages)
    check_tensors(request.spec, _tensors(trt, network), "the ONNX model")

    config = messages.need(builder.create_builder_config(), "no builder configuration")
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, library.workspace)
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: fp32 would not be fp32
    config.max_aux_streams = 0  # everything on the caller's stream, as a CUDA graph needs it
    _set_profile(builder, network, config, request.spec, messages, library)
    _set_targets(trt, config, request.targets)
    if request.targets:
        config.progress_monitor = _monitor(trt, on_phase)
    notes = _use_timing_cache(config, request.timing_cache, messages)

    for_targets = f" for {', '.join(request.targets)}" if request.targets else ""
    plan = messages.need(
        builder.build_serialized_network(network, config),
        f"{library.title} {trt.__version__} cannot build {name}{for_targets}",
    )
    with request.plan.open("wb") as file:
        file.write(plan)
    if request.targets:
        append_facts(request.plan, PlanFacts(scratch=messages.scratch))
    if request.timing_cache is not None:
        _save_timing_cache(config, request.timing_cache, messages)
    return notes


def _set_targets(trt: Any, config: Any, targets: Sequence[str]) -> None:
    """Compile for GPU architectures instead of the GPU of this machine."""
    if not targets:
        return
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        name = target.replace("_", "").upper()
        config.set_compute_capability(trt.ComputeCapability.__members__[name], index)
    # The plan asks for its scratch memory once and for all, and never allocates in a call.
    config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def _monitor(trt: Any, on_phase: Callable[[str], None]) -> Any:
    """Return an object that the builder tells about its phases."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the package has no annotations
        """Called by the builder, from any of its threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """Pass on the name."""
            on_phase(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Let the build go on: it is ended by killing its process."""
            # why not False: most of a build is one phase without steps, which would not end
            return True

        def phase_finish(self, phase_name: str) -> None:
            """Do nothing: the phase around it was reported when it began."""

    return Monitor()


def _network_flags(trt: Any, library: Library) -> int:
    """Request the types of the ONNX model: a flag before TensorRT 11, the only way elsewhere."""
    if library.targets or version(trt) >= (11, 0):
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _parse(trt: Any, network: Any, request: Request, messages: Messages) -> None:
    parser = trt.OnnxParser(network, messages.logger)
    if parser.parse(request.model.read_bytes()):
        return
    reasons = []
    for index in range(parser.num_errors):
        parser_error = parser.get_error(index)
        node = f"{parser_error.node_name()} ({parser_error.node_operator()})"
        reasons.append(f"node {node}: {parser_error.desc()}")
    title = LIBRARIES[request.library].title
    failure = f"{title} {trt.__version__} cannot read the ONNX model of {request.spec.segment}"
    raise messages.error("\n  ".join([failure, *reasons]))


def _tensors(trt: Any, network: Any) -> Iterator[TensorInfo]:
    names = dtype_names(trt)
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    for is_input, tensors in ((True, inputs), (False, outputs)):
        for tensor in tensors:
            yield TensorInfo(
                name=tensor.name,
                is_input=is_input,
                dtype=names.get(tensor.dtype, str(tensor.dtype)),
                shape=tuple(tensor.shape),
            )


def _set_profile(
    builder: Any,
    network: Any,
    config: Any,
    spec: EngineSpec,
    messages: Messages,
    library: Library,
) -> None:
    """Give named dimensions that are still open every size up to the limits of the spec.

    A library without targets gets the limits alone: callers pad.
    """
    limits = dict(spec.limits)
    smallest = dict.fromkeys(limits, SMALLEST) if library.targets else limits
    shapes = {x.name: x.sized(limits) for x in spec.inputs}
    least = {x.name: x.sized(smallest) for x in spec.inputs}
    profile = messages.need(builder.create_optimization_profile(), "no optimization profile")
    has_dynamic_shapes = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 in tuple(tensor.shape):
            shape = shapes[tensor.name]
            profile.set_shape(tensor.name, least[tensor.name], shape, shape)
            has_dynamic_shapes = True
    if has_dynamic_shapes and config.add_optimization_profile(profile) < 0:
        raise messages.error(f"TensorRT does not take the sizes of {spec.segment}: {shapes}")


def _use_timing_cache(config: Any, path: Path | None, messages: Messages) -> list[str]:
    """Give the builder the timings of earlier builds; a cache that it rejects is replaced."""
    if path is None:
        return []
    notes = []
    if path.exists():
        cache = config.create_timing_cache(path.read_bytes())
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return []
        notes.append(f"timing cache {path} is for another device or version: starting a new one")
    failure = "TensorRT cannot create a timing cache"
    cache = messages.need(config.create_timing_cache(b""), failure)
    messages.need(config.set_timing_cache(cache, ignore_mismatch=False), failure)
    return notes


def _save_timing_cache(config: Any, path: Path, messages: Messages) -> None:
    failure = "TensorRT cannot serialise its timing cache"
    cache = messages.need(config.get_timing_cache(), failure)
    data = messages.need(cache.serialize(), failure)
    partial = path.with_name(f".{path.name}-{os.getpid()}")  # other builds may write too
    try:
        with partial.open("wb") as file:
            file.write(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def main() -> int:
    """Build what the request file, the first argument, describes; print notes and phases."""
    end_with_parent()
    request = Request.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if request.device is not None:
        torch.cuda.set_device(request.device)
    try:
        with os.fdopen(int(sys.argv[2]), "w", encoding="utf-8", buffering=1) as phases:
            notes = build_plan(request, lambda phase: print(phase, file=phases))
    except (EngineError, OSError) as error:
        print(error, file=sys.stderr)
        return REFUSED
    for note in notes:
        print(note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
