# SPDX-License-Identifier: Apache-2.0
"""Every segment through the real torch-tensorrt, as far as that goes without a GPU.

    python tests/engines/tensorrt/coverage.py FOLDER

FOLDER holds `torch_tensorrt/` without its `lib`, and `tensorrt_bindings/` of the TensorRT that
fits, both of unpacked wheels. The program is lowered by torch-tensorrt itself; then every operator
must have a converter. Prints as JSON, by segment, those that have none.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch

from pw_engines.tensorrt import torch_tensorrt
from pw_engines.tensorrt.request import Request
from pw_engines.tensorrt.torch_tensorrt_build import settings
from pw_runtime.execution.transformer_segments import Segment, segments_of
from tests.engines.tensorrt.bindings import load
from tests.engines.test_segments import HIGHRES

CPU = torch.device("cpu")


def front_end(folder: Path) -> Any:
    """Import the package: it asks torch.cuda for a GPU when it is imported."""
    sys.modules["tensorrt"] = load(folder)
    torch.cuda.get_device_capability = lambda *device: (9, 0)
    torch.cuda.get_device_name = lambda *device: "none"
    torch.cuda.current_device = lambda: 0
    if not hasattr(torch._C, "_CudaDeviceProperties"):
        torch._C._CudaDeviceProperties = type("_CudaDeviceProperties", (), {})
    import torch_tensorrt

    return torch_tensorrt


def without_converter(front: Any, segment: Segment) -> list[str]:
    """Operators of a segment that torch-tensorrt cannot convert; the inputs keep their names."""
    from torch_tensorrt.dynamo import _compiler as compiler
    from torch_tensorrt.dynamo._settings import CompilationSettings
    from torch_tensorrt.dynamo.conversion._ConverterRegistry import DYNAMO_CONVERTERS

    request = Request(spec=segment.spec, model=Path(), plan=Path("plan"), device=None)
    keywords = settings(front, request)
    assert len(compiler.prepare_inputs(keywords.pop("arg_inputs"))) == len(segment.spec.inputs)
    keywords.pop("device")  # of the GPU that is not there
    compilation_settings = CompilationSettings(**keywords)
    program = torch_tensorrt.export(segment.spec, segment.module, CPU)
    names = list(program.graph_signature.user_inputs)
    program = compiler.pre_export_lowering(program, compilation_settings)
    program = program.run_decompositions(compiler.get_decompositions(False, True, False))
    lowered = compiler.post_lowering(program.module(), compilation_settings)
    DYNAMO_CONVERTERS.set_compilation_settings(compilation_settings)
    assert [node.target for node in lowered.graph.find_nodes(op="placeholder")] == names
    return sorted(
        {
            str(node.target)
            for node in lowered.graph.nodes
            if node.op.startswith("call") and DYNAMO_CONVERTERS.get(node) is None
        }
    )


def main() -> None:
    """Print what has no converter."""
    warnings.simplefilter("ignore")
    front = front_end(Path(sys.argv[1]))
    segments = segments_of(HIGHRES, "bf16", 64)
    print(
        json.dumps({name: without_converter(front, segment) for name, segment in segments.items()})
    )


if __name__ == "__main__":
    main()
