# SPDX-License-Identifier: Apache-2.0
"""Prompt files: one prompt per line, or one JSON object per line."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pw_runtime.errors import BadRequest
from pw_runtime.system.input_files import UnreadableInput, parse_json, read_text, size_of
from pw_runtime.system.printable import printable
from pw_runtime.types import Prompt

ID_KEYS = ("id", "prompt_id")
TEXT_KEYS = ("text", "prompt", "caption")
SOURCE_KEYS = ("image", "draft_video")
SAFE_ID = re.compile(r"(?!\.)[^/\\\t\n\u2028\u2029]+")
MAX_ID_BYTES = 200  # file systems take 255, and we add endings
MAX_FILE_BYTES = 256 * 2**20
_OTHER_FORMATS = (".json", ".csv", ".tsv")
MAX_CHARACTERS = 100_000  # of a prompt; the text encoders see about a thousand of them


def read_prompts(
    path: Path, notice: Callable[[str], None] = lambda text: None
) -> tuple[Prompt, ...]:
    """Read a prompt file.

    JSON lines where the name ends in .jsonl or the first line starts with "{"; otherwise plain
    text. Blank lines are skipped. A prompt without an id gets its 0-based line number. `notice`
    is called with the keys of JSON lines that are not used.

    Raises BadRequest for a file that is missing, empty, not UTF-8 or too large, a malformed line
    (with its 1-based number), an id that cannot name a file, or an id used twice.
    """
    try:
        lines = re.split(r"\r\n?|\n", read_text(path, MAX_FILE_BYTES))
    except UnreadableInput as error:
        raise BadRequest(
            f"cannot read the prompt file {path}",
            got=error,
            wanted=f"UTF-8 text of at most {size_of(MAX_FILE_BYTES)}",
            do="check the path, or save the prompts in such a file",
        ) from error
    filled = [(number, line.strip()) for number, line in enumerate(lines) if line.strip()]
    if not filled:
        raise BadRequest(
            f"{path} holds no prompt",
            got="no line with text",
            wanted="one prompt per line",
            do="write prompts into it, or give --prompt TEXT",
        )
    as_json = path.suffix.lower() == ".jsonl" or filled[0][1].startswith("{")
    if not as_json and (path.suffix.lower() in _OTHER_FORMATS or _is_json_list(lines)):
        raise BadRequest(
            f"{path} is a table or a list, whose lines are not prompts",
            got=f"a first line of {printable(filled[0][1])[:40]!r}",
            wanted='one prompt per line, or one JSON object per line such as {"text": "a cat"}',
            do="save it in one of these forms, as .txt or .jsonl",
        )
    unused: dict[str, None] = {}
    prompts = [
        _from_json(line, number, path, unused) if as_json else Prompt(id=str(number), text=line)
        for number, line in filled
    ]
    if unused:
        names = ", ".join(printable(name) for name in unused)
        notice(f"{path} has keys that are not used: {names}")
    return _numbered(prompts)


def _is_json_list(lines: Sequence[str]) -> bool:
    """Tell whether a text that begins like a JSON list is one."""
    try:
        return isinstance(parse_json("\n".join(lines)), list)
    except UnreadableInput:
        return False


def make_prompts(pairs: list[tuple[str, str]]) -> tuple[Prompt, ...]:
    """Return prompts numbered from 1, of pairs of id and text.

    Raises BadRequest as `check_prompts` does.
    """
    return _numbered([Prompt(id=prompt_id, text=text) for prompt_id, text in pairs])


def _numbered(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Return prompts with their positions, from 1. Raises BadRequest as `check_prompts` does."""
    numbered = tuple(replace(prompt, position=i) for i, prompt in enumerate(prompts, start=1))
    check_prompts(numbered)
    return numbered


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Raise BadRequest for prompts that cannot be made in one run.

    These are unusable ids and texts, positions below 1, and ids that some file systems cannot tell
    apart: equal ones, and those that differ by case or by Unicode's normal form alone.
    """
    if not prompts:
        raise BadRequest("there is no prompt", do="give at least one")
    seen: dict[str, str] = {}
    for count, prompt in enumerate(prompts, start=1):
        if prompt.position < 1:
            raise BadRequest(
                f"the position of prompt {prompt.id!a} is below 1", got=prompt.position
            )
        if not _can_name_a_file(prompt.id):
            raise BadRequest(
                f"the id of prompt {prompt.position} cannot name a file",
                got=ascii(prompt.id),
                wanted=f"at most {MAX_ID_BYTES} bytes of {sys.getfilesystemencoding()}, "
                "no slashes, no control characters, no leading dot",
                do="change the id",
            )
        check_text(f"prompt {prompt.id}", prompt.text)
        name = unicodedata.normalize("NFC", unicodedata.normalize("NFD", prompt.id).casefold())
        other = seen.setdefault(name, prompt.id)
        if other == prompt.id and len(seen) < count:
            raise BadRequest(
                f"two prompts have the id {prompt.id!r}",
                do="give each prompt an id of its own: it names the clip",
            )
        if other != prompt.id:
            raise BadRequest(
                f"the ids of two prompts differ by case or by Unicode's normal form alone: "
                f"{other!r} and {prompt.id!r}",
                got=f"{other!a} and {prompt.id!a}",
                wanted="names that every file system can tell apart",
                do="change one of them",
            )


def check_text(name: str, text: str) -> None:
    """Raise BadRequest where the text called `name` is too long, or cannot be stored as UTF-8."""
    if len(text) > MAX_CHARACTERS:
        raise BadRequest(
            f"{name} is too long",
            got=f"{len(text)} characters",
            wanted=f"at most {MAX_CHARACTERS}",
            do="shorten it: the model reads the first few hundred words",
        )
    if not _is_text(text):
        raise BadRequest(
            f"{name} is not text",
            got=ascii(text)[:80],
            wanted="Unicode characters without lone surrogates",
            do="write the prompt anew, or check the locale of the terminal",
        )


def _from_json(line: str, number: int, path: Path, unused: dict[str, None]) -> Prompt:
    """Return the prompt of a line; add the keys that it has beside those of one to `unused`."""
    where = f"{path}, line {number + 1}"
    try:
        entry = parse_json(line)
    except UnreadableInput as error:
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
        raise BadRequest(
            f"{where} has an unusable id",
            got="null" if ids[0] is None else ids[0],
            wanted="a string or an integer",
            do="give the prompt another id, or leave it out: then it is the line's number",
        )
    used = {next(k for k in TEXT_KEYS if k in entry), *[k for k in ID_KEYS if k in entry][:1]}
    used |= {*SOURCE_KEYS}
    unused.update(dict.fromkeys(key for key in entry if key not in used))
    sources = {
        key: _source(entry[key], key, path, where)
        for key in SOURCE_KEYS
        if entry.get(key) is not None  # null, as tools write a column without a value
    }
    prompt = Prompt(id=str(ids[0]), text=texts[0].strip())
    return replace(prompt, image=sources.get("image"), draft_video=sources.get("draft_video"))


def _source(name: object, key: str, path: Path, where: str) -> Path:
    """Return the path of what a prompt starts from; a relative one is beside the prompt file."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise BadRequest(
            f"{where} has an unusable {key}",
            got=ascii(name)[:60],
            wanted="the path of a file, relative to the prompt file",
        )
    return path.parent / name


def _can_name_a_file(prompt_id: str) -> bool:
    try:
        size = len(os.fsencode(prompt_id))
    except UnicodeEncodeError:
        return False
    safe = SAFE_ID.fullmatch(prompt_id) is not None and printable(prompt_id) == prompt_id
    return size <= MAX_ID_BYTES and safe


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
