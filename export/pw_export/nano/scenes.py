# SPDX-License-Identifier: Apache-2.0
"""Procedural clips with known content: one or two shapes that move over a landscape.

A scene is drawn from a number. Its lengths are in units of the picture's shorter side, so that it
can be rendered at any size of the same aspect, with plain tensor arithmetic on any device.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

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
SIZES: dict[str, float] = {"small": 0.19, "big": 0.26, "tiny": 0.12}  # radius of the circle
MOTIONS: dict[str, tuple[int, int]] = {  # across the picture, rows downwards
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
CAMERAS = ("still", "zoom", "pan")
WIDE, SQUARE, TALL = 2.0, 1.0, 0.5  # aspects: width of the picture in units of its height
PAIRS = 0.2  # share of varied scenes with a second shape
LANE = 0.27  # distance of the paths of two shapes from the middle of the picture


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
    "forest": Landscape((0.50, 0.60, 0.54), (0.68, 0.74, 0.64), (0.14, 0.24, 0.17)),
    "snow": Landscape((0.60, 0.68, 0.78), (0.82, 0.86, 0.90), (0.94, 0.95, 0.97)),
}
FIRST_SIZES, FIRST_BACKGROUNDS = list(SIZES)[:2], list(BACKGROUNDS)[:6]  # of plain scenes


@dataclass(frozen=True, slots=True)
class Scene:
    """Attributes of a caption, then details it leaves open; lengths in shorter sides of a picture.

    A second shape, `other`, moves over the same landscape before the same camera.
    """

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
    aspect: float = WIDE
    other: Scene | None = None
    stretch: float = 1.0  # width of the shape in units of its height; of equal area
    growth: float = 0.0  # of the radius from the first frame to the last, in units of the radius

    @property
    def width(self) -> float:
        """Width of the picture."""
        return max(self.aspect, 1.0)

    @property
    def height(self) -> float:
        """Height of the picture."""
        return max(1 / self.aspect, 1.0)

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
        held_out = sum(i * factor for i, factor in zip(indices, factors, strict=True)) % 9 == 0
        return held_out or (self.other is not None and self.other.held_out)


def draw_scene(number: int, *, varied: bool = False, aspect: float = WIDE) -> Scene:
    """Draw the scene of a number, the same everywhere.

    Args:
        number: any integer.
        varied: draw from all sizes and landscapes, and a second shape in one of five scenes.
        aspect: width of the picture in units of its height.
    """
    draw = random.Random(number)
    colour = draw.choice(list(COLOURS))
    background = draw.choice(list(BACKGROUNDS) if varied else FIRST_BACKGROUNDS)
    shape, size = draw.choice(SHAPES), draw.choice(list(SIZES) if varied else FIRST_SIZES)
    motion = draw.choice(list(MOTIONS))
    camera = draw.choices(CAMERAS, (8, 1, 1))[0]
    motion_x, motion_y = MOTIONS[motion]
    width, height = max(aspect, 1.0), max(1 / aspect, 1.0)
    pace = draw.uniform(0.92, 1.08)
    across = draw.uniform(-1, 1)
    sideways = _beside(width) * across if motion_x == 0 else draw.uniform(-0.04, 0.04)
    scene = Scene(
        colour=colour,
        shape=shape,
        size=size,
        motion=motion,
        background=background,
        camera=camera,
        x=width / 2 + sideways,
        y=height / 2 + (_beside(height) * across if motion_y == 0 else draw.uniform(-0.02, 0.02)),
        dx=motion_x * _along(width) * pace,
        dy=motion_y * _along(height) * pace,
        radius=SIZES[size] * draw.uniform(0.95, 1.05),
        hills=draw.uniform(0, 2 * math.pi),
        aspect=aspect,
    )
    return _paired(scene, draw) if varied and draw.random() < PAIRS else scene


def _along(side: float) -> float:
    """Return the length of a motion along a side of a picture."""
    return 0.40 + 0.32 * (side - 1)


def _beside(side: float) -> float:
    """Return the largest distance of a path from the middle of a side of a picture."""
    return 0.14 + 0.31 * (side - 1)


def _paired(scene: Scene, draw: random.Random) -> Scene:
    """Add a shape of another colour; both become at most small and keep to lanes of their own."""
    colour = draw.choice([name for name in COLOURS if name != scene.colour])
    sizes = ("small", "tiny")
    across = MOTIONS[scene.motion][1] == 0
    motion = draw.choice(("left", "right") if across else ("up", "down"))
    lane = draw.choice((-LANE, LANE))
    shapes = []
    for name, sign in ((scene.motion, 1), (motion, -1)):
        size, pace = draw.choice(sizes), draw.uniform(0.92, 1.08)
        motion_x, motion_y = MOTIONS[name]
        offset = sign * lane * (1 + draw.uniform(-0.1, 0.1))
        shapes.append(
            replace(
                scene,
                size=size,
                motion=name,
                x=scene.width / 2 + (0.0 if across else offset * _spread(scene.width)),
                y=scene.height / 2 + (offset * _spread(scene.height) if across else 0.0),
                dx=motion_x * _along(scene.width) * pace,
                dy=motion_y * _along(scene.height) * pace,
                radius=SIZES[size] * draw.uniform(0.95, 1.05),
            )
        )
    other = replace(shapes[1], colour=colour, shape=draw.choice(SHAPES))
    return replace(shapes[0], other=other)


def _spread(side: float) -> float:
    """Return how much farther apart lanes are on a longer side of a picture."""
    return 1 + 0.6 * (side - 1)


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
    landscape: Landscape | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Render a clip, with edges smoothed over two pixels.

    Args:
        scene: the scene.
        width, height: size of the whole picture in pixels.
        frames: F, evenly spaced from the beginning of the motion to its end.
        window: render only this rectangle.
        landscape: colours of sky and ground; None: those of the scene's background.
        device: device to render on.

    Returns:
        [3, F, rows, columns] in [-1, 1].
    """
    window = window or Window(0, 0, width, height)
    time = torch.linspace(0, 1, frames, device=device).view(-1, 1, 1)
    columns = torch.arange(window.left, window.left + window.width, device=device)
    rows = torch.arange(window.top, window.top + window.height, device=device)
    x = ((columns + 0.5) / width * scene.width).view(1, 1, -1)
    y = ((rows + 0.5) / height * scene.height).view(1, -1, 1)
    zoom = 1 + 0.35 * time if scene.camera == "zoom" else torch.ones_like(time)
    x, y = (
        middle + (c - middle) / zoom for c, middle in ((x, scene.width / 2), (y, scene.height / 2))
    )
    pixels = zoom * height / scene.height / 2  # pairs of pixels per unit of length
    colours = landscape or BACKGROUNDS[scene.background]
    picture = _landscape(scene, colours, x, y, time, pixels)
    for shape in (scene, scene.other):
        if shape is not None:
            picture = _painted(picture, shape, x, y, time, pixels)
    return picture.clamp_(0, 1).mul_(2).sub_(1)


