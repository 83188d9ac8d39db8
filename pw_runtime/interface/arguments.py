# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments of a `Pipeline`, before anything is opened or computed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from pw_runtime.errors import BadRequest
from pw_runtime.types import RunOptions

_OPTIONS: Final = TypeAdapter(RunOptions)
_WHOLE: Final = ((int,), "a whole number")
_BYTES: Final = ((int,), "a number of bytes")
_LORAS: Final = ((list, tuple), 'a list of files, such as ["style.safetensors:0.8"]')
_KINDS: Final[Mapping[str, tuple[tuple[type, ...], str]]] = {
    "changes": ((list, tuple), 'a list of texts, such as ["highres.steps=5"]'),
    "loras": _LORAS,
    "loras_highres": _LORAS,
    "gpu_memory": _BYTES,
    "host_memory": _BYTES,
    "options": ((RunOptions,), "RunOptions"),
    "negative_prompt": ((str,), "a text"),
    "seed": ((int,), "a whole number; -1 draws one"),
    "num_inference_steps": _WHOLE,
    "guidance_scale": ((int, float), "a number"),
    "num_frames": _WHOLE,
    "output": ((str, Path), "a path"),
    "draft_video": ((str, Path), "a path"),
    "draft_strength": ((int, float), "a number from 0 to 1"),
}


def require_kinds(**given: object) -> None:
    """Raise BadRequest for an argument of a wrong type; None is one only as seed."""
    for name, value in given.items():
        kinds, words = _KINDS[name]
        if value is None and name != "seed":
            continue
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise BadRequest(f"{name} has a wrong type", got=f"{value!r:.80}", wanted=words)


def require_texts(prompt: object) -> None:
    """Raise BadRequest for what is no prompt, and no list of prompts."""
    texts = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
    if not all(isinstance(text, str) for text in texts):
        wanted = "a text, or a list of texts"
        raise BadRequest("prompt has a wrong type", got=f"{prompt!r:.80}", wanted=wanted)
    if any(not str(text).strip() for text in texts):
        raise BadRequest("a prompt is empty", do="describe what the clip should show")


def require_callable(callback: object) -> None:
    """Raise BadRequest for a callback that cannot be called."""
    if callback is not None and not callable(callback):
        wanted = "a function of a Progress"
        raise BadRequest("callback has a wrong type", got=f"{callback!r:.80}", wanted=wanted)


def require_options(options: RunOptions) -> None:
    """Raise BadRequest for an option that no command line could have."""
    try:
        _OPTIONS.validate_json(json.dumps(asdict(options), default=repr), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadRequest(
            f"options.{'.'.join(map(str, first['loc']))} cannot be",
            got=f"{first['input']!r:.80}",
            wanted=first["msg"],
            do="see the option of that name in `pw generate --help`",
        ) from error
