# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a checkpoint or bundle, from the content of its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pw_runtime.errors import BadWeights
from pw_runtime.models.tokenizer import TextTokenizer, build_tokenizer
from pw_runtime.system.input_files import parse_json

TOKENIZER_FILE: Final = "tokenizer.json"
SETTINGS_FILE: Final = "tokenizer_config.json"
MAX_TOKENIZER: Final = 256 * 2**20  # bytes; the published one has 17 MB
PUBLISHED: Final = "the files of google/umt5-xxl in Wan-AI/Wan2.2-TI2V-5B"


def parse_tokenizer(folder: Path, files: Mapping[str, bytes], *, do: str) -> TextTokenizer:
    """Build the tokenizer of a text encoder.

    Args:
        folder: where the files are from, for messages.
        files: contents of TOKENIZER_FILE and, if there is one, of SETTINGS_FILE.
        do: remedy for files that are damaged.

    Raises BadWeights for a tokenizer that is only a SentencePiece model, or damaged.
    """
    if TOKENIZER_FILE not in files:
        raise BadWeights(
            f"{folder} has no tokenizer that can be read",
            got=f"no {TOKENIZER_FILE}; a SentencePiece model (spiece.model) alone is not read",
            wanted=f"{TOKENIZER_FILE}, one of {PUBLISHED}",
            do="download that file into the folder of the checkpoint's tokenizer, then convert; or "
            "make it with the packages transformers and sentencepiece: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        )
    try:
        settings = parse_json(files[SETTINGS_FILE].decode()) if SETTINGS_FILE in files else {}
        return build_tokenizer(files[TOKENIZER_FILE].decode(), settings)
    except Exception as error:  # a damaged file may make the library raise anything
        raise BadWeights(
            f"cannot read the tokenizer in {folder}", got=error, wanted=PUBLISHED, do=do
        ) from error
