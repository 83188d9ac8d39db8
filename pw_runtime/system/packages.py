# SPDX-License-Identifier: Apache-2.0
"""Python packages that this project needs: declared by its metadata, installed or missing.

Imports the standard library alone: it reports where everything else is missing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from pw_runtime.errors import MissingPackage

DISTRIBUTION: Final = "pixelwizard-runtime"
BASE: Final = ""  # the group of packages that are installed with the project
DEVELOPMENT: Final = "dev"  # the extra of the project's own checks


@dataclass(frozen=True, slots=True)
class Known:
    """Facts about a package that its own metadata lacks."""

    module: str
    disables: str  # what is lost without it
    pip: str = ""  # options that its installation needs


KNOWN: Final[Mapping[str, Known]] = MappingProxyType(
    {
        "torch": Known("torch", "everything but `pw doctor`"),
        "numpy": Known("numpy", "everything but `pw doctor`"),
        "safetensors": Known("safetensors", "reading and writing weights"),
        "tokenizers": Known("tokenizers", "reading prompts: pw generate"),
        "ftfy": Known("ftfy", "cleaning prompts: pw generate"),
        "av": Known("av", "reading and writing videos: pw generate, decode, compare"),
        "click": Known("click", "the command line"),
        "rich": Known("rich", "progress and tables"),
        "pydantic": Known("pydantic", "reading bundles, presets and prompt files"),
        "pillow": Known("PIL", "contact sheets"),
        "triton": Known("triton", "--kernels triton, where no compiled library is installed"),
        "nvidia-ml-py": Known("pynvml", "the driver's version in reports"),
        "onnx": Known("onnx", "pw build --onnx-only, and engines by TensorRT"),
        "onnxscript": Known("onnxscript", "pw build --onnx-only, and engines by TensorRT"),
        "openvino": Known("openvino", "engines by OpenVINO on a CPU; AOTInductor's remain"),
        "tensorrt": Known("tensorrt", "engines by TensorRT; pw build uses AOTInductor"),
        "torch-tensorrt": Known(
            "torch_tensorrt", "pw build --frontend torch-tensorrt; ONNX remains"
        ),
        "tensorrt-rtx-cu13-bindings": Known("tensorrt_rtx_bindings", "pw build --target"),
        "tensorrt-rtx-cu13-libs": Known("tensorrt_rtx_libs", "pw build --target"),
        "grpcio": Known("grpc", "pw fleet run --address ray://"),
        "ray": Known("ray", "pw fleet run"),
        "fastapi": Known("fastapi", "pw serve"),
        "prometheus-client": Known("prometheus_client", "pw serve"),
        "python-multipart": Known("python_multipart", "pw serve"),
        "sqlalchemy": Known("sqlalchemy", "pw serve"),
        "uvicorn": Known("uvicorn", "pw serve"),
        "jinja2": Known("jinja2", "pw bench report"),
        "scikit-image": Known("skimage", "pw compare, pw bench e2e, pw bench quality"),
        "scipy": Known("scipy", "pw bench compare, and scikit-image"),
        "transformers": Known("transformers", "pw bench e2e beside the official recipe"),
        "flash-attn": Known("flash_attn", "--attention flash-attn", "--no-build-isolation "),
    }
)
UNDECLARED: Final = ("flash-attn",)  # only adds speed, and in no extra: it is compiled for hours


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One Python package: no version means missing, `broken` says why its import fails."""

    name: str
    version: str | None
    broken: str | None = None


def declared() -> dict[str, dict[str, str]]:
    """Return what the project's metadata declares: requirements by name, by group.

    The first group is BASE, the others are extras. An extra that names another one has its
    packages. Where the project is not installed, the pyproject.toml of the checkout is read.
    """
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        lines = _lines_of_checkout()
    groups: dict[str, dict[str, str]] = {BASE: {}}
    nested: list[tuple[str, list[str]]] = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        requirement = requirement.strip()
        extra = re.search(r"""extra\s*==\s*["']([\w.-]+)["']""", marker)
        group = groups.setdefault(extra[1] if extra else BASE, {})
        others = re.match(re.escape(DISTRIBUTION) + r"\[([^\]]*)\]", requirement)
        if others and extra:
            nested.append((extra[1], others[1].replace(" ", "").split(",")))
        else:
            group[re.split(r"[^\w.-]", requirement)[0]] = requirement
    for name, others_of in nested:
        for other in others_of:
            groups[name] |= groups.get(other, {})
    return groups


def _lines_of_checkout() -> list[str]:
    file = Path(__file__).parents[2] / "pyproject.toml"
    try:
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        return list(KNOWN)[: list(KNOWN).index("triton")]
    extras = project.get("optional-dependencies", {})
    return [
        *project["dependencies"],
        *(f"{line}; extra == '{name}'" for name, lines in extras.items() for line in lines),
    ]


def requirement_of(name: str) -> str:
    """Return what pip should be asked for to get a package in the range that was run."""
    for group in declared().values():
        if name in group:
            return group[name]
    return name


def pip_install(*names: str, again: bool = False) -> str:
    """Return the command that installs packages in the ranges that were run."""
    options = "--force-reinstall " if again else ""
    options += "".join(KNOWN[name].pip for name in names if name in KNOWN)
    return f"pip install {options}{' '.join(repr(requirement_of(name)) for name in names)}"


def module_of(name: str) -> str:
    """Return the module that a package is imported by."""
    return KNOWN[name].module if name in KNOWN else name.replace("-", "_")


def inspect_package(name: str) -> Package:
    """Look up a package's version and import it, to find out whether it works.

    An import may end the process: `pw doctor` does this in one of its own.
    """
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Package(name=name, version=None)
    if name == "openvino":  # whose import reports to an analytics service by this package
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        module = importlib.import_module(module_of(name))
    except Exception as error:  # whatever a package's import may raise is the finding
        broken = " ".join(f"{type(error).__name__}: {error}".split())
        return Package(name=name, version=version, broken=broken)
    if name == "torch":  # names its build ("2.14.1+cu130"); a wheel from PyPI does not
        version = str(module.__version__)
    return Package(name=name, version=version)


def require_packages(purpose: str, *names: str) -> None:
    """Raise MissingPackage, naming all that cannot be imported, before work begins that needs them.

    Args:
        purpose: subject of the message, such as "`pw compare`".
        names: of packages.
    """
    reasons: dict[str, ImportError] = {}
    for name in names:
        try:
            importlib.import_module(module_of(name))
        except ImportError as error:
            reasons[name] = error
    if reasons:
        raise MissingPackage(
            f"{purpose} needs {' and '.join(reasons)}",
            got="; ".join(str(error) for error in reasons.values()),
            do=pip_install(*reasons),
        )


def missing_package(error: ImportError) -> MissingPackage | None:
    """Return the error to show for a failed import; None where the fault is our own."""
    while isinstance(error.__cause__, ImportError):  # libraries hide the cause
        error = error.__cause__
    top = (error.name or "").partition(".")[0]
    if not top or top in sys.stdlib_module_names or top.startswith("pw_"):
        return None
    name = next((name for name, known in KNOWN.items() if known.module == top), top)
    installed = not isinstance(error, ModuleNotFoundError)
    return MissingPackage(
        f"the package {name} is {'broken' if installed else 'not installed'}",
        got=" ".join(str(error).split()),
        do=f"{pip_install(name, again=installed)}, then look at `pw doctor`",
    )
