# SPDX-License-Identifier: Apache-2.0
"""Seeded damages of files: to their bytes, and to the values that they store."""

from __future__ import annotations

import copy
import json
import random
import re
from typing import Any

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, -(10**9), 0.5, -0.0, 1e308, -1e308,
    1e-320, float("nan"), float("inf"), float("-inf"), "", "0", "x", "\0", "\x1b[2J", "\u202e",
    "\ud800", "../x", "/etc/passwd", "a" * 5000, [], {}, [[]], [None], {"": None}, [0] * 5000,
]  # fmt: skip
TOKENS = [
    "nan", "inf", "-1", "0", "1e308", "99999999999999999999", '""', '"x"', "true", "[]", "{}",
    "[[1]]", "1979-05-27", "'\\u202e'", "{a.b.c = 1}", "[" * 200, "=", "\0", '"""',
    "x" * 2000, "a." * 200,
]  # fmt: skip
KEYS = ["", "x", "\x1b", "format"]
RAW = [
    b"\0",
    b"\xff",
    b"\xfe\xff",
    b"\xed\xa0\x80",
    b"\xc2\x9b",
    b"{" * 3000,
    b"[" * 3000,
    b'"',
    b"\\u",
]


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """Return the content with a bit flipped, or a piece removed, repeated, or put in."""
    at = draw.randrange(len(content) + 1)
    to = min(len(content), at + draw.choice([1, 2, 8, 50, 1000]))
    match draw.randrange(6):
        case 0 if at < len(content):
            return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
        case 1:
            return content[:at] + content[to:]
        case 2:
            return content[:to] + content[at:]
        case 3:
            return content[:at]
        case 4:
            return content[:at] + draw.choice(RAW) + content[at:]
        case _:
            return content[:at] + draw.randbytes(to - at) + content[to:]


def damaged_json(content: Any, draw: random.Random) -> str:
    """Return JSON whose content differs in one or two places, NaN and infinity included."""
    content = copy.deepcopy(content)
    for _ in range(draw.choice([1, 1, 1, 2])):
        places = list(_places(content))
        if not places:
            break
        container, key = draw.choice(places)
        match draw.randrange(5):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[draw.choice(KEYS)] = copy.deepcopy(draw.choice(VALUES))
            case 2:
                container[key] = [container[key]]
            case _:
                container[key] = copy.deepcopy(draw.choice(VALUES))
    return json.dumps(content)


def damaged_text(text: str, draw: random.Random) -> str:
    """Return lines with one value, one line or one character exchanged."""
    lines = text.split("\n")
    at = draw.randrange(len(lines))
    match draw.randrange(4):
        case 0:
            lines[at] = re.sub(r"[^=:]*$", lambda _: draw.choice(TOKENS), lines[at], count=1)
        case 1:
            lines.insert(at, draw.choice(lines))
        case 2:
            del lines[at]
        case _:
            lines[at] = draw.choice(TOKENS) + lines[at]
    return "\n".join(lines)


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Return every container with each of its keys, or indices."""
    found: list[tuple[Any, Any]] = []
    waiting = [content]
    while waiting:
        container = waiting.pop()
        keys = range(len(container)) if isinstance(container, list) else list(container)
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                waiting.append(container[key])
    return found
