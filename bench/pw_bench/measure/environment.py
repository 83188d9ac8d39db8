# SPDX-License-Identifier: Apache-2.0
"""Machine, sources and settings of a measurement, and the envelope of every result."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import av
import torch

from pw_bench.measure.nvml import Nvml
from pw_bench.results import Ceilings, Identity, Kind, Result
from pw_kernels.op import OPS, select
from pw_runtime.system.machine import describe

NO_CHECKOUT = "not a checkout"
_HERE = Path(__file__).parent


def identify(
    device: torch.device, nvml: Nvml | None = None, *, operations: Mapping[str, str] | None = None
) -> Identity:
    """Record machine and checkout, before the command does anything else. Takes seconds.

    Args:
        device: device under test.
        nvml: of that device; None where its state is not recorded.
        operations: operation -> implementation; None: not known yet, as are the engines.
    """
    gpu = nvml if device.type == "cuda" else None
    return Identity(
        machine=describe(),
        commit=commit().removesuffix("-dirty"),
        dirty=is_dirty(),
        threads=torch.get_num_threads(),
        load_average=os.getloadavg()[0],
        weights={},
        engines={},
        operations=operations or {},
        libraries=libraries(),
        gpu_start=None if gpu is None else gpu.state(),
        nvml="" if gpu is None else gpu.reason,
    )


def usual_operations(device: torch.device) -> dict[str, str]:
    """Return operation -> implementation where none is requested: in this process, not in clips."""
    return {name: select(name, device) for name in sorted(OPS)}


def commit() -> str:
    """Return the commit of these sources, with the suffix "-dirty" where files differ from it.

    Sources that were copied away from their history have the one that $PW_COMMIT states.
    """
    if stated := os.environ.get("PW_COMMIT"):
        return stated
    if not _git("ls-files", "--error-unmatch", Path(__file__).name):
        return NO_CHECKOUT  # perhaps installed into the environment of some other checkout
    return _git("describe", "--always", "--dirty") or NO_CHECKOUT


def is_dirty() -> bool:
    """Return True where tracked files differ from the commit, or this cannot be determined."""
    return commit().endswith("-dirty") or commit() == NO_CHECKOUT


def _git(*arguments: str) -> str:
    try:
        command = ("git", "-C", str(_HERE), *arguments)
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def libraries() -> dict[str, str]:
    """Return the versions of libraries that packages bundle or were built for."""
    versions = {"FFmpeg": av.ffmpeg_version_info, "CUDA": torch.version.cuda}
    cudnn = torch.backends.cudnn.version()
    versions["cuDNN"] = None if cudnn is None else str(cudnn)
    return {name: version for name, version in versions.items() if version}


def envelope(
    kind: Kind,
    scope: Mapping[str, str],
    identity: Identity,
    ceilings: Ceilings | None = None,
    nvml: Nvml | None = None,
) -> Result:
    """Return a result without figures, for what this command has just measured."""
    if identity.gpu_start is not None and nvml is not None:
        identity = replace(identity, gpu_end=nvml.state(), nvml=nvml.reason)
    return Result(
        kind=kind,
        when=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        command=shlex.join(["pw", *sys.argv[1:]]),
        scope=scope,
        identity=identity,
        ceilings=ceilings,
        figures=(),
        sides={},
    )
