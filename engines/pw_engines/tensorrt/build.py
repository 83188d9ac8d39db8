# SPDX-License-Identifier: Apache-2.0
"""The building of a TensorRT plan, in a process of its own.

    python -m pw_engines.tensorrt.build REQUEST.json

A builder takes gigabytes, and a system that runs out of memory kills it: its caller
(`pw_engines.tensorrt.build`) lives on and says so.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from pw_engines.engine import EngineError
from pw_engines.spec import EngineSpec, TensorSpec
from pw_engines.tensorrt.library import (
    Found,
    Messages,
    bindings,
    check_tensors,
    dtype_names,
    version,
)

REFUSED: Final = 3  # exit code where standard error is the message of an EngineError
WORKSPACE: Final = 8 << 30  # bytes that one tactic may take; the default is the whole GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to build from what."""

    spec: EngineSpec
    onnx: Path
    plan: Path  # to write
    device: int | None  # CUDA device; None for the process's default
    timing_cache: Path | None = None

    def to_json(self) -> str:
        """The request as text."""
        return json.dumps(asdict(self), default=str)

    @staticmethod
    def from_json(text: str) -> Request:
        """The request that was written as `text`."""
        data = json.loads(text)
        cache = data["timing_cache"]
        return Request(
            spec=spec_of(data["spec"]),
            onnx=Path(data["onnx"]),
            plan=Path(data["plan"]),
            device=data["device"],
            timing_cache=None if cache is None else Path(cache),
        )


def spec_of(data: dict[str, Any]) -> EngineSpec:
    """The spec that was written as JSON."""
    tensors = {
        name: tuple(TensorSpec(**{**one, "shape": tuple(one["shape"])}) for one in data[name])
        for name in ("inputs", "outputs")
    }
    pairs = {name: tuple(map(tuple, data[name])) for name in ("limits", "numbers")}
    return EngineSpec(**{**data, **tensors, **pairs})


def build_plan(request: Request) -> list[str]:
    """Build and write a plan; give what the caller's user should know.

    Raises EngineError with the words of TensorRT.
    """
    trt = bindings()
    messages = Messages(trt)
    name = request.spec.segment
    try:
        builder = trt.Builder(messages.logger)
    except TypeError as error:  # the package's way of saying that there is no builder
        raise messages.error(f"TensorRT {trt.__version__} cannot start on this device") from error
    network = messages.need(builder.create_network(_network_flags(trt)), "no network")
    _parse(trt, network, request, messages)
    check_tensors(request.spec, _tensors(trt, network), "the ONNX model")

    config = messages.need(builder.create_builder_config(), "no builder configuration")
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: fp32 would not be fp32
    config.max_aux_streams = 0  # everything on the caller's stream, as a CUDA graph wants it
    _set_profile(builder, network, config, request.spec, messages)
    notes = _use_timing_cache(config, request.timing_cache, messages)

    plan = messages.need(
        builder.build_serialized_network(network, config),
        f"TensorRT {trt.__version__} cannot build {name}",
    )
    with request.plan.open("wb") as file:
        file.write(plan)
    if request.timing_cache is not None:
        _save_timing_cache(config, request.timing_cache, messages)
    return notes


def _network_flags(trt: Any) -> int:
    """Types are those of the ONNX model: asked for before TensorRT 11, the only way since."""
    if version(trt) >= (11, 0):
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _parse(trt: Any, network: Any, request: Request, messages: Messages) -> None:
    parser = trt.OnnxParser(network, messages.logger)
    if parser.parse(request.onnx.read_bytes()):
        return
    reasons = []
    for index in range(parser.num_errors):
        fault = parser.get_error(index)
        reasons.append(f"node {fault.node_name()} ({fault.node_operator()}): {fault.desc()}")
    what = f"TensorRT {trt.__version__} cannot read the ONNX model of {request.spec.segment}"
    raise messages.error("\n  ".join([what, *reasons]))


def _tensors(trt: Any, network: Any) -> Iterator[Found]:
    names = dtype_names(trt)
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    for is_input, tensors in ((True, inputs), (False, outputs)):
        for tensor in tensors:
            yield Found(
                name=tensor.name,
                is_input=is_input,
                dtype=names.get(tensor.dtype, str(tensor.dtype)),
                shape=tuple(tensor.shape),
            )


def _set_profile(
    builder: Any, network: Any, config: Any, spec: EngineSpec, messages: Messages
) -> None:
    """Fix what varies in the ONNX model at the limits of the spec: callers pad."""
    shapes = {one.name: one.sized(dict(spec.limits)) for one in spec.inputs}
    profile = messages.need(builder.create_optimization_profile(), "no optimization profile")
    varying = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 in tuple(tensor.shape):
            shape = shapes[tensor.name]
            profile.set_shape(tensor.name, shape, shape, shape)
            varying = True
    if varying and config.add_optimization_profile(profile) < 0:
        raise messages.error(f"TensorRT does not take the sizes of {spec.segment}: {shapes}")


def _use_timing_cache(config: Any, path: Path | None, messages: Messages) -> list[str]:
    """Give the builder what earlier builds measured; a cache it refuses is started anew."""
    if path is None:
        return []
    notes = []
    if path.exists():
        cache = config.create_timing_cache(path.read_bytes())
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return []
        notes.append(f"timing cache {path} is of another device or version: started anew")
    failure = "TensorRT cannot make a timing cache"
    cache = messages.need(config.create_timing_cache(b""), failure)
    messages.need(config.set_timing_cache(cache, ignore_mismatch=False), failure)
    return notes


def _save_timing_cache(config: Any, path: Path, messages: Messages) -> None:
    failure = "TensorRT cannot give its timing cache"
    cache = messages.need(config.get_timing_cache(), failure)
    data = messages.need(cache.serialize(), failure)
    building = path.with_name(f".{path.name}-{os.getpid()}")  # other builds may write too
    try:
        with building.open("wb") as file:
            file.write(data)
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)


def main() -> int:
    """Build what the file named by the first argument asks for; prints notes."""
    request = Request.from_json(Path(sys.argv[1]).read_text())
    if request.device is not None:
        torch.cuda.set_device(request.device)
    try:
        notes = build_plan(request)
    except (EngineError, OSError) as error:
        print(error, file=sys.stderr)
        return REFUSED
    for note in notes:
        print(note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