def _painted(
    picture: Tensor, scene: Scene, x: Tensor, y: Tensor, time: Tensor, pixels: Tensor
) -> Tensor:
    """Paint the shape of a scene over a picture, [3, F, rows, columns]."""
    offset = x - (scene.x + scene.dx * (time - 0.5)), y - (scene.y + scene.dy * (time - 0.5))
    if scene.stretch != 1.0:
        wider = math.sqrt(scene.stretch)
        offset = offset[0] / wider, offset[1] * wider
    radius: float | Tensor = scene.radius
    if scene.growth:
        radius = scene.radius * (1 + scene.growth * (time - 0.5))
    cover = (0.5 - outside(scene.shape, *offset, radius) * pixels).clamp(0, 1)
    light = 1.0 - 0.12 * (offset[1] / radius).clamp(-1, 1)
    paint = picture.new_tensor(COLOURS[scene.colour]).view(3, 1, 1, 1) * light
    return torch.lerp(picture, paint.expand_as(picture), cover.expand(picture.shape[1:]))


def _landscape(
    scene: Scene, colours: Landscape, x: Tensor, y: Tensor, time: Tensor, pixels: Tensor
) -> Tensor:
    """Render sky and ground, [3, F, rows, columns]."""
    top, horizon, ground = (
        x.new_tensor(colour).view(3, 1, 1, 1)
        for colour in (colours.top, colours.horizon, colours.ground)
    )
    along = x + 0.5 * time if scene.camera == "pan" else x
    edge = 0.70 * scene.height + 0.05 * torch.sin(2 * math.pi * along / 1.4 + scene.hills)
    sky = top + (horizon - top) * (y / (0.7 * scene.height)).clamp(0, 1)
    cover = (0.5 + (y - edge) * pixels).clamp(0, 1)
    return torch.lerp(sky.expand(3, *cover.shape), ground.expand(3, *cover.shape), cover)


def outside(shape: str, x: Tensor, y: Tensor, radius: float | Tensor) -> Tensor:
    """Return the signed distance from the edge, positive outside; all areas are about equal."""
    if shape == "circle":
        return torch.sqrt(x * x + y * y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.886 * radius
    inner = 0.72 * radius  # radius of the circle inside the triangle
    slope = 0.866 * x.abs() - 0.5 * y
    return torch.maximum(slope, y.expand_as(slope)) - inner
