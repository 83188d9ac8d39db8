# SPDX-License-Identifier: Apache-2.0
"""Messages between a server and its workers: JSON, one on each line of a pipe.

Orders go to the standard input of a worker, events come from its standard output. The end of the
orders asks a worker to stop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from pw_runtime.types import FORBID_UNKNOWN, LoraFile, Preset, RunOptions, StageName

Stage = Literal["loading", "text", "encode", "draft", "highres", "decode"]


# ---- orders ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """Open the bundle, and say which presets fit. The first order."""

    __pydantic_config__ = FORBID_UNKNOWN

    model: str
    presets: Mapping[str, Preset]
    options: RunOptions  # with the device
    loras: Mapping[StageName, tuple[LoraFile, ...]] = field(default_factory=dict)
    gpu_memory: int | None = None  # bytes; None: what is free
    host_memory: int | None = None  # of this worker; None: what is free
    kind: Literal["join"] = "join"


@dataclass(frozen=True, slots=True, kw_only=True)
class Make:
    """Make a clip: its draft into `folder`/draft, then the clip into `folder`/final."""

    __pydantic_config__ = FORBID_UNKNOWN

    job: str
    folder: str
    prompt: str
    negative: str
    seed: int
    preset: Preset
    draft_only: bool
    picture: bool = False  # the clip starts from the one in the folder
    finishes: str | None = None  # job whose draft it finishes
    kind: Literal["make"] = "make"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """End a job at the next block, if it is still being made."""

    __pydantic_config__ = FORBID_UNKNOWN

    job: str
    kind: Literal["cancel"] = "cancel"


Order = Join | Make | Cancel


# ---- events ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The planner's word on one preset, and the seconds that each stage would take."""

    __pydantic_config__ = FORBID_UNKNOWN

    fits: bool
    draft_fits: bool
    reason: str = ""  # why it does not fit
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The worker waits for jobs."""

    __pydantic_config__ = FORBID_UNKNOWN

    device: str
    bundle: str  # digest
    presets: Mapping[str, Fit]
    rss: int
    kind: Literal["ready"] = "ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The worker cannot work, for a reason that is for the user; it ends."""

    __pydantic_config__ = FORBID_UNKNOWN

    reason: str
    kind: Literal["refused"] = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Advanced:
    """Progress of a job."""

    __pydantic_config__ = FORBID_UNKNOWN

    job: str
    stage: Stage
    step: float = 0
    steps: int = 0
    fraction: float = 0  # of the job
    seconds_left: float | None = None
    kind: Literal["advanced"] = "advanced"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted:
    """The preview of a job's draft is there."""

    __pydantic_config__ = FORBID_UNKNOWN

    job: str
    kind: Literal["drafted"] = "drafted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Undrafted:
    """A job's draft cannot be finished: it goes, and is made again."""

    __pydantic_config__ = FORBID_UNKNOWN

    job: str
    kind: Literal["undrafted"] = "undrafted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A job's files are complete."""

    __pydantic_config__ = FORBID_UNKNOWN

    job: str
    rss: int
    kind: Literal["made"] = "made"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A job ended without a clip."""

    __pydantic_config__ = FORBID_UNKNOWN

    job: str
    code: str
    reason: str
    rss: int
    disk_full: bool = False
    kind: Literal["failed"] = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceased:
    """A job was ended by an order; what it had is kept in its folder."""

    __pydantic_config__ = FORBID_UNKNOWN

    job: str
    rss: int
    kind: Literal["ceased"] = "ceased"


Event = Ready | Refused | Advanced | Drafted | Undrafted | Made | Failed | Ceased

_ORDERS: TypeAdapter[Order] = TypeAdapter(Annotated[Order, Field(discriminator="kind")])
_EVENTS: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])
_STAGES: TypeAdapter[Stage] = TypeAdapter(Stage)


def stage_named(name: str) -> Stage:
    """Return a stage by its name. Raises ValueError."""
    return _STAGES.validate_python(name)


def order_line(order: Order) -> bytes:
    """Return an order as a line."""
    return _ORDERS.dump_json(order) + b"\n"


def event_line(event: Event) -> bytes:
    """Return an event as a line."""
    return _EVENTS.dump_json(event) + b"\n"


def read_order(line: bytes) -> Order:
    """Return the order of a line. Raises ValueError."""
    return _ORDERS.validate_json(line)


def read_event(line: bytes) -> Event:
    """Return the event of a line. Raises ValueError."""
    return _EVENTS.validate_json(line)
