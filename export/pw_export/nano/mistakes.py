# SPDX-License-Identifier: Apache-2.0
"""Scenes as a draft may get them wrong, for the high-res network to learn to put them right.

The draft network leaves some things undecided: a shape is another one, too wide or too narrow, or
there twice, because the caption does not say where it is.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Final

from pw_export.nano.scenes import SHAPES, Scene

TWICE: Final = 0.85  # share of mistaken drafts of one shape that show it twice
STRETCH: Final = 1.35  # the most that a shape is too wide or too narrow
APART: Final = (1.4, 3.2)  # distance of the two, in radii of the right one
LEAST: Final = 0.65  # radius of the second shape, relative to the right one's
GROWTH: Final = 0.4  # the most that one of two grows or shrinks during the clip
ALIKE: Final = 0.85  # from here on the two are alike, and the left one is right


def mistaken(scene: Scene, draw: random.Random) -> Scene:
    """Return a scene as a draft may get it wrong.

    One shape is stretched, and mostly there twice: the one that is larger at half time is right,
    and of two that are alike the left one. They may grow or shrink. Two shapes are stretched, and
    of any form.
    """
    if scene.other is not None:
        return replace(_deformed(scene, draw), other=_deformed(scene.other, draw))
    wrong = replace(scene, stretch=_stretch(draw))
    if draw.random() >= TWICE:
        return wrong
    distance = draw.uniform(*APART) * scene.radius
    places = [x for x in (scene.x - distance, scene.x + distance) if 0 < x < scene.width]
    x = draw.choice(places or [scene.width - scene.x])
    ratio = draw.uniform(LEAST, ALIKE if x < scene.x else 1.0)
    ghost = replace(scene, x=x, radius=ratio * scene.radius, stretch=_stretch(draw))
    return replace(_growing(wrong, draw), other=_growing(ghost, draw))


def _growing(scene: Scene, draw: random.Random) -> Scene:
    return replace(scene, growth=draw.uniform(-GROWTH, GROWTH) if draw.random() < 0.5 else 0.0)


def _deformed(scene: Scene, draw: random.Random) -> Scene:
    return replace(scene, shape=draw.choice(SHAPES), stretch=_stretch(draw))


def _stretch(draw: random.Random) -> float:
    return float(STRETCH ** draw.uniform(-1, 1))
