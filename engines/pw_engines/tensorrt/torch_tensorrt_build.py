# SPDX-License-Identifier: Apache-2.0
"""Build a TensorRT plan with torch-tensorrt; `process` starts this program.

    python -m pw_engines.tensorrt.torch_tensorrt_build REQUEST.json

The whole program becomes one plan, or the build fails: operators that torch-tensorrt cannot convert
are listed, and never left to PyTorch. Plans use its names of inputs and outputs; they are matched
to ours by order, checked by dtype and shape, and stored in the plan's file.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from pw_engines.child import end_with_parent
from pw_engines.engine import EngineError
from pw_engines.spec import DTYPES
from pw_engines.tensorrt.engine import tensors_of
from pw_engines.tensorrt.library import KEPT, TENSORRT, Messages, bindings, match_by_order
from pw_engines.tensorrt.plan_file import PlanFacts, append_facts
from pw_engines.tensorrt.request import LOG, REFUSED, Request

CONVERT: Final = "convert_exported_program_to_serialized_trt_engine"
_WIDTH: Final = 300  # characters quoted of a line: some contain a whole graph
_UNSUPPORTED: Final = re.compile(r"^call_(?:function|method|module) (\S+)$", re.MULTILINE)


def settings(frontend: Any, request: Request) -> dict[str, Any]:
    """Return the settings for torch-tensorrt: an exact and whole plan, on the caller's stream.

    Raises EngineError where this version lacks a setting: it ignores unknown ones silently.
    """
    sizes = dict(request.spec.limits)
    requested = {
        "arg_inputs": [
            frontend.Input(tensor_spec.sized(sizes), dtype=DTYPES[tensor_spec.dtype])
            for tensor_spec in request.spec.inputs
        ],
        "device": torch.device("cuda", request.device or 0),
        "require_full_compilation": True,
        "disable_tf32": True,  # or fp32 would not be fp32
        "truncate_double": False,
        "max_aux_streams": 0,
        "workspace_size": TENSORRT.workspace,
        "immutable_weights": True,
        # As in the ONNX models. By default it takes a bias for a causal mask.
        "decompose_attention": True,
        "attn_bias_is_causal": False,
        # The default file is shared by all users of a machine and never cleaned up.
        "timing_cache_path": str(request.plan.with_name("timing.cache")),
        "cache_built_engines": False,
        "reuse_cached_engines": False,
    }
    known = inspect.signature(getattr(frontend.dynamo, CONVERT)).parameters
    unknown = [name for name in requested if name not in known]
    if unknown:
        raise EngineError(
            f"torch-tensorrt {frontend.__version__} has no setting {', '.join(unknown)}: "
            "use --frontend onnx"
        )
    if "use_explicit_typing" in known:  # before 2.13; the only way since
        requested["use_explicit_typing"] = True
    return requested


def build_plan(request: Request) -> None:
    """Build and write a plan with its names. Raises EngineError quoting torch-tensorrt."""
    frontend, trt = _frontend(), bindings()
    plan = _convert(frontend, request)
    messages = Messages(trt)
    source = f"the plan made by torch-tensorrt {frontend.__version__}"
    try:
        runtime = trt.Runtime(messages.logger)
    except TypeError as error:  # raised by the package where there is no runtime
        raise messages.error(f"TensorRT {trt.__version__} cannot start on this device") from error
    engine = messages.need(
        runtime.deserialize_cuda_engine(plan), f"TensorRT {trt.__version__} cannot open {source}"
    )
    names = match_by_order(request.spec, tensors_of(trt, engine), source)
    request.plan.write_bytes(plan)
    append_facts(request.plan, PlanFacts(names=names))


def _frontend() -> Any:
    """Import the package `torch_tensorrt`. Raises EngineError."""
    try:
        return importlib.import_module("torch_tensorrt")
    except (ImportError, OSError, RuntimeError) as error:  # also from its libraries
        raise EngineError(
            f"torch-tensorrt cannot be imported ({error}): install the one for this PyTorch and "
            "TensorRT, or use --frontend onnx"
        ) from error


def _convert(frontend: Any, request: Request) -> bytes:
    name = request.spec.segment
    failure = f"torch-tensorrt {frontend.__version__} cannot build {name}"
    keywords = settings(frontend, request)
    program = torch.export.load(request.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            plan = getattr(frontend.dynamo, CONVERT)(program, **keywords)
        except Exception as error:  # its converters may raise anything
            text = "\n".join(str(warning.message) for warning in caught)
            print(text, file=sys.stderr)
            unsupported = sorted(set(_UNSUPPORTED.findall(text)))
            reason = f"no converter for {', '.join(unsupported)}" if unsupported else _cause(error)
            raise EngineError(f"{failure}: {reason}") from error
    if not isinstance(plan, bytes) or not plan:
        raise EngineError(f"{failure}: expected a plan, got {type(plan).__name__}")
    return plan


def _cause(error: BaseException) -> str:
    """Return the first line of the root cause: outer exceptions quote whole graphs."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0][:_WIDTH]


@contextmanager
def redirected_to(path: Path) -> Iterator[None]:
    """Redirect standard output and error to a file, for Python and the libraries alike."""
    with path.open("ab") as file:
        copies = {number: os.dup(number) for number in (1, 2)}
        for number in copies:
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in copies.items():
                os.dup2(copy, number)
                os.close(copy)


def _last_lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line[:_WIDTH] for line in lines if line.strip()][-KEPT:]


def main() -> int:
    """Build what the request file, the first argument, describes."""
    end_with_parent()
    request = Request.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    log = request.plan.with_name(LOG)
    try:
        with redirected_to(log):
            if request.device is not None:
                torch.cuda.set_device(request.device)
            build_plan(request)
    except (EngineError, OSError) as error:
        print(error, *_last_lines(log), sep="\n  ", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
