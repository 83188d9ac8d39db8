# SPDX-License-Identifier: Apache-2.0
"""Prompt files: one prompt per line, or one JSON object per line."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from pw_runtime.errors import BadRequest
from pw_runtime.types import Prompt

ID_KEYS = ("id", "prompt_id")
TEXT_KEYS = ("text", "prompt", "caption")
SAFE_ID = re.compile(r"(?!\.)[^/\\\x00-\x1f]+")
MAX_ID_BYTES = 200  # file systems take 255, and we add endings


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Read a prompt file.

    JSON lines where the name ends in .jsonl or the first line starts with "{"; otherwise plain
    text. Blank lines are skipped. A prompt without an id gets its 0-based line number.

    Raises BadRequest for a missing, empty or non-UTF-8 file, a malformed line (with its
    1-based number), an id that cannot name a file, or an id used twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise BadRequest(
            f"{path} is not UTF-8 text",
            got=f"byte 0x{error.object[error.start]:02x} at offset {error.start}",
            do="save the file as UTF-8",
        ) from error
    except OSError as error:
        raise BadRequest(
            f"cannot read the prompt file {path}", got=error.strerror, do="check the path"
        ) from error
    filled = [(number, line.strip()) for number, line in enumerate(lines) if line.strip()]
    if not filled:
        raise BadRequest(f"{path} holds no prompt", wanted="one prompt per line")
    as_json = path.suffix == ".jsonl" or filled[0][1].startswith("{")
    pairs = [
        _from_json(line, number, path) if as_json else (str(number), line)
        for number, line in filled
    ]
    return make_prompts(pairs)


def make_prompts(pairs: list[tuple[str, str]]) -> tuple[Prompt, ...]:
    """Return prompts numbered from 1. Raises BadRequest for unusable or repeated ids."""
    prompts = tuple(
        Prompt(id=prompt_id, text=text, position=position)
        for position, (prompt_id, text) in enumerate(pairs, start=1)
    )
    seen: set[str] = set()
    for prompt in prompts:
        if not _can_name_a_file(prompt.id):
            raise BadRequest(
                f"the id of prompt {prompt.position} cannot name a file",
                got=ascii(prompt.id),
                wanted=f"at most {MAX_ID_BYTES} bytes, no slashes, no leading dot",
                do="change the id",
            )
        if not _is_text(prompt.text):
            raise BadRequest(
                f"prompt {prompt.id} is not text",
                got=ascii(prompt.text)[:80],
                wanted="Unicode characters without lone surrogates",
                do="write the prompt anew, or check the locale of the terminal",
            )
        if prompt.id in seen:
            raise BadRequest(
                f"two prompts have the id {prompt.id!r}",
                do="give each prompt an id of its own: it names the clip",
            )
        seen.add(prompt.id)
    return prompts


def _from_json(line: str, number: int, path: Path) -> tuple[str, str]:
    where = f"{path}, line {number + 1}"
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRequest(
            f"{where} is not JSON",
            got=f"{error}: {line[:60]}",
            wanted="one JSON object per line: the name ends in .jsonl or the first line opens {",
            do="mend the line, or begin the first prompt of a text file with another character",
        ) from error
    texts = [entry[k] for k in TEXT_KEYS if k in entry] if isinstance(entry, dict) else []
    if not texts or not isinstance(texts[0], str) or not texts[0].strip():
        raise BadRequest(
            f"{where} has no prompt",
            got=line[:60],
            wanted='an object with "text", for instance {"id": "cat", "text": "A cat."}',
        )
    ids = [entry[k] for k in ID_KEYS if k in entry] or [number]
    if isinstance(ids[0], bool) or not isinstance(ids[0], str | int):
        raise BadRequest(f"{where} has an unusable id", got=ids[0], wanted="a string or an integer")
    return str(ids[0]), texts[0].strip()


def _can_name_a_file(prompt_id: str) -> bool:
    try:
        size = len(os.fsencode(prompt_id))
    except UnicodeEncodeError:
        return False
    return size <= MAX_ID_BYTES and SAFE_ID.fullmatch(prompt_id) is not None


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
