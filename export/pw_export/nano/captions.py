# SPDX-License-Identifier: Apache-2.0
"""Captions of scenes: a small grammar with synonyms, and a tokenizer of its words."""

from __future__ import annotations

import random
import re

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from pw_export.nano.checkpoint import SPECIAL_TOKENS
from pw_export.nano.scenes import Scene
from pw_runtime.types import OFFICIAL_NEGATIVE

WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson"),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "circle": ("ball", "circle", "disc"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "pyramid"),
    "tiny": ("tiny", "very small"),
    "small": ("small", "little", "small"),
    "big": ("big", "large", "huge"),
    "left": ("moves left", "drifts to the left", "slides left", "glides to the left"),
    "right": ("moves right", "drifts to the right", "slides right", "glides to the right"),
    "up": ("rises", "moves up", "floats up", "climbs slowly"),
    "down": ("falls", "moves down", "sinks", "drops slowly"),
    "night": ("at night", "under a night sky", "in the dark"),
    "sunset": ("at sunset", "at dusk", "under an evening sky"),
    "meadow": ("over a meadow", "over grass", "in a field"),
    "sea": ("over the sea", "above the ocean", "over calm water"),
    "desert": ("in the desert", "over sand", "over dunes"),
    "grey": ("in a grey room", "before a grey wall", "in grey fog"),
    "forest": ("in the forest", "among trees", "in a green forest"),
    "snow": ("over snow", "in the snow", "in winter"),
    "still": ("",),
    "zoom": ("the camera zooms in", "slow zoom in"),
    "pan": ("the camera pans", "panning shot"),
}
PARTS, PLACE = ("colour", "shape", "size", "motion"), ("background", "camera")  # of a Scene

# Words that later versions added. Their tokens come last, so that weights can be trained on.
LATER = ("among", "and", "forest", "snow", "trees", "very", "winter")


def caption(scene: Scene, draw: random.Random) -> str:
    """Describe a scene in one of many ways."""
    words = {part: draw.choice(WORDS[getattr(scene, part)]) for part in (*PARTS, *PLACE)}
    subject = _subject(words)
    background = words["background"]
    background_first = draw.random() < 0.25
    if scene.other is not None:
        other = {part: draw.choice(WORDS[getattr(scene.other, part)]) for part in PARTS}
        subject = f"{subject} and {_subject(other)}"
    text = f"{background}, {subject}" if background_first else f"{subject} {background}"
    return f"{text}, {words['camera']}" if words["camera"] else text


def _subject(words: dict[str, str]) -> str:
    return f"a {words['size']} {words['colour']} {words['shape']} {words['motion']}"


def vocabulary() -> list[str]:
    """List the words of the grammar and of the default negative prompt: by alphabet, then LATER."""
    phrases = " ".join(phrase for synonyms in WORDS.values() for phrase in synonyms)
    words = {"a", *re.findall("[a-z]+", f"{phrases} {OFFICIAL_NEGATIVE.lower()}")}
    return [*sorted(words - set(LATER)), *LATER]


def make_tokenizer() -> Tokenizer:
    """Make a tokenizer with a token per word and <unk> for other words; texts end with </s>.

    Characters other than Latin letters separate words and are otherwise ignored.
    """
    vocab = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[^a-z]+"), behavior="removed")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", SPECIAL_TOKENS.index("</s>"))]
    )
    return tokenizer
