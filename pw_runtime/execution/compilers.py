# SPDX-License-Identifier: Apache-2.0
"""The compilers of engines: what each needs, and how its engines are named and opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch

from pw_engines import Backend, Engine, FrontEnd, Platform, aoti, openvino, tensorrt
from pw_engines.engine import SegmentFunction
from pw_engines.tensorrt import rtx, torch_tensorrt

CompilerName = Literal["tensorrt", "torch-tensorrt", "tensorrt-rtx", "aoti", "openvino"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """Keys and loading of the engines of one compiler.

    Attributes:
        backend: that runs them.
        file: name of an engine's file in the store.
        unavailable: why they cannot be run on a device.
        platforms: what engines that run on a device were built for, the best first; new ones for
            that device are built for the first.
        load: opens one.
        check: compares one with its segment at its first run on a device; None: that was done when
            it was built.
        frontend: of TensorRT.
        bakes_weights: the decoder's weights become part of its engines.
        decodes: it has engines for the decoder too.
    """

    backend: Backend
    file: str
    unavailable: Callable[[torch.device], str | None]
    platforms: Callable[[torch.device], Sequence[Platform]]
    load: Callable[..., Engine]
    check: Callable[[Any, SegmentFunction, torch.device], None] | None = None
    frontend: FrontEnd | None = None
    bakes_weights: bool = False
    decodes: bool = True

    @property
    def options(self) -> tuple[tuple[str, str], ...]:
        """Options that are part of a key."""
        return () if self.frontend is None else (("frontend", self.frontend),)


COMPILERS: Mapping[CompilerName, Compiler] = MappingProxyType(
    {  # in the order of preference; see `in_order`
        "tensorrt": Compiler(
            backend="tensorrt",
            file=tensorrt.FILE,
            unavailable=tensorrt.unavailable,
            platforms=lambda device: [tensorrt.tensorrt_platform(device)],
            load=tensorrt.load,
            frontend="onnx",
            bakes_weights=True,
        ),
        "torch-tensorrt": Compiler(
            backend="tensorrt",
            file=tensorrt.FILE,
            unavailable=tensorrt.unavailable,  # to run: the front end only builds
            platforms=lambda device: [torch_tensorrt.torch_platform(device)],
            load=tensorrt.load,
            frontend="torch-tensorrt",
            bakes_weights=True,
        ),
        "tensorrt-rtx": Compiler(
            backend="tensorrt-rtx",
            file=rtx.FILE,
            unavailable=rtx.cannot_run,
            platforms=rtx.platforms_for,
            load=rtx.load,
            check=rtx.check_first_run,
        ),
        "aoti": Compiler(
            backend="aoti",
            file=aoti.FILE,
            unavailable=aoti.unavailable_to_run,
            platforms=lambda device: [aoti.aoti_platform(device)],
            load=aoti.load,
        ),
        "openvino": Compiler(
            backend="openvino",
            file=openvino.FILE,
            unavailable=openvino.unavailable,
            platforms=lambda device: [openvino.openvino_platform(device)],
            load=openvino.load,
            decodes=False,
        ),
    }
)
