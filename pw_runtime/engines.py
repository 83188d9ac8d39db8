# SPDX-License-Identifier: Apache-2.0
"""Which engines a transformer runs on: those that were built, or the segments themselves.

Nothing is compiled here: `pw build` does that. What runs is said, and stands in the receipt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from pw_engines import (
    Backend,
    Engine,
    EngineError,
    EngineKey,
    EngineStore,
    aoti,
    tensorrt,
)
from pw_engines.eager import EagerEngine
from pw_runtime.errors import BadRequest
from pw_runtime.segments import Segment
from pw_runtime.types import EnginePolicy


@dataclass(frozen=True, slots=True)
class Compiler:
    """A backend whose engines lie in the store: what a key of it depends on, how to load one."""

    file: str
    unavailable: Callable[[torch.device], str | None]
    platform: Callable[[torch.device], tuple[tuple[str, str], ...]]
    load: Callable[..., Engine]


COMPILERS: Mapping[Backend, Compiler] = MappingProxyType(
    {  # in the order of preference
        "tensorrt": Compiler(
            tensorrt.FILE, tensorrt.unavailable, tensorrt.tensorrt_platform, tensorrt.load
        ),
        "aoti": Compiler(aoti.FILE, aoti.unavailable_to_run, aoti.aoti_platform, aoti.load),
    }
)


def key_of(segment: Segment, backend: Backend, device: torch.device) -> EngineKey:
    """The key of a segment's engine for this machine."""
    return EngineKey(
        spec=segment.spec, backend=backend, platform=COMPILERS[backend].platform(device)
    )


@dataclass(frozen=True, slots=True)
class Choice:
    """The engines of a network, and why these."""

    engines: Mapping[str, Engine]
    backend: Backend
    reason: str


@dataclass(frozen=True, slots=True)
class OnEngines:
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
    lacking = []
    for backend, compiler in COMPILERS.items() if policy != "eager" else ():
        why = compiler.unavailable(device)
        if why:
            lacking.append(f"{backend}: {why}")
            continue
        found = {n: store.find(key_of(one, backend, device)) for n, one in segments.items()}
        missing = [f"{name} ({one.reason})" for name, one in found.items() if one.path is None]
        if missing:
            what = "none is built" if len(missing) == len(found) else f"no {', '.join(missing)}"
            lacking.append(f"{backend}: {what}")
            continue
        try:
            engines = {
                name: compiler.load(segments[name].spec, one.path, device)
                for name, one in found.items()
            }
        except EngineError as error:
            raise BadRequest(
                f"an engine in {store.root} cannot be opened",
                got=error,
                do=f"run `pw engines prune --all` and `{command}`, or add --policy eager",
            ) from error
        return Choice(engines, backend, f"built engines in {store.root}")
    if policy == "engines":
        raise BadRequest(
            f"--policy engines, and {store.root} lacks engines for this model and machine",
            got="; ".join(lacking),
            do=f"run `{command}` first, or leave --policy out",
        )
    engines = {name: EagerEngine(one.spec, one.module) for name, one in segments.items()}
    reason = "asked for" if policy == "eager" else "; ".join(lacking)
    return Choice(engines, "eager", reason)
