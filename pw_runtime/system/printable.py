# SPDX-License-Identifier: Apache-2.0
"""Text of others, made safe for a terminal."""

from __future__ import annotations

import re
from typing import Final

# Everything by which text moves the cursor, sets colours, asks the terminal for an answer or reads
# otherwise than it is stored: C0 (without tab and line feed), DEL, C1; marks, embeddings, overrides
# and isolates of direction; annotations; surrogates, which no encoding has.
_UNSAFE: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufff9-\ufffb"
    "\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Return the text with every unsafe character escaped as Python does: `\x1b`, `\u202e`."""
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)
