# SPDX-License-Identifier: Apache-2.0
"""A torch_tensorrt that records how it was called and gives a plan of the small segment.

The plan is one of the simulator (simulator.py), with the names that torch-tensorrt gives.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx

from tests.engines.tensorrt.segments import onnx_of, spec
from tests.engines.tensorrt.simulated import FAULT, MAGIC
from tests.engines.tensorrt.torch_tensorrt_api import FUNCTION, known

FITTING = "11.0.0.114"  # the TensorRT of torch-tensorrt 2.13
RECORD = "PW_FAKE_TORCH_TENSORRT"  # in the environment: a file for the keywords of the call
THEIRS = {"x": "inputs_0", "weight": "inputs_1", "bias": "inputs_2", "y": "output0"}


def plan_of(names: dict[str, str], *, width: int | None = None) -> bytes:
    """The plan of the small segment, its tensors renamed."""
    engine_spec = spec() if width is None else spec(width=width)
    model = onnx.load_model_from_string(onnx_of(engine_spec, fixed=True))
    graph = model.graph
    for tensor in (*graph.input, *graph.output):
        tensor.name = names[tensor.name]
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    content = {"version": FITTING, "model": model.SerializeToString().hex(), "shapes": {}}
    return MAGIC + json.dumps(content).encode()


def convert(program: Any, **keywords: Any) -> Any:
    """Convert as the real function, or fail as it does."""
    fault = os.environ.get(FAULT, "")
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if RECORD in os.environ:
        record = {"placeholders": list(program.graph_signature.user_inputs)}
        record |= {name: str(value) for name, value in keywords.items()}
        Path(os.environ[RECORD]).write_text(json.dumps(record))
    if fault == "unsupported":
        print("[TRT] [E] IBuilder: what TensorRT says itself", file=sys.stderr)
        warnings.warn(
            "Interpretation will fail due to missing operations \n"
            "call_function torch.ops.aten.special_i0e.default\n"
            "call_function torch.ops.aten.special_bessel_j0.default",
            stacklevel=2,
        )
        raise RuntimeError("Conversion of module GraphModule() not currently fully supported")
    if fault == "no engine":
        raise RuntimeError("While interpreting the module got an error") from AssertionError(
            "cuda_engine\nand a long graph"
        )
    if fault == "no bytes":
        return None
    return plan_of(THEIRS, width=8 if fault == "other sizes" else None)


def make(version: str) -> ModuleType:
    """The fake of a version: its function takes what the real one does, and no more."""
    names = [name for name in known()[version] if name != "**"]
    keyword_only = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names[1:]]
    first = inspect.Parameter(names[0], inspect.Parameter.POSITIONAL_OR_KEYWORD)

    def checked(program: Any, **keywords: Any) -> Any:
        assert keywords.keys() <= set(names), keywords.keys() - set(names)
        return convert(program, **keywords)

    checked.__signature__ = inspect.Signature([first, *keyword_only])  # type: ignore[attr-defined]
    module = ModuleType("torch_tensorrt")
    module.__version__ = version  # type: ignore[attr-defined]
    module.Input = lambda shape, dtype: (tuple(shape), dtype)  # type: ignore[attr-defined]
    module.dynamo = SimpleNamespace(**{FUNCTION: checked})  # type: ignore[attr-defined]
    return module
