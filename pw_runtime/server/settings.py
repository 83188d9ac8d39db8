# SPDX-License-Identifier: Apache-2.0
"""Settings of a server, as the command line gives them."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from pw_runtime.errors import BadRequest
from pw_runtime.system.machine import available_memory_bytes
from pw_runtime.system.own_program import own_program
from pw_runtime.types import LoraFile, Preset, RunOptions, StageName

TOKEN = re.compile(r"[\x21-\x7e]{16,512}")
CLIENT = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on what clients may ask for and what is kept."""

    queued: int = 1000  # jobs that wait, of all clients
    queued_per_client: int = 200
    prompt_characters: int = 10_000
    body_bytes: int = 2**18  # of a request, but for its picture
    picture_bytes: int = 2**24
    clips_per_request: int = 16
    listeners: int = 1000  # open event streams
    job_seconds: float | None = None  # a running job longer than this is ended
    keep_seconds: float | None = None  # finished jobs are removed after this
    keep_bytes: int | None = None  # the oldest finished jobs go beyond this


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that a server is told at its start.

    Attributes:
        model: folder of the bundle.
        root: folder of the queue and of all files that jobs leave.
        presets: on offer, by name; the first is that of a request which names none.
        devices: with one worker on each, as `--device` names them.
        tokens: client name by token; empty: no token is asked for.
        grace_seconds: from SIGTERM until a worker that does not end is killed.
        hang_seconds: from the order to end a job until a worker that does not hear it is killed;
            longer than a block of the largest clip takes.
        backoff_seconds: before a worker that died is started again; doubles up to a minute.
        worker: command of the worker program, to which the server's process id is added.
    """

    model: Path
    root: Path
    presets: Mapping[str, Preset]
    devices: tuple[str, ...] = ("auto",)
    options: RunOptions = field(default_factory=RunOptions)
    loras: Mapping[StageName, tuple[LoraFile, ...]] = field(default_factory=dict)
    gpu_memory: int | None = None  # bytes; None: what is free when a worker starts
    host_memory: int | None = None  # of each worker
    host: str = "127.0.0.1"
    port: int = 8000
    tokens: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    grace_seconds: float = 15.0
    backoff_seconds: float = 1.0
    hang_seconds: float = 600.0
    worker: tuple[str, ...] = field(
        default_factory=partial(own_program, "pw_runtime.server.worker")
    )

    @property
    def model_name(self) -> str:
        """The id of the model in the API."""
        return self.model.absolute().name or "model"


def check_settings(settings: Settings) -> None:
    """Raise BadRequest for an address that others reach without a token, and for no presets."""
    if not settings.presets:
        raise BadRequest("no preset is on offer", do="name one, --preset 2k for instance")
    if not settings.tokens and not is_loopback(settings.host):
        raise BadRequest(
            f"{settings.host} can be reached from other machines, and no token is set",
            wanted="a token, or the address 127.0.0.1",
            do="put a token of 16 characters or more into a file and give --token-file FILE, or "
            "set PW_SERVE_TOKEN; or leave --host out",
        )


def with_host_memory(settings: Settings) -> Settings:
    """Give each of several workers an equal part of the host memory that is free now.

    A worker that is started again keeps its part: by then the others hold theirs.
    """
    count, free = len(settings.devices), available_memory_bytes()
    if settings.host_memory is not None or count == 1 or free is None:
        return settings
    return replace(settings, host_memory=free // count)


def is_loopback(host: str) -> bool:
    """Tell whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_tokens(text: str, source: str) -> dict[str, str]:
    """Return client names by token, of lines with a token, or with a name and a token.

    Raises BadRequest for a token that is short or used twice, and where there is none.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or line.lstrip().startswith("#"):
            continue
        name, token = ("default", words[0]) if len(words) == 1 else (words[0], words[1])
        usable = len(words) <= 2 and TOKEN.fullmatch(token) and CLIENT.fullmatch(name)
        if not usable or token in found:
            raise BadRequest(
                f"{source}, line {number} has no usable token",
                got="a token that is there twice" if token in found else f"{len(words)} words",
                wanted="a token of 16 to 512 ASCII characters, or a client's name and its token",
                do="make one with: openssl rand -hex 24",
            )
        found[token] = name
    if not found:
        raise BadRequest(f"{source} has no token", do="make one with: openssl rand -hex 24")
    return found
