# SPDX-License-Identifier: Apache-2.0
"""Signatures of the real TensorRT bindings, read where there is neither TensorRT nor a GPU.

    python tests/engines/tensorrt/bindings.py FOLDER...      writes manifest.json
    python tests/engines/tensorrt/bindings.py                writes manifest_rtx.json


Each FOLDER holds `tensorrt_bindings/` of an unpacked wheel (pip download --no-deps
tensorrt-cu13-bindings==...). The bindings link nine functions of three libraries; tiny libraries
that define those and return null are made with the C compiler, so that the module loads. TensorRT
for RTX is read where it is installed: it loads without a GPU.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))  # for the program; tests have it

from pw_engines.tensorrt.library import RTX, bindings
from tests.engines.tensorrt.names import MANIFEST, RTX_MANIFEST, RTX_ONLY, used

LIBRARIES = {
    "libnvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRuntime_INTERNAL",
        "createInferRefitter_INTERNAL",
        "getPluginRegistry",
        "getBuilderPluginRegistry",
    ),
    "libnvonnxparser": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
    "libnvinfer_plugin": ("initLibNvInferPlugins",),
}
# Members that the code does not use but the simulator needs to be a whole.
NEEDED = (
    "DataType.INT32",
    "DataType.BOOL",
    "ExecutionContextAllocationStrategy.STATIC",
    "TensorIOMode.OUTPUT",
)
RTX_NEEDED = (
    "EngineValidity.VALID",
    "ILogger.Severity.INFO",
    "IProgressMonitor.phase_finish",
    "IProgressMonitor.phase_start",
    "IProgressMonitor.step_complete",
)


def version_of(folder: Path) -> str:
    """10.8.0.43 and so on."""
    text = (folder / "tensorrt_bindings" / "__init__.py").read_text()
    match = re.search(r"""__version__ = ["']([\d.]+)["']""", text)
    assert match, f"no version in {folder}"
    return match[1]


def load(folder: Path) -> Any:
    """Import the bindings of a folder into this process: one version per process."""
    major = version_of(folder).partition(".")[0]
    with tempfile.TemporaryDirectory() as folder_name:
        for library, functions in LIBRARIES.items():
            source = Path(folder_name, f"{library}.c")
            shared = Path(folder_name, f"{library}.so.{major}")
            stubs = (f"void *{name}(void) {{ return 0; }}\n" for name in functions)
            source.write_text("".join(stubs))
            linked = f"-Wl,-soname,{shared.name}"  # what has this soname is not looked for again
            subprocess.run(("cc", "-shared", "-fPIC", linked, "-o", shared, source), check=True)
            ctypes.CDLL(str(shared), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(folder))
    import tensorrt_bindings

    return tensorrt_bindings


def describe(trt: Any, name: str) -> Any:
    """Signatures of a method; "read-only", "read-write", "class" or "value" of what is none."""
    at, owner = trt, None
    for part in name.split("."):
        owner, at = at, getattr(at, part, None)
        if at is None:
            return None
    if isinstance(at, property):
        return "read-only" if at.fset is None else "read-write"
    if isinstance(at, type):
        return "class"
    if isinstance(owner, type) and callable(at):
        return signatures(at.__doc__ or "", name.rpartition(".")[2])
    return "value"


def signatures(text: str, name: str) -> list[str]:
    """The overloads that pybind11 puts at the beginning of a docstring."""
    lines = re.findall(rf"^(?:\d+\. )?({re.escape(name)}\(.*)$", text, re.MULTILINE)
    kept = [line for line in lines if "*args, **kwargs" not in line]
    return [re.sub(r"\b(?:tensorrt_\w+|tensorrt)\.|nvinfer1::", "", line) for line in kept]


def introspect(trt: Any, names: Iterable[str]) -> dict[str, Any]:
    """What a module has of some names."""
    described = {name: describe(trt, name) for name in sorted(names)}
    return {name: what for name, what in described.items() if what is not None}


def introspect_rtx() -> dict[str, Any]:
    """What the installed TensorRT for RTX has of the names that we use."""
    trt = importlib.import_module(RTX.modules[0])
    targets = (f"ComputeCapability.{name.replace('_', '').upper()}" for name in RTX.targets)
    return introspect(trt, {*used(), *NEEDED, *targets, *RTX_NEEDED})


def introspect_elsewhere(folder: Path) -> dict[str, Any]:
    """The same, in a process of its own."""
    command = (sys.executable, __file__, "--one", str(folder))
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    """Write a manifest, or print the part of one version."""
    if len(sys.argv) == 1:
        content = {str(bindings(RTX).__version__): introspect_rtx()}
        RTX_MANIFEST.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return
    if sys.argv[1] == "--one":
        names = {*used(), *NEEDED} - RTX_ONLY
        print(json.dumps(introspect(load(Path(sys.argv[2])), names)))
        return
    folders = {version_of(Path(name)): Path(name) for name in sys.argv[1:]}
    ordered = sorted(folders, key=lambda version: [int(part) for part in version.split(".")])
    names = {version: introspect_elsewhere(folders[version]) for version in ordered}
    MANIFEST.write_text(json.dumps(names, indent=1) + "\n")


if __name__ == "__main__":
    main()
