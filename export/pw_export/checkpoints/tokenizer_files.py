# SPDX-License-Identifier: Apache-2.0
"""The files of a tokenizer, checked before they are copied into a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pw_export.checkpoints.file_kinds import remains_of_download
from pw_runtime.checkpoint.tokenizer import (
    MAX_TOKENIZER,
    PUBLISHED,
    SETTINGS_FILE,
    TOKENIZER_FILE,
    parse_tokenizer,
)
from pw_runtime.errors import BadWeights
from pw_runtime.models.tokenizer import TextTokenizer
from pw_runtime.system.input_files import UnreadableInput, read_input

FILES: Final = (
    *("added_tokens.json", "special_tokens_map.json", "spiece.model"),
    *(TOKENIZER_FILE, SETTINGS_FILE),
)


def require_tokenizer(folder: Path, vocab_size: int) -> tuple[Path, ...]:
    """Return the files of a tokenizer, which a bundle keeps; the folder may have others.

    Args:
        folder: contains tokenizer.json or spiece.model.
        vocab_size: rows of the text encoder's token table.

    Raises BadWeights for a file that is a download's remains instead of itself, for a tokenizer
    that cannot be read, and for one with more tokens than the table has rows.
    """
    files = tuple(folder / name for name in FILES if (folder / name).is_file())
    for file in files:
        _require_content(file)
    tokens = _tokenizer(folder).size
    if tokens > vocab_size:
        raise BadWeights(
            f"{folder} is not the tokenizer of this text encoder",
            got=f"{tokens} tokens",
            wanted=f"at most {vocab_size}, the rows of the token table",
            do="take tokenizer and text encoder from one checkpoint",
        )
    return files


def _require_content(file: Path) -> None:
    if remains := remains_of_download(file):
        got, remedy = remains
        raise BadWeights(f"{file} cannot be read", got=got, wanted=PUBLISHED, do=remedy)


def _tokenizer(folder: Path) -> TextTokenizer:
    content = {}
    for file in (folder / TOKENIZER_FILE, folder / SETTINGS_FILE):
        if file.exists():
            try:
                content[file.name] = read_input(file, MAX_TOKENIZER)
            except UnreadableInput as error:
                raise BadWeights(
                    f"{file} cannot be read", got=error, wanted=PUBLISHED, do="download it again"
                ) from error
    return parse_tokenizer(folder, content, do="download the folder again")
