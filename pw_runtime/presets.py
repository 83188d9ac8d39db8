# SPDX-License-Identifier: Apache-2.0
"""The presets: all numbers of a clip, built in or read from a file."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from pw_runtime.errors import BadRequest
from pw_runtime.sizes import LONGEST, MOST_FRAMES, PIXELS_PER_TOKEN, sized, with_frames
from pw_runtime.system.input_files import UnreadableInput, read_toml
from pw_runtime.types import (
    TRAIN_STEPS,
    VAE_STRIDE,
    Compat,
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
NANO_DRAFT = StageConfig(width=192, height=96, steps=16, shift=5.0, guidance=3.0)
NANO = StageConfig(width=256, height=128, steps=4, shift=5.5, guidance=2.2)
NANO_CLIP = VideoConfig(frames=17, fps=12)

# Those whose sizes the networks were trained on: the published ones, and the built-in model.
NANO_PRESET = Preset(draft=NANO_DRAFT, highres=NANO, video=NANO_CLIP)
TRAINED: dict[str, Preset] = {
    "draft": Preset(draft=DRAFT, video=CLIP),
    "2k": Preset(draft=DRAFT, highres=TWO_K, video=CLIP, decode=TilingConfig(strips=3)),
    "4k": Preset(draft=DRAFT, highres=FOUR_K, video=CLIP, decode=TilingConfig(strips=4)),
    "4k-5step": Preset(
        draft=DRAFT, highres=replace(FOUR_K, steps=5), video=CLIP, decode=TilingConfig(strips=4)
    ),
    "nano": NANO_PRESET,
    "nano-hd": replace(NANO_PRESET, highres=replace(NANO, width=512, height=256)),
    "nano-portrait": sized(NANO_PRESET, (128, 256)),
    "nano-square": sized(NANO_PRESET, (192, 192)),
}
PRESETS: dict[str, Preset] = {
    **TRAINED,
    "2k-portrait": sized(TRAINED["2k"], (1440, 2560)),
    "2k-square": sized(TRAINED["2k"], (1920, 1920)),
    "4k-portrait": sized(TRAINED["4k"], (2144, 3840)),
    "4k-square": sized(TRAINED["4k"], (2880, 2880)),
}

SHIFTS = (0.01, 1000.0)
MAX_GUIDANCE = 1000.0  # a thousand times as far as the networks were trained; bf16 still holds it
MOST_PROBLEMS = 8  # in a message
UNNAMED: Final = "FILE.toml"
MOST_CHANGES = 4  # of a built-in preset that its name still names
# The tables of a preset, and the keys of each.
TABLES: Final = {
    "draft": StageConfig,
    "highres": StageConfig,
    "video": VideoConfig,
    "decode": TilingConfig,
    "compat": Compat,
}
KEYS: Final = tuple(f"{table}.{x.name}" for table, kind in TABLES.items() for x in fields(kind))
_NUMBER: Final = re.compile(r"[+-]?\d{1,400}(\.\d{1,400})?([eE][+-]?\d{1,4})?")
_REPLACED = {  # keys of earlier versions
    "decode.caches": '; in place of caches = "host" write order = "tiles", '
    'in place of caches = "device" order = "frames"'
}


def find_preset(name: str, changes: Sequence[str] = ()) -> Preset:
    """Return a preset by name, or read one from a .toml file.

    `changes` are keys with other values, such as "highres.steps=5", as --set takes them.

    Raises BadRequest for an unknown name, an unreadable file, unknown or missing keys, or
    numbers that the model cannot work with.
    """
    if changes:
        return _changed(find_preset(name), name, changes)
    if name in PRESETS:
        return PRESETS[name]
    if not name.lower().endswith(".toml"):
        raise BadRequest(
            "unknown preset",
            got=name,
            wanted=f"one of {', '.join(PRESETS)}, or a file ending in .toml",
            do="see `pw docs presets`",
        )
    return read_preset(Path(name))


def preset_name(preset: Preset, *, decode: bool = True) -> str:
    """Return what names the preset after --preset: "2k", "2k --set highres.steps=5", FILE.toml.

    A size and a length other than the named preset's are there as --size and --frames. Without
    `decode`, in whatever tiles it is decoded.
    """
    values = dict(_values(asdict(preset)))
    found: list[list[str]] = []
    for name, known in PRESETS.items():
        for near, options in _alike(known, preset):
            theirs = dict(_values(asdict(near)))
            if values.keys() == theirs.keys():
                other = [k for k, x in values.items() if x != theirs[k]]
                counted = other if decode else [k for k in other if not k.startswith("decode.")]
                changes = [f"--set {k}={_text(values[k])}" for k in counted]
                found.append([name, *options, *changes])
    words = min(found, key=len, default=None)
    if words is None or len(words) - 1 > MOST_CHANGES:
        return UNNAMED
    return " ".join(words)


def _alike(known: Preset, preset: Preset) -> Iterator[tuple[Preset, list[str]]]:
    """Yield a known preset as it is, and in size and length of another, with their options."""
    yield known, []
    clips = [(x.highres or x.draft, x.video.frames) for x in (known, preset)]
    (mine, length), (last, frames) = clips
    options = []
    if (mine.width, mine.height) != (last.width, last.height):
        known = sized(known, (last.width, last.height))
        options.append(f"--size {last.width}x{last.height}")
    if length != frames:
        known = with_frames(known, frames)
        options.append(f"--frames {frames}")
    yield known, options


def _values(tables: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield dotted keys and values of a preset's tables."""
    for table, content in tables.items():
        if content is not None:
            yield from ((f"{table}.{key}", value) for key, value in content.items())


