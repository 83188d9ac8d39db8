# SPDX-License-Identifier: Apache-2.0
"""The manifest of a stored engine: its key, its file and what was measured, as JSON."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, Final

from pw_engines.speed import Speed

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
MAX_MANIFEST: Final = 4 * 2**20  # bytes


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest to the disk itself. Raises OSError."""
    path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync(path)


_FILE_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_FIELDS: Final[dict[str, type | tuple[type, ...]]] = {
    "file": str,
    "bytes": int,
    "sha256": str,
    "key": dict,
    "seconds": (int, float),
}


def read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the manifest, and what is wrong with it."""
    try:
        manifest = json.loads(_read_file(folder / MANIFEST, MAX_MANIFEST))
    except FileNotFoundError:
        return {}, "it has no manifest"
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"its manifest cannot be read ({error})"
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        got = manifest.get("format") if isinstance(manifest, dict) else None
        return {}, f"format {str(got)[:20]}, expected {FORMAT}"
    for name, kind in _FIELDS.items():
        if not isinstance(manifest.get(name), kind):
            return {}, f"its manifest has no usable {name}"
    key = manifest["key"]
    if not isinstance(key.get("spec"), dict) or not isinstance(key.get("backend"), str):
        return {}, "its manifest has no key"
    if not isinstance(key["spec"].get("segment"), str):
        return {}, "its manifest has no segment"
    platform = key.get("platform")
    if not isinstance(platform, list) or not all(map(_is_pair, platform)):
        return {}, "its manifest has no usable platform"
    if not math.isfinite(manifest["seconds"]):
        return {}, "its manifest has no usable seconds"
    if not _FILE_NAME.fullmatch(manifest["file"]):
        return {}, f"its manifest names {manifest['file']}, which is not in its folder"
    try:
        speeds_of(manifest)
    except (TypeError, ValueError):
        return {}, "its manifest has no usable speeds"
    return manifest, ""


def speeds_of(manifest: dict[str, Any]) -> tuple[Speed, ...]:
    """Return what was measured, none in a manifest of before. Raises TypeError, ValueError."""
    speeds = tuple(Speed(**entry) for entry in manifest.get("speeds", ()))
    for speed in speeds:
        numbers = (speed.tokens, speed.threads, speed.seconds, speed.eager, speed.error)
        if not all(math.isfinite(number) for number in numbers) or speed.seconds <= 0:
            raise ValueError(f"no speed: {speed}")
    return speeds


def _is_pair(value: object) -> bool:
    """Tell whether a value of JSON is a name with its text."""
    return isinstance(value, list) and [type(x) for x in value] == [str, str]


def _read_file(path: Path, most: int) -> bytes:
    """Return the bytes of a regular file. Raises OSError, also for a pipe and for a larger one."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path.name} is not a file")
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"{path.name} has more than {most} bytes")
    return content


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
