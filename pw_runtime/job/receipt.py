# SPDX-License-Identifier: Apache-2.0
"""The receipt beside every clip: what made it, with what, in which time and memory."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from pw_kernels.launcher import tally
from pw_runtime.errors import BadRequest
from pw_runtime.system.atomic_files import write_text
from pw_runtime.system.input_files import UnreadableInput, read_json
from pw_runtime.system.machine import cpu_model

FORMAT: Final = 2
VERSIONED = ("pixelwizard-runtime", "torch", "tokenizers", "safetensors", "av")


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Content of `<id>.json`. Bump `format` when the meaning of a field changes."""

    prompt: dict[str, Any]
    negative: str
    seeds: dict[str, int]
    noise: dict[str, str]  # SHA-256 of each stage's initial noise
    noise_file: str | None
    preset: dict[str, Any]
    passes: dict[str, list[str]]  # of each stage's transformer: cond, uncond or both
    options: dict[str, Any]
    exactness: dict[str, Any]  # label, and why; absent in older files
    bundle: dict[str, str]
    video: dict[str, Any]  # name, bytes and SHA-256 of the file; the last is absent in older files
    tiling: dict[str, Any]  # of the decode, as it ran; absent in older files
    seconds: dict[str, float]
    engines: dict[str, dict[str, str]]  # network -> backend and reason
    notices: list[str]
    fallbacks: list[str]  # the notices about what was computed in another way than planned
    versions: dict[str, str]
    machine: dict[str, str | int]  # what else decides the last bits: docs/numerics.md
    # Absent where another run than the one that made the latents finished the clip: that run's
    # figures are then in `finished_from_latents`.
    peak_memory_bytes: dict[str, int] | None
    plan: dict[str, Any] | None  # decisions; by stage predicted and measured peaks, in bytes
    kernel_launches: dict[str, dict[str, int]] | None  # kernel -> library or jit -> so far
    finished_from_latents: dict[str, Any] | None = None
    sources: dict[str, Any] | None = None  # picture or video that the clip starts from: SHA-256
    loras: dict[str, Any] | None = None  # network -> file, SHA-256 and scale of each
    latents: dict[str, str | int] | None = None  # the file, where it was kept; as for the video
    format: int = FORMAT


_ABSENT_IF_NONE = (
    "peak_memory_bytes",
    "plan",
    "kernel_launches",
    "finished_from_latents",
    "sources",
    "loras",
    "latents",
)


def write_receipt(receipt: Receipt, path: Path) -> None:
    """Write the receipt as JSON. Raises WriteFailed."""
    content = asdict(receipt)
    for name in _ABSENT_IF_NONE:
        if content[name] is None:
            del content[name]
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


# Fields that all formats have, and their types in JSON.
_STORED: Final[dict[str, type | tuple[type, ...]]] = {
    "prompt": dict,
    "negative": str,
    "seeds": dict,
    "noise": dict,
    "noise_file": (str, type(None)),
    "preset": dict,
    "options": dict,
    "bundle": dict,
    "video": dict,
    "seconds": dict,
    "engines": dict,
    "notices": list,
    "versions": dict,
}


def read_receipt(
    path: Path, do: str = "make the clip again with --overwrite, or remove the receipt"
) -> dict[str, Any]:
    """Return the content of a receipt, its fields of the right types.

    Args:
        path: of the receipt.
        do: what the user can do where it is none.

    Raises BadRequest where it is damaged, none, or of a later version.
    """
    try:
        content = read_json(path)
        version = content.get("format") if isinstance(content, dict) else None
        if not isinstance(version, int) or not 1 <= version <= FORMAT:
            raise UnreadableInput(f"format {str(version)[:20]}")
        for name, kind in _STORED.items():
            if not isinstance(content.get(name, ...), kind):
                raise UnreadableInput(f"no usable {name!r}")
    except UnreadableInput as error:
        raise BadRequest(
            f"{path} is not the receipt of a clip",
            got=error,
            wanted=f"a receipt of `pw generate`, format 1 to {FORMAT}",
            do=do,
        ) from error
    return content


def kernel_launches() -> dict[str, dict[str, int]]:
    """Count the launches of each of our kernels, from the compiled library and by Triton."""
    launches: dict[str, dict[str, int]] = {}
    for (kernel, launcher), count in sorted(tally.items()):
        launches.setdefault(kernel, {})[launcher] = count
    return launches


def machine(device: torch.device) -> dict[str, str | int]:
    """Describe what the rounding of a result depends on, beside versions and options."""
    facts: dict[str, str | int] = {
        "processor": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),  # of PyTorch's own kernels
        "threads": torch.get_num_threads(),
    }
    limits = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_CBWR")
    facts |= {name: value for name in limits if (value := os.environ.get(name))}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["tf32"] = torch.backends.cudnn.allow_tf32
    return facts


def versions() -> dict[str, str]:
    """Return the versions of what took part in a run."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "running from source"
    found["torch"] = str(torch.__version__)  # with its build, which the metadata may not name
    return found
