# SPDX-License-Identifier: Apache-2.0
"""On what and with what a result was measured; the envelope of every result is made here."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

import av
import torch

from pw_bench.measure.commit import commit, is_dirty
from pw_bench.measure.nvml import Nvml
from pw_bench.results import Ceilings, Identity, Kind, Result
from pw_kernels.op import OPS, select
from pw_runtime.system.machine import describe


def identify(device: torch.device, nvml: Nvml) -> Identity:
    """This machine and checkout, before the command does anything else. Takes seconds.

    Args:
        device: that is measured.
        nvml: of its GPU.
    """
    gpu = device.type == "cuda"
    return Identity(
        machine=describe(),
        commit=commit().removesuffix("-dirty"),
        dirty=is_dirty(),
        threads=torch.get_num_threads(),
        load_average=os.getloadavg()[0],
        weights={},
        engines={},
        operations={name: select(name, device) for name in sorted(OPS)},
        libraries=libraries(),
        gpu_start=nvml.state() if gpu else None,
        nvml=nvml.reason if gpu else "",
    )


def libraries() -> dict[str, str]:
    """Versions of what the packages bring with them or were built for."""
    found = {"FFmpeg": av.ffmpeg_version_info, "CUDA": torch.version.cuda}
    cudnn = torch.backends.cudnn.version()
    found["cuDNN"] = None if cudnn is None else str(cudnn)
    return {name: version for name, version in found.items() if version}


def envelope(
    kind: Kind, scope: Mapping[str, str], identity: Identity, ceilings: Ceilings, nvml: Nvml
) -> Result:
    """A result without figures, of what has just been measured by this command."""
    if identity.gpu_start is not None:
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
