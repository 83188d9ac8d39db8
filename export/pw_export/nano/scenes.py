# SPDX-License-Identifier: Apache-2.0
"""Procedural clips with known content: a shape that moves over a landscape.

A scene is drawn from a number. Its lengths are in units of the picture's height, so that it can be
rendered at any size, with plain tensor arithmetic on any device.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

Colour = tuple[float, float, float]

COLOURS: dict[str, Colour] = {
    "red": (0.88, 0.10, 0.12),
    "yellow": (0.98, 0.86, 0.08),
    "green": (0.06, 0.58, 0.14),
    "cyan": (0.05, 0.78, 0.82),
    "blue": (0.10, 0.22, 0.92),
    "purple": (0.62, 0.12, 0.80),
}
SHAPES = ("circle", "square", "triangle")
SIZES: dict[str, float] = {"small": 0.19, "big": 0.26}  # radius of the circle
MOTIONS: dict[str, tuple[float, float]] = {  # across the picture, rows downwards
    "left": (-0.72, 0.0),
    "right": (0.72, 0.0),
    "up": (0.0, -0.40),
    "down": (0.0, 0.40),
}
CAMERAS = ("still", "zoom", "pan")
ASPECT = 2.0  # width of the picture in units of its height


@dataclass(frozen=True, slots=True)
class Landscape:
    """Colours of a background, more muted than those of the shapes."""

    top: Colour
    horizon: Colour
    ground: Colour


BACKGROUNDS: dict[str, Landscape] = {
    "night": Landscape((0.02, 0.03, 0.10), (0.12, 0.13, 0.24), (0.05, 0.05, 0.08)),
    "sunset": Landscape((0.38, 0.30, 0.46), (0.90, 0.66, 0.52), (0.26, 0.20, 0.24)),
    "meadow": Landscape((0.60, 0.74, 0.86), (0.82, 0.88, 0.90), (0.50, 0.62, 0.40)),
    "sea": Landscape((0.70, 0.80, 0.86), (0.88, 0.90, 0.90), (0.32, 0.46, 0.56)),
    "desert": Landscape((0.72, 0.80, 0.86), (0.90, 0.88, 0.82), (0.78, 0.68, 0.52)),
    "grey": Landscape((0.46, 0.46, 0.46), (0.62, 0.62, 0.62), (0.36, 0.36, 0.36)),
}


@dataclass(frozen=True, slots=True)
class Scene:
    """Attributes of a caption, then details it leaves open; lengths in heights of the picture."""

    colour: str
    shape: str
    size: str
    motion: str
    background: str
    camera: str
    x: float  # centre of the shape at half time
    y: float
    dx: float  # its displacement from the first frame to the last
    dy: float
    radius: float
    hills: float  # phase of the horizon

    @property
    def held_out(self) -> bool:
        """True if no training clip has this combination of colour, shape, motion, background."""
        indices = (
            list(COLOURS).index(self.colour),
            SHAPES.index(self.shape),
            list(MOTIONS).index(self.motion),
            list(BACKGROUNDS).index(self.background),
        )
        factors = (1, 2, 4, 3)
        return sum(i * factor for i, factor in zip(indices, factors, strict=True)) % 9 == 0


def draw_scene(number: int) -> Scene:
    """Draw the scene of a number, the same everywhere."""
    draw = random.Random(number)
    colour, background = draw.choice(list(COLOURS)), draw.choice(list(BACKGROUNDS))
    shape, size = draw.choice(SHAPES), draw.choice(list(SIZES))
    motion = draw.choice(list(MOTIONS))
    camera = draw.choices(CAMERAS, (8, 1, 1))[0]
    motion_x, motion_y = MOTIONS[motion]
    pace = draw.uniform(0.92, 1.08)
    across = draw.uniform(-1, 1)
    return Scene(
        colour=colour,
        shape=shape,
        size=size,
        motion=motion,
        background=background,
        camera=camera,
        x=ASPECT / 2 + (0.45 * across if motion_x == 0 else draw.uniform(-0.04, 0.04)),
        y=0.5 + (0.14 * across if motion_y == 0 else draw.uniform(-0.02, 0.02)),
        dx=motion_x * pace,
        dy=motion_y * pace,
        radius=SIZES[size] * draw.uniform(0.95, 1.05),
        hills=draw.uniform(0, 2 * math.pi),
    )


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of the picture, in pixels."""

    left: int
    top: int
    width: int
    height: int


def render(
    scene: Scene,
    width: int,
    height: int,
    frames: int,
    *,
    window: Window | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Render a clip, with edges smoothed over two pixels.

    Args:
        scene: the scene.
        width, height: size of the whole picture in pixels.
        frames: F, evenly spaced from the beginning of the motion to its end.
        window: render only this rectangle.
        device: device to render on.

    Returns:
        [3, F, rows, columns] in [-1, 1].
    """
    window = window or Window(0, 0, width, height)
    time = torch.linspace(0, 1, frames, device=device).view(-1, 1, 1)
    columns = torch.arange(window.left, window.left + window.width, device=device)
    rows = torch.arange(window.top, window.top + window.height, device=device)
    x = ((columns + 0.5) / height * (ASPECT * height / width)).view(1, 1, -1)
    y = ((rows + 0.5) / height).view(1, -1, 1)
    zoom = 1 + 0.35 * time if scene.camera == "zoom" else torch.ones_like(time)
    x, y = ASPECT / 2 + (x - ASPECT / 2) / zoom, 0.5 + (y - 0.5) / zoom
    pixels = zoom * height / 2  # pairs of pixels per unit of length
    picture = _landscape(scene, x, y, time, pixels)
    offset = x - (scene.x + scene.dx * (time - 0.5)), y - (scene.y + scene.dy * (time - 0.5))
    cover = (0.5 - outside(scene.shape, *offset, scene.radius) * pixels).clamp(0, 1)
    light = 1.0 - 0.12 * (offset[1] / scene.radius).clamp(-1, 1)
    paint = picture.new_tensor(COLOURS[scene.colour]).view(3, 1, 1, 1) * light
    picture = torch.lerp(picture, paint.expand_as(picture), cover.expand(picture.shape[1:]))
    return picture.clamp_(0, 1).mul_(2).sub_(1)


def _landscape(scene: Scene, x: Tensor, y: Tensor, time: Tensor, pixels: Tensor) -> Tensor:
    """Render sky and ground, [3, F, rows, columns]."""
    colours = BACKGROUNDS[scene.background]
    top, horizon, ground = (
        x.new_tensor(colour).view(3, 1, 1, 1)
        for colour in (colours.top, colours.horizon, colours.ground)
    )
    along = x + 0.5 * time if scene.camera == "pan" else x
    edge = 0.70 + 0.05 * torch.sin(2 * math.pi * along / 1.4 + scene.hills)
    sky = top + (horizon - top) * (y / 0.7).clamp(0, 1)
    cover = (0.5 + (y - edge) * pixels).clamp(0, 1)
    return torch.lerp(sky.expand(3, *cover.shape), ground.expand(3, *cover.shape), cover)


def outside(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Return the signed distance from the edge, positive outside; all areas are about equal."""
    if shape == "circle":
        return torch.sqrt(x * x + y * y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.886 * radius
    inner = 0.72 * radius  # radius of the circle inside the triangle
    slope = 0.866 * x.abs() - 0.5 * y
    return torch.maximum(slope, y.expand_as(slope)) - inner
