# SPDX-License-Identifier: Apache-2.0
"""The names of TensorRT that our code uses, and the versions that have them.

    python tests/engines/tensorrt/names.py

Read from the source: what hangs on `trt`, and what is asked of a variable that our code names
for a class of TensorRT (RECEIVERS). The simulator finds out what this would overlook.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
SOURCES = sorted((ROOT / "engines/pw_engines/tensorrt").glob("*.py"))
MANIFEST = Path(__file__).with_name("manifest.json")
RTX_MANIFEST = Path(__file__).with_name("manifest_rtx.json")
# Where the code asks which library it has: names that only one of them needs.
RTX_ONLY = frozenset(
    {
        "BuilderFlag.REQUIRE_USER_ALLOCATION",
        "ComputeCapability.__members__",
        "CudaGraphStrategy.DISABLED",
        "DynamicShapesKernelSpecializationStrategy.EAGER",
        "EngineValidity.INVALID",
        "IBuilderConfig.num_compute_capabilities",
        "IBuilderConfig.progress_monitor",
        "IBuilderConfig.set_compute_capability",
        "IBuilderConfig.set_flag",
        "ICudaEngine.create_runtime_config",
        "IProgressMonitor",
        "IProgressMonitor.__init__",
        "IRuntimeCache.deserialize",
        "IRuntimeCache.serialize",
        "IRuntimeConfig.create_runtime_cache",
        "IRuntimeConfig.cuda_graph_strategy",
        "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
        "IRuntimeConfig.set_execution_context_allocation_strategy",
        "IRuntimeConfig.set_runtime_cache",
        "Runtime.get_engine_validity",
    }
)
RECEIVERS = {
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "parser_error": "ParserError",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "runtime_cache": "IRuntimeCache",
    "runtime_config": "IRuntimeConfig",
    "tensor": "ITensor",
}
# Used, though no attribute of ours says so: TensorRT calls the one, files are written from the
# other, and shapes are read as tuples.
UNNAMED = ("ILogger.log", "IHostMemory", "Dims.__len__", "Dims.__getitem__")


def used(sources: Iterable[Path] = SOURCES) -> dict[str, list[str]]:
    """Where each name is used: "IBuilderConfig.set_flag" -> ["onnx_build.py:112"]."""
    uses: dict[str, list[str]] = {name: [] for name in UNNAMED}
    for path in sources:
        tree = ast.parse(path.read_text())
        inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and id(node) not in inner:
                name = _resolve(node)
                if name is not None:
                    is_class = id(node) in called and "." not in name
                    place = f"{path.name}:{node.lineno}"
                    uses.setdefault(name + ".__init__" * is_class, []).append(place)
    return dict(sorted(uses.items()))


def _resolve(node: ast.Attribute) -> str | None:
    """The name behind `trt.A.B`, `self._context.name`, ...; None for what is not TensorRT's."""
    parts: list[str] = []
    at: ast.expr = node
    while isinstance(at, ast.Attribute):
        parts.append(at.attr)
        at = at.value
    if not isinstance(at, ast.Name):
        return None
    parts = [at.id, *reversed(parts)]
    if "trt" in parts[:-1]:
        return ".".join(parts[parts.index("trt") + 1 :])
    receiver = RECEIVERS.get(parts[-2].lstrip("_"))
    return f"{receiver}.{parts[-1]}" if receiver else None


def manifest() -> dict[str, dict[str, Any]]:
    """The committed one: version -> name -> signatures, or what kind of name it is."""
    return json.loads(MANIFEST.read_text(encoding="utf-8"))


def rtx_manifest() -> dict[str, dict[str, Any]]:
    """The same of TensorRT for RTX."""
    return json.loads(RTX_MANIFEST.read_text(encoding="utf-8"))


def table() -> str:
    """One line per name: the versions that have it, those of TensorRT for RTX last."""
    versions = manifest() | rtx_manifest()
    names = used()
    width = max(map(len, names))
    lines = [" ".join([f"{'name':{width}}", *(f"{version:>10}" for version in versions)])]
    for name in names:
        marks = (f"{'yes' if name in known else '-':>10}" for known in versions.values())
        lines.append(" ".join([f"{name:{width}}", *marks]))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
