# SPDX-License-Identifier: Apache-2.0
"""The files of a tokenizer, checked before they are copied into a bundle."""

from __future__ import annotations

from pathlib import Path

from pw_export.checkpoints.file_kinds import remains_of_download
from pw_runtime.errors import BadWeights

_WANTED = "the files of google/umt5-xxl in Wan-AI/Wan2.2-TI2V-5B"


def require_tokenizer(folder: Path, vocab_size: int) -> tuple[Path, ...]:
    """Return the files of a tokenizer, all of which a bundle keeps.

    Args:
        folder: contains tokenizer.json or spiece.model.
        vocab_size: rows of the text encoder's token table.

    Raises BadWeights for a file that is a download's remains instead of itself, for a tokenizer
    that cannot be read, and for one with more tokens than the table has rows.
    """
    files = tuple(sorted(file for file in folder.iterdir() if file.is_file()))
    for file in files:
        if file.suffix in (".json", ".model"):
            _require_content(file)
    table = folder / "tokenizer.json"
    tokens = _tokens(table) if table in files else _tokens_of_pieces(folder)
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
        raise BadWeights(f"{file} cannot be read", got=got, wanted=_WANTED, do=remedy)


def _tokens_of_pieces(folder: Path) -> int:
    from transformers import AutoTokenizer  # as the runtime will; takes seconds to import

    try:
        return len(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # it may lack packages, files or sense
        raise BadWeights(
            f"{folder} has no tokenizer that can be read",
            got="no tokenizer.json, and files that transformers cannot read here",
            wanted=f"tokenizer.json, one of {_WANTED}",
            do="download that file into the folder",
        ) from error


def _tokens(file: Path) -> int:
    from tokenizers import Tokenizer  # not needed for a checkpoint that is refused

    try:
        return int(Tokenizer.from_file(str(file)).get_vocab_size())
    except Exception as error:  # the library raises nothing more exact
        raise BadWeights(
            f"{file} cannot be read",
            got="no tokenizer that the tokenizers library can build",
            wanted=_WANTED,
            do="download it again",
        ) from error
