# SPDX-License-Identifier: Apache-2.0
"""Which engines a network runs on: those that were built, or the segments themselves.

Nothing is compiled here: `pw build` does that. What runs is said, and stands in the receipt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

from pw_engines import (
    Backend,
    Engine,
    EngineError,
    EngineKey,
    EngineStore,
    FrontEnd,
    aoti,
    tensorrt,
)
from pw_engines.eager import EagerEngine
from pw_engines.spec import digest_of
from pw_engines.tensorrt import torch_tensorrt
from pw_runtime.errors import BadRequest
from pw_runtime.execution.transformer_segments import Segment
from pw_runtime.types import EnginePolicy, Request

CompilerName = Literal["tensorrt", "torch-tensorrt", "aoti"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """A way to engines in the store: what a key of it depends on, how to load one."""

    backend: Backend
    file: str
    unavailable: Callable[[torch.device], str | None]
    platform: Callable[[torch.device], tuple[tuple[str, str], ...]]
    load: Callable[..., Engine]
    frontend: FrontEnd | None = None  # of TensorRT
    bakes: bool = False  # the decoder's weights become part of its engines

    @property
    def options(self) -> tuple[tuple[str, str], ...]:
        """As in a key."""
        return () if self.frontend is None else (("frontend", self.frontend),)


COMPILERS: Mapping[CompilerName, Compiler] = MappingProxyType(
    {  # in the order of preference
        "tensorrt": Compiler(
            backend="tensorrt",
            file=tensorrt.FILE,
            unavailable=tensorrt.unavailable,
            platform=tensorrt.tensorrt_platform,
            load=tensorrt.load,
            frontend="onnx",
            bakes=True,
        ),
        "torch-tensorrt": Compiler(
            backend="tensorrt",
            file=tensorrt.FILE,
            unavailable=tensorrt.unavailable,  # to run: the front end only builds
            platform=torch_tensorrt.torch_platform,
            load=tensorrt.load,
            frontend="torch-tensorrt",
            bakes=True,
        ),
        "aoti": Compiler(
            backend="aoti",
            file=aoti.FILE,
            unavailable=aoti.unavailable_to_run,
            platform=aoti.aoti_platform,
            load=aoti.load,
        ),
    }
)


def key_of(segment: Segment, name: CompilerName, device: torch.device) -> EngineKey:
    """The key of a segment's engine for this machine."""
    compiler = COMPILERS[name]
    return EngineKey(
        spec=segment.spec,
        backend=compiler.backend,
        platform=compiler.platform(device),
        options=compiler.options,
    )


def build_command(request: Request, bundle: Path) -> str:
    """The command that builds a model's engines as a request needs them."""
    return (
        f"pw build --model {bundle} --precision {request.precision} "
        f"--chunk {request.chunk} --device {request.device}"
    )


@dataclass(frozen=True, slots=True)
class Choice:
    """The engines of a network, and why these; `digest` is over the keys of built ones."""

    engines: Mapping[str, Engine]
    backend: Backend
    reason: str
    digest: str = ""

    def told(self) -> dict[str, str]:
        """As a receipt has it."""
        told = {"backend": self.backend, "reason": self.reason}
        return told | ({"digest": self.digest} if self.digest else {})


def eager_engines(segments: Mapping[str, Segment]) -> dict[str, Engine]:
    """The segments themselves, as engines."""
    return {name: EagerEngine(one.spec, one.module) for name, one in segments.items()}


@dataclass(frozen=True, slots=True)
class EngineSet:
    """A network's segments and what they run on."""

    segments: Mapping[str, Segment]
    choice: Choice


def choose_engines(
    segments: Mapping[str, Segment],
    policy: EnginePolicy,
    store: EngineStore,
    device: torch.device,
    command: str,
) -> Choice:
    """Engines for all segments by one backend.

    Args:
        segments: of a network, by name.
        policy: "auto" takes what the store has whole and the segments themselves otherwise;
            "engines" takes nothing but what the store has; "eager" the segments.
        store: where engines lie.
        device: that they run on.
        command: that would build them.

    Raises:
        BadRequest: engines were asked for and there are none, or one cannot be opened.
    """
    reason = "asked for"
    if policy != "eager":
        found = find_engines(lambda compiler: segments, store, device, command)
        if isinstance(found, EngineSet):
            return found.choice
        reason = found
    if policy == "engines":
        raise BadRequest(
            f"--policy engines, and {store.root} lacks engines for this model and machine",
            got=reason,
            do=f"run `{command}` first, or leave --policy out",
        )
    engines = eager_engines(segments)
    return Choice(engines, "eager", reason)


def find_engines(
    segments_for: Callable[[Compiler], Mapping[str, Segment]],
    store: EngineStore,
    device: torch.device,
    command: str,
) -> EngineSet | str:
    """Engines of the first compiler that has built all of them; else why there are none.

    Args:
        segments_for: gives the segments that a compiler's engines are of, by name.
        store: where engines lie.
        device: that they run on.
        command: that would build them.

    Raises:
        BadRequest: an engine cannot be opened.
    """
    lacking: dict[str, str] = {}
    for label, compiler in COMPILERS.items():
        why = compiler.unavailable(device)
        if why:
            lacking[compiler.backend] = why  # said once for both front ends
            continue
        segments = segments_for(compiler)
        keys = {name: key_of(one, label, device) for name, one in segments.items()}
        files = {name: store.find(key) for name, key in keys.items()}
        missing = [f"{name} ({one.reason})" for name, one in files.items() if one.path is None]
        if missing:
            none = len(missing) == len(files)
            lacking[label] = "none is built" if none else f"no {', '.join(missing)}"
            continue
        try:
            engines = {
                name: compiler.load(segments[name].spec, one.path, device)
                for name, one in files.items()
            }
        except EngineError as error:
            raise BadRequest(
                f"an engine in {store.root} cannot be opened",
                got=error,
                do=f"run `pw engines prune --all` and `{command}`, or add --policy eager",
            ) from error
        by = f", front end {compiler.frontend}" if compiler.frontend else ""
        digest = digest_of(keys[name].digest.encode() for name in sorted(keys))
        reason = f"built engines in {store.root}{by}"
        return EngineSet(segments, Choice(engines, compiler.backend, reason, digest))
    return "; ".join(f"{label}: {why}" for label, why in lacking.items())
