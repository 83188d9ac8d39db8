# SPDX-License-Identifier: Apache-2.0
"""The presets: all numbers of a clip, built in or read from a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pw_runtime.errors import BadRequest
from pw_runtime.system.input_files import UnreadableInput, read_toml
from pw_runtime.types import (
    PATCH,
    TRAIN_STEPS,
    VAE_STRIDE,
    Preset,
    StageConfig,
    TilingConfig,
    VideoConfig,
)

DRAFT = StageConfig(width=448, height=256, steps=50, shift=5.0, guidance=5.0)
TWO_K = StageConfig(width=2560, height=1440, steps=4, shift=5.5, guidance=5.0)
FOUR_K = StageConfig(width=3840, height=2144, steps=4, shift=5.8, guidance=5.0)
CLIP = VideoConfig(frames=121, fps=24)

# The built-in model: the same two stages at a size that a laptop runs in seconds.
NANO_DRAFT = StageConfig(width=128, height=64, steps=16, shift=5.0, guidance=3.0)
NANO = StageConfig(width=256, height=128, steps=4, shift=5.5, guidance=1.5)
NANO_CLIP = VideoConfig(frames=17, fps=12)

PRESETS: dict[str, Preset] = {
    "draft": Preset(draft=DRAFT, video=CLIP),
    "2k": Preset(draft=DRAFT, highres=TWO_K, video=CLIP, decode=TilingConfig(strips=3)),
    "4k": Preset(draft=DRAFT, highres=FOUR_K, video=CLIP, decode=TilingConfig(strips=4)),
    "4k-5step": Preset(
        draft=DRAFT, highres=replace(FOUR_K, steps=5), video=CLIP, decode=TilingConfig(strips=4)
    ),
    "nano": Preset(draft=NANO_DRAFT, highres=NANO, video=NANO_CLIP),
    "nano-hd": Preset(
        draft=NANO_DRAFT, highres=replace(NANO, width=512, height=256), video=NANO_CLIP
    ),
}

PIXELS_PER_TOKEN = VAE_STRIDE[1] * PATCH
MAX_POSITIONS = 1024  # of the official rotary tables, along each axis
SHIFTS = (0.01, 1000.0)
MAX_GUIDANCE = 1000.0  # a thousand times as far as the networks were trained; bf16 still holds it
MOST_PROBLEMS = 8  # in a message
_REPLACED = {  # keys of earlier versions
    "decode.caches": '; in place of caches = "host" write order = "tiles", '
    'in place of caches = "device" order = "frames"'
}


def find_preset(name: str) -> Preset:
    """Return a preset by name, or read one from a .toml file.

    Raises BadRequest for an unknown name, an unreadable file, unknown or missing keys, or
    numbers that the model cannot work with.
    """
    if name in PRESETS:
        return PRESETS[name]
    if not name.lower().endswith(".toml"):
        raise BadRequest(
            "unknown preset",
            got=name,
            wanted=f"one of {', '.join(PRESETS)}, or a file ending in .toml",
            do="see docs/presets.md",
        )
    return read_preset(Path(name))


def preset_name(preset: Preset) -> str:
    """Return the preset's name for the command line; "FILE.toml" for one read from a file."""
    return next((name for name, known in PRESETS.items() if known == preset), "FILE.toml")


def read_preset(path: Path) -> Preset:
    """Read and check a preset file (docs/presets.md). Raises BadRequest."""
    try:
        table = read_toml(path)
    except UnreadableInput as error:
        raise BadRequest(
            f"cannot read the preset file {path}",
            got=error,
            wanted="a TOML file as in docs/presets.md",
            do="check the path and the file",
        ) from error
    try:
        # By way of JSON: strict validation of Python objects would not take tables.
        preset = TypeAdapter(Preset).validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[:MOST_PROBLEMS]
        named = [".".join(str(part) for part in item["loc"]) for item in found]
        problems = [f"{key}: {item['msg']}" for key, item in zip(named, found, strict=True)]
        unnamed = error.error_count() - len(problems)
        raise BadRequest(
            f"{path} is not a preset",
            got="; ".join(problems + [f"and {unnamed} more"] * (unnamed > 0)),
            wanted="the tables and keys of docs/presets.md, and no others",
            do="mend the keys that are named"
            + "".join(advice for key, advice in _REPLACED.items() if key in named),
        ) from error
    check_preset(preset, str(path))
    return preset


def check_preset(preset: Preset, source: str) -> None:
    """Check numbers against what the model can make. Raises BadRequest naming every fault."""
    problems = []
    stages = {"draft": preset.draft, "highres": preset.highres}
    for name, stage in stages.items():
        if stage is None:
            continue
        for key in ("width", "height"):
            pixels, most = getattr(stage, key), PIXELS_PER_TOKEN * MAX_POSITIONS
            if not 0 < pixels <= most or pixels % PIXELS_PER_TOKEN:
                problems.append(f"{name}.{key} is {pixels}, wanted a multiple of 32 up to {most}")
        if not 1 <= stage.steps <= TRAIN_STEPS:
            problems.append(f"{name}.steps is {stage.steps}, wanted 1 to {TRAIN_STEPS}")
        if not SHIFTS[0] <= stage.shift <= SHIFTS[1]:
            problems.append(f"{name}.shift is {stage.shift}, wanted {SHIFTS[0]} to {SHIFTS[1]}")
        if not -MAX_GUIDANCE <= stage.guidance <= MAX_GUIDANCE:
            problems.append(f"{name}.guidance is {stage.guidance}, wanted at most {MAX_GUIDANCE}")
    frames, most = preset.video.frames, (MAX_POSITIONS - 1) * VAE_STRIDE[0] + 1
    if not 0 < frames <= most or frames % VAE_STRIDE[0] != 1:
        nearest = min(max(0, frames - 1) // VAE_STRIDE[0] * VAE_STRIDE[0] + 1, most)
        problems.append(f"video.frames is {frames}, wanted 4n+1, for instance {nearest}")
    if not 1 <= preset.video.fps <= 1000:
        problems.append(f"video.fps is {preset.video.fps}, wanted 1 to 1000")
    columns = (preset.highres or preset.draft).width // VAE_STRIDE[2]
    if not 1 <= preset.decode.strips <= columns:
        problems.append(f"decode.strips is {preset.decode.strips}, wanted 1 to {columns}")
    if not 0 <= preset.decode.overlap <= columns:
        problems.append(f"decode.overlap is {preset.decode.overlap}, wanted 0 to {columns}")
    if problems:
        raise BadRequest(
            f"{source} asks for a clip that cannot be made",
            got="; ".join(problems),
            do="change these numbers; docs/presets.md says what each is",
        )