def _text(value: object) -> str:
    """Return a value as --set takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _changed(preset: Preset, name: str, changes: Sequence[str]) -> Preset:
    """Return a preset with other values of some keys. Raises BadRequest naming what is wrong."""
    tables, seen = {table: x for table, x in asdict(preset).items() if x is not None}, set[str]()
    for change in changes:
        key, equals, text = (part.strip() for part in change.partition("="))
        if not (key and equals and text):
            raise BadRequest(
                "--set needs a key and its value", got=change, wanted="KEY=VALUE: highres.steps=5"
            )
        if key not in KEYS:
            raise _unknown_key(key)
        if key in seen:
            raise BadRequest(f"--set {key} is given twice", do="leave one of them out")
        seen.add(key)
        table, _, field = key.partition(".")
        tables.setdefault(table, {})[field] = _typed(text)
    source = f"--preset {name} --set {' --set '.join(changes)}"
    changed = _validated(tables, source)
    check_preset(changed, source)
    return changed


def _typed(text: str) -> object:
    """Return a number or a truth value as what it is, anything else as text."""
    if text in ("true", "false"):
        return text == "true"
    if _NUMBER.fullmatch(text):
        return float(text) if re.search("[.eE]", text) else int(text)
    return text.strip("\"'")


def _unknown_key(key: str) -> BadRequest:
    """Return the error for a key that no preset has, with those that are near."""
    alike = [known for known in KEYS if known.partition(".")[2] == key]
    near = alike or difflib.get_close_matches(key, KEYS, n=2)
    return BadRequest(
        f"--set {key}: no preset has this key",
        got=key,
        wanted=f"for instance {' or '.join(near)}" if near else f"one of {', '.join(KEYS)}",
        do="see `pw docs presets`",
    )


def read_preset(path: Path) -> Preset:
    """Read and check a preset file (docs/presets.md). Raises BadRequest."""
    try:
        table = read_toml(path)
    except UnreadableInput as error:
        raise BadRequest(
            f"cannot read the preset file {path}",
            got=error,
            wanted="a TOML file as in `pw docs presets`",
            do="check the path and the file",
        ) from error
    preset = _validated(table, str(path))
    check_preset(preset, str(path))
    return preset


def _validated(tables: Mapping[str, Any], source: str) -> Preset:
    """Return a preset of tables, all of whose keys and types are right. Raises BadRequest."""
    try:
        # By way of JSON: strict validation of Python objects would not take tables.
        return TypeAdapter(Preset).validate_json(json.dumps(tables, default=str), strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[:MOST_PROBLEMS]
        named = [".".join(str(part) for part in item["loc"]) for item in found]
        problems = [f"{key}: {item['msg']}" for key, item in zip(named, found, strict=True)]
        unnamed = error.error_count() - len(problems)
        raise BadRequest(
            f"{source} is not a preset",
            got="; ".join(problems + [f"and {unnamed} more"] * (unnamed > 0)),
            wanted="the tables and keys of `pw docs presets`, and no others",
            do="mend the keys that are named"
            + "".join(advice for key, advice in _REPLACED.items() if key in named),
        ) from error


def check_preset(preset: Preset, source: str) -> None:
    """Check numbers against what the model can make. Raises BadRequest naming every fault."""
    problems = []
    stages = {"draft": preset.draft, "highres": preset.highres}
    for name, stage in stages.items():
        if stage is None:
            continue
        for key in ("width", "height"):
            pixels = getattr(stage, key)
            if not 0 < pixels <= LONGEST or pixels % PIXELS_PER_TOKEN:
                problems.append(
                    f"{name}.{key} is {pixels}, wanted a multiple of 32 up to {LONGEST}"
                )
        if not 1 <= stage.steps <= TRAIN_STEPS:
            problems.append(f"{name}.steps is {stage.steps}, wanted 1 to {TRAIN_STEPS}")
        if not SHIFTS[0] <= stage.shift <= SHIFTS[1]:
            problems.append(f"{name}.shift is {stage.shift}, wanted {SHIFTS[0]} to {SHIFTS[1]}")
        if not -MAX_GUIDANCE <= stage.guidance <= MAX_GUIDANCE:
            problems.append(f"{name}.guidance is {stage.guidance}, wanted at most {MAX_GUIDANCE}")
    frames = preset.video.frames
    if not 0 < frames <= MOST_FRAMES or frames % VAE_STRIDE[0] != 1:
        nearest = min(max(0, frames - 1) // VAE_STRIDE[0] * VAE_STRIDE[0] + 1, MOST_FRAMES)
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
            do="change these numbers; `pw docs presets` says what each is",
        )
