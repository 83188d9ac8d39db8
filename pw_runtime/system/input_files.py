# SPDX-License-Identifier: Apache-2.0
"""Files that others wrote: opened without waiting, read up to a cap, parsed to a depth.

Every loader goes through these functions. What they refuse is an `UnreadableInput`, whose text
fits behind "got:" in the loader's own error.
"""

from __future__ import annotations

import json
import math
import os
import stat
import sys
import tomllib
from io import BufferedReader
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

MAX_JSON: Final = 16 * 2**20  # bytes of a manifest, a receipt, a line of prompts
MAX_TOML: Final = 64 * 2**10  # bytes of a preset
MAX_TOML_LINE: Final = 1000  # characters: the parser's time grows as the square of a dotted key
MAX_DEPTH: Final = 64  # of nested objects and arrays

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnreadableInput(ValueError):
    """A file that cannot be read; the text says why, in words that follow "got:"."""


def kind_of(mode: int) -> str:
    """Return what a path is that is no regular file, from the `st_mode` of its status."""
    return _KINDS.get(stat.S_IFMT(mode), "something that is no regular file")


def open_input(path: Path) -> BufferedReader:
    """Open a regular file for reading; pipes, sockets and devices are never waited for.

    Raises UnreadableInput.
    """
    try:
        _require_regular(path.stat())  # before it is opened: opening a device may already act on it
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UnreadableInput(error.strerror or str(error)) from error
    except ValueError as error:  # a NUL in the path, or a lone surrogate
        if isinstance(error, UnreadableInput):
            raise
        raise UnreadableInput("a path that no file can have") from error
    file = os.fdopen(descriptor, "rb")
    try:
        _require_regular(os.fstat(descriptor))
    except UnreadableInput:
        file.close()
        raise
    return file


def size_of(num_bytes: int) -> str:
    """Return a cap as people say it: "64 KiB", "16 MiB"."""
    return f"{num_bytes >> 20} MiB" if num_bytes >= 2**20 else f"{num_bytes >> 10} KiB"


def read_input(path: Path, most: int) -> bytes:
    """Return the content of a regular file of at most `most` bytes. Raises UnreadableInput."""
    with open_input(path) as file:
        try:
            content = file.read(most + 1)
        except OSError as error:
            raise UnreadableInput(error.strerror or str(error)) from error
    if len(content) > most:
        raise UnreadableInput(f"a file of more than {size_of(most)}, the most that is read")
    return content


def read_text(path: Path, most: int) -> str:
    """Return UTF-8 text, without its byte order mark. Raises UnreadableInput."""
    content = read_input(path, most)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableInput(
            f"byte 0x{content[error.start]:02x} at offset {error.start}, which is not UTF-8"
        ) from error


def read_json(path: Path, most: int = MAX_JSON) -> Any:
    """Return the content of a JSON file. Raises UnreadableInput."""
    return parse_json(read_text(path, most))


def parse_json(text: str) -> Any:
    """Parse JSON as its standard has it: no NaN, no infinity, MAX_DEPTH levels at most.

    Raises UnreadableInput.
    """
    try:
        content = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except RecursionError as error:
        raise _too_deep() from error
    except UnreadableInput:
        raise
    except json.JSONDecodeError as error:
        raise UnreadableInput(f"not JSON: {error}") from error
    except ValueError as error:  # Python's words advise to change a limit of the interpreter
        raise _too_many_digits() from error
    _require_shallow(content)
    return content


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file. Raises UnreadableInput."""
    text = read_text(path, MAX_TOML)
    for number, line in enumerate(text.split("\n"), start=1):
        if len(line) > MAX_TOML_LINE:
            raise UnreadableInput(
                f"line {number} has {len(line)} characters; {MAX_TOML_LINE} are read"
            )
    try:
        content = tomllib.loads(text)
    except RecursionError as error:
        raise _too_deep() from error
    except tomllib.TOMLDecodeError as error:
        raise UnreadableInput(f"not a TOML file: {error}") from error
    except ValueError as error:
        raise _too_many_digits() from error
    _require_shallow(content)
    return content


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableInput(f"{kind_of(status.st_mode)}, not a file")


def _require_shallow(content: Any) -> None:
    """Raise UnreadableInput where containers are nested too deep for recursive code."""
    level = [content]
    for _ in range(MAX_DEPTH):
        containers = [x for x in level if isinstance(x, dict | list)]
        if not containers:
            return
        level = [y for x in containers for y in (x.values() if isinstance(x, dict) else x)]
    raise _too_deep()


def _too_deep() -> UnreadableInput:
    return UnreadableInput(f"objects nested more than {MAX_DEPTH} deep")


def _too_many_digits() -> UnreadableInput:
    return UnreadableInput(f"an integer of more than {sys.get_int_max_str_digits()} digits")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise UnreadableInput(f"{number[:20]}, which is larger than any number that is stored")
    return value


def _no_number(name: Literal["NaN", "Infinity", "-Infinity"] | str) -> NoReturn:
    raise UnreadableInput(f"{name}, which JSON does not have")
