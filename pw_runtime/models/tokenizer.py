# SPDX-License-Identifier: Apache-2.0
"""Texts to the token ids of a text encoder, by the tokenizers library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of a text."""

    ids: tuple[int, ...]  # end token included, at most as many as asked for
    whole: int  # tokens of the text that was not truncated
    unknown: tuple[str, ...]  # parts of the text that the vocabulary lacks, each once


@dataclass(frozen=True, slots=True)
class TextTokenizer:
    """A tokenizer, and the id that it gives to what its vocabulary lacks, if there is one."""

    tokenizer: Tokenizer
    unknown: int | None

    @property
    def size(self) -> int:
        """Number of tokens, special ones included."""
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str, limit: int) -> Tokens:
        """Encode a text as at most `limit` tokens; the special ones at its end are kept."""
        words = self.tokenizer.encode(text, add_special_tokens=False)
        unknown = dict.fromkeys(
            text[start:end]
            for token, (start, end) in zip(words.ids, words.offsets, strict=True)
            if token == self.unknown
        )
        special = self.tokenizer.num_special_tokens_to_add(is_pair=False)
        whole = len(words) + special
        words.truncate(limit - special)
        return Tokens(tuple(self.tokenizer.post_process(words).ids), whole, tuple(unknown))


def build_tokenizer(described: str, settings: Mapping[str, Any]) -> TextTokenizer:
    """Build a tokenizer with the token ids that transformers' fast tokenizer gives.

    Args:
        described: content of tokenizer.json, which alone says how texts are divided.
        settings: content of tokenizer_config.json, which names special tokens; may be empty.

    Raises what the tokenizers library raises for a description that it cannot use, and ValueError
    for special tokens with other ids than the settings declare.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(described)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token in _special_tokens(settings):
        if token.content not in known:
            add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
            add([token])
            known.add(token.content)
    for number, entry in settings.get("added_tokens_decoder", {}).items():
        if tokenizer.token_to_id(entry["content"]) != int(number):
            raise ValueError(
                f"{entry['content']} is token {tokenizer.token_to_id(entry['content'])} of "
                f"tokenizer.json and {number} of tokenizer_config.json"
            )
    unknown = _content(settings.get("unk_token")) or getattr(tokenizer.model, "unk_token", None)
    return TextTokenizer(tokenizer, None if unknown is None else tokenizer.token_to_id(unknown))


def _special_tokens(settings: Mapping[str, Any]) -> Iterator[AddedToken]:
    """List the tokens of tokenizer_config.json in the order in which transformers adds them."""
    numbered = settings.get("added_tokens_decoder", {})
    yield from (_token(numbered[key]) for key in sorted(numbered, key=int))
    yield from (_token(settings[f"{x}_token"]) for x in _NAMED if settings.get(f"{x}_token"))
    yield from (_token(entry) for name in _LISTS for entry in settings.get(name) or ())


def _token(entry: str | Mapping[str, Any]) -> AddedToken:
    from tokenizers import AddedToken

    if isinstance(entry, str):
        return AddedToken(entry, special=True, normalized=False)
    flags = {name: entry[name] for name in _FLAGS if name in entry}
    return AddedToken(entry["content"], special=entry.get("special", True), **flags)


def _content(entry: str | Mapping[str, Any] | None) -> str | None:
    return entry if entry is None or isinstance(entry, str) else str(entry["content"])
