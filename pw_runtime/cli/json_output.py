# SPDX-License-Identifier: Apache-2.0
"""JSON for programs: one document on stdout (docs/json.md). Imports the standard library alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

FORMAT: Final = 1  # raised where the meaning of a key changes; new keys may come without that


def json_text(document: Mapping[str, Any]) -> str:
    """Return a document, its `format` first, in ASCII: any encoding of stdout has it."""
    return json.dumps({"format": FORMAT, **document}, indent=2)


@contextmanager
def document_of_refusal(empty: Mapping[str, Any], *, enabled: bool) -> Iterator[None]:
    """Print the document of a block that fails; one that does not is followed by another's.

    Args:
        empty: all keys, and what they hold.
        enabled: print it.
    """
    try:
        yield
    except BaseException:
        with one_document(empty, enabled=enabled):
            raise


@contextmanager
def one_document(empty: Mapping[str, Any], *, enabled: bool) -> Iterator[dict[str, Any]]:
    """Print the document that the block fills, however it ends; `error` says what ended it.

    Args:
        empty: all keys, and what they hold where the block does not fill them.
        enabled: print it.
    """
    document = dict(empty)
    try:
        yield document
    except BaseException as error:
        stopped = "interrupted" if not isinstance(error, Exception) else type(error).__name__
        document["error"] = str(error) or stopped
        raise
    finally:
        if enabled:
            print(json_text(document), flush=True)
