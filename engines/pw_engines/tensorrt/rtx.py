# SPDX-License-Identifier: Apache-2.0
"""The backend TensorRT for RTX: plans for named GPU architectures, built on any machine.

The plan is compiled for one or several architectures ("targets"), with no GPU and no driver; its
kernels are finished on the user's GPU at the first run and kept in a runtime cache beside it.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch

from pw_engines.engine import EngineError, SegmentFunction, check_parity, require_parity
from pw_engines.onnx_recipe import RECIPE
from pw_engines.spec import EngineSpec, Platform
from pw_engines.tensorrt.engine import TensorrtEngine
from pw_engines.tensorrt.library import RTX, bindings
from pw_engines.tensorrt.onnx_rules import check_importable
from pw_engines.tensorrt.plan_file import read_facts
from pw_engines.tensorrt.process import build_in_process
from pw_engines.tensorrt.request import PLAN, Request

FILE: Final = PLAN


def target_of(device: torch.device) -> str:
    """Return the target of a GPU: "sm_89" for compute capability 8.9."""
    properties = torch.cuda.get_device_properties(device)
    return f"sm_{properties.major}{properties.minor}"


def cannot_build(targets: Sequence[str]) -> str | None:
    """Return why plans cannot be built for these targets, and what to do; None if they can."""
    unknown = [target for target in targets if target not in RTX.targets]
    if unknown:
        return (
            f"{RTX.title} has no target {', '.join(unknown)} for our networks, expected "
            f"{', '.join(RTX.targets)}: use --backend tensorrt for other GPUs"
        )
    try:
        bindings(RTX)
    except EngineError as error:
        return str(error)
    return None


def cannot_build_for(device: torch.device) -> str | None:
    """Return why plans cannot be built for a device, or, for a CPU, not for any GPU."""
    return cannot_build([target_of(device)] if device.type == "cuda" else [])


def default_targets(device: torch.device) -> tuple[str, ...]:
    """Return the targets to build for where none are named: the GPU's, or else all."""
    return (target_of(device),) if device.type == "cuda" else RTX.targets


def cannot_run(device: torch.device) -> str | None:
    """Return why plans cannot be run on `device`, and what to do; None if they can."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"{RTX.title} runs on NVIDIA GPUs, got the device {device}"
    if target_of(device) not in RTX.targets:
        return f"{RTX.title} does not run on this GPU ({target_of(device)})"
    return cannot_build(())


def target_platform(targets: Sequence[str]) -> Platform:
    """Describe what a plan for these targets depends on. Raises EngineError without the library."""
    facts = {
        "tensorrt-rtx": bindings(RTX).__version__,
        "torch": torch.__version__,  # which made the model that was compiled
        "recipe": RECIPE,
        "targets": " ".join(sorted(targets, key=RTX.targets.index)),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    return tuple(sorted(facts.items()))


def targets_of(platform: Platform) -> tuple[str, ...]:
    """Return the targets of plans for a platform."""
    return tuple(dict(platform)["targets"].split())


def platforms_for(device: torch.device) -> list[Platform]:
    """List the platforms whose plans run on a GPU: those with its target, the fewest first.

    A plan for fewer targets takes less scratch memory. None run on a CPU.
    """
    return [] if cannot_run(device) is not None else platforms_of(target_of(device))


def platforms_of(own: str) -> list[Platform]:
    """List the platforms whose plans run on a target, the fewest targets first."""
    others = [target for target in RTX.targets if target != own]
    return [
        target_platform((own, *more))
        for count in range(len(RTX.targets))
        for more in itertools.combinations(others, count)
    ]


def build(
    spec: EngineSpec,
    onnx: bytes,
    path: Path,
    targets: Sequence[str],
    say: Callable[[str], None] = print,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> None:
    """Build the plan `path` of a segment, in a process of its own.

    Args:
        spec: of the segment; the plan has every size of its named dimensions up to the limits.
        onnx: the model; its inputs and outputs have the names of the spec.
        path: to write.
        targets: GPU architectures, of `RTX.targets`.
        say: called with lines for the user, the estimate first.
        on_phase: called with the name of each phase of the build that begins.

    Raises:
        EngineError: the model cannot be imported, the library refuses it, or the build was killed.
    """
    check_importable(onnx, weights_inside=spec.weights is not None)

    def prepare(folder: Path) -> Request:
        request = Request(
            spec=spec,
            model=folder / "model.onnx",
            plan=folder / PLAN,
            device=None,
            library="tensorrt-rtx",
            targets=tuple(targets),
        )
        request.model.write_bytes(onnx)
        return request

    build_in_process(spec, "pw_engines.tensorrt.onnx_build", prepare, path, say, RTX, on_phase)


def scratch_of(path: Path) -> int:
    """Return the bytes of scratch memory that a plan's calls take, as its builder said."""
    return read_facts(path).scratch or 0


def check_first_run(opened: TensorrtEngine, segment: SegmentFunction, device: torch.device) -> None:
    """Compare an engine with its segment where no kernels of an earlier run are kept.

    It may have been built where it could not run. The kernels that are finished meanwhile are kept
    if it agrees.

    Raises:
        EngineError: it does not compute what its segment does.
    """
    kernels = opened.kernels
    if kernels is None or kernels.loaded:
        return
    with torch.inference_mode():
        require_parity(opened.spec.segment, check_parity(opened, segment, device))
    kernels.save()


def load(spec: EngineSpec, path: Path, device: torch.device) -> TensorrtEngine:
    """Open a plan that the store has verified.

    Raises EngineError where the plan is not for this library, this GPU and this spec.
    """
    return TensorrtEngine(spec, path, device, RTX)
