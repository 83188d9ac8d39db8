# SPDX-License-Identifier: Apache-2.0
"""The building of a TensorRT plan by torch-tensorrt, in a process of its own.

    python -m pw_engines.tensorrt.torch_tensorrt_build REQUEST.json

The whole program becomes one plan, or nothing does: what torch-tensorrt cannot convert is named,
and never left to PyTorch. Plans have its names of inputs and outputs; which of ours each stands
for is found by their order, checked by dtype and shape, and written into the plan's file.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from pw_engines.engine import EngineError
from pw_engines.spec import DTYPES, EngineSpec
from pw_engines.tensorrt.build import REFUSED, WORKSPACE, spec_of
from pw_engines.tensorrt.engine import tensors_of
from pw_engines.tensorrt.library import KEPT, Messages, bindings, match_by_order
from pw_engines.tensorrt.plan_names import append_names
from pw_engines.tensorrt.process import HEARD

CONVERT: Final = "convert_exported_program_to_serialized_trt_engine"
_WIDTH: Final = 300  # characters of a line that is quoted: some hold a whole graph
_UNSUPPORTED: Final = re.compile(r"^call_(?:function|method|module) (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchRequest:
    """What to build from what."""

    spec: EngineSpec
    program: Path  # written by torch.export.save, of the limits of the spec
    plan: Path  # to write
    device: int | None  # CUDA device; None for the process's default

    def to_json(self) -> str:
        """The request as text."""
        return json.dumps(asdict(self), default=str)

    @staticmethod
    def from_json(text: str) -> TorchRequest:
        """The request that was written as `text`."""
        data = json.loads(text)
        return TorchRequest(
            spec=spec_of(data["spec"]),
            program=Path(data["program"]),
            plan=Path(data["plan"]),
            device=data["device"],
        )


def settings(frontend: Any, request: TorchRequest) -> dict[str, Any]:
    """What torch-tensorrt is asked for: an exact and whole plan, on the caller's stream.

    Raises EngineError where this version lacks a setting: it takes unknown ones without a word.
    """
    sizes = dict(request.spec.limits)
    asked = {
        "arg_inputs": [
            frontend.Input(one.sized(sizes), dtype=DTYPES[one.dtype]) for one in request.spec.inputs
        ],
        "device": torch.device("cuda", request.device or 0),
        "require_full_compilation": True,
        "disable_tf32": True,  # or fp32 would not be fp32
        "truncate_double": False,
        "max_aux_streams": 0,
        "workspace_size": WORKSPACE,
        "immutable_weights": True,
        # As in the ONNX models; and a bias is not taken for a causal mask, its default.
        "decompose_attention": True,
        "attn_bias_is_causal": False,
        # Its own is shared by all users of a machine, and not looked after.
        "timing_cache_path": str(request.plan.with_name("timing.cache")),
        "cache_built_engines": False,
        "reuse_cached_engines": False,
    }
    known = inspect.signature(getattr(frontend.dynamo, CONVERT)).parameters
    lacking = [name for name in asked if name not in known]
    if lacking:
        raise EngineError(
            f"torch-tensorrt {frontend.__version__} has no setting {', '.join(lacking)}: "
            "use --frontend onnx"
        )
    if "use_explicit_typing" in known:  # before 2.13; the only way since
        asked["use_explicit_typing"] = True
    return asked


def build_plan(request: TorchRequest) -> None:
    """Build and write a plan with its names. Raises EngineError with torch-tensorrt's words."""
    frontend, trt = _frontend(), bindings()
    plan = _convert(frontend, request)
    messages = Messages(trt)
    what = f"the plan that torch-tensorrt {frontend.__version__} made"
    try:
        runtime = trt.Runtime(messages.logger)
    except TypeError as error:  # the package's way of saying that there is no runtime
        raise messages.error(f"TensorRT {trt.__version__} cannot start on this device") from error
    engine = messages.need(
        runtime.deserialize_cuda_engine(plan), f"TensorRT {trt.__version__} cannot open {what}"
    )
    names = match_by_order(request.spec, tensors_of(trt, engine), what)
    request.plan.write_bytes(plan)
    append_names(request.plan, names)


def _frontend() -> Any:
    """The package `torch_tensorrt`."""
    try:
        return importlib.import_module("torch_tensorrt")
    except (ImportError, OSError, RuntimeError) as error:  # of its libraries, and of theirs
        raise EngineError(
            f"torch-tensorrt cannot be imported ({error}): install the one for this PyTorch and "
            "TensorRT, or use --frontend onnx"
        ) from error


def _convert(frontend: Any, request: TorchRequest) -> bytes:
    name = request.spec.segment
    failure = f"torch-tensorrt {frontend.__version__} cannot build {name}"
    asked = settings(frontend, request)
    program = torch.export.load(request.program)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            plan = getattr(frontend.dynamo, CONVERT)(program, **asked)
        except Exception as error:  # whatever its converters raise belongs to the build
            said = "\n".join(str(one.message) for one in warned)
            print(said, file=sys.stderr)
            unsupported = sorted(set(_UNSUPPORTED.findall(said)))
            reason = f"no converter for {', '.join(unsupported)}" if unsupported else _cause(error)
            raise EngineError(f"{failure}: {reason}") from error
    if not isinstance(plan, bytes) or not plan:
        raise EngineError(f"{failure}: it gave {type(plan).__name__} and no plan")
    return plan


def _cause(error: BaseException) -> str:
    """First line of what an exception came from: the outer ones quote whole graphs."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0][:_WIDTH]


@contextmanager
def heard_in(path: Path) -> Iterator[None]:
    """Send what this process writes to a file: Python's words and those of the libraries."""
    with path.open("ab") as file:
        kept = {number: os.dup(number) for number in (1, 2)}
        for number in kept:
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in kept.items():
                os.dup2(copy, number)
                os.close(copy)


def _last_lines(path: Path) -> list[str]:
    lines = path.read_text(errors="replace").splitlines()
    return [line[:_WIDTH] for line in lines if line.strip()][-KEPT:]


def main() -> int:
    """Build what the file named by the first argument asks for."""
    request = TorchRequest.from_json(Path(sys.argv[1]).read_text())
    heard = request.plan.with_name(HEARD)
    try:
        with heard_in(heard):
            if request.device is not None:
                torch.cuda.set_device(request.device)
            build_plan(request)
    except (EngineError, OSError) as error:
        print(error, *_last_lines(heard), sep="\n  ", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
