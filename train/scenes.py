"""The embedded task: scenes of coloured shapes, and their pictures. `scene_words` says what there is to say of them.

A scene holds one to four objects, each in another ninth of the picture at a continuous position, on a plain
background. Some combinations of colour, shape and position are held out: no training scene, picture or sentence
contains one, and half of the test scenes do.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 112  # pixels a side; 8 x 8 patches of 14

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 135, 25),
    "yellow": (240, 215, 40),
    "green": (45, 160, 65),
    "cyan": (60, 200, 215),
    "blue": (45, 75, 205),
    "purple": (135, 55, 170),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (248, 248, 248),
    "gray": (150, 150, 150),
    "black": (18, 18, 18),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES: dict[str, tuple[float, float]] = {"small": (0.075, 0.10), "big": (0.145, 0.18)}  # radius / side of the picture

# Column and row bands leave gaps, so that a position always has one name.
_BANDS = ((0.14, 0.29), (0.38, 0.62), (0.71, 0.86))
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")

TRAIN, TEST = "train", "test"

# What an object is told by, and how many values each has; `attributes` gives the indices in this order.
NUM_ATTRIBUTES = {"color": len(COLORS), "shape": len(SHAPES), "size": len(SIZES), "region": len(POSITIONS)}


@dataclass(frozen=True)
class SceneObject:
    """One shape; `x`, `y` and `radius` are fractions of the picture's side."""

    color: str
    shape: str
    size: str
    region: int  # index into POSITIONS, row-major
    x: float
    y: float
    radius: float

    @property
    def position(self) -> str:
        return POSITIONS[self.region]

    @property
    def column(self) -> int:
        return self.region % 3

    @property
    def row(self) -> int:
        return self.region // 3


def attributes(item: SceneObject) -> list[int]:
    """Indices of an object's colour, shape, size and region."""
    return [list(COLORS).index(item.color), SHAPES.index(item.shape), list(SIZES).index(item.size), item.region]


@dataclass(frozen=True)
class Scene:
    """Objects in drawing order (later ones lie on top) on a background."""

    background: str
    objects: tuple[SceneObject, ...]


def is_held_out(color: str, shape: str, region: int) -> bool:
    """One combination of colour, shape and position in ten; every pair of the three is still seen in training."""
    return (3 * list(COLORS).index(color) + 7 * SHAPES.index(shape) + 9 * region) % 10 == 0


HELD_OUT = tuple(c for c in product(COLORS, SHAPES, range(9)) if is_held_out(*c))


def sample_scene(rng: random.Random, split: str, *, most: int = 4) -> Scene:
    """A scene of `split` with at most `most` objects.

    Training scenes hold no held-out combination, every second test scene at least one.
    """
    if split not in (TRAIN, TEST):
        raise ValueError(f"split is {split!r}; it is {TRAIN!r} or {TEST!r}")
    novel = split == TEST and rng.random() < 0.5
    while True:
        count = min(most, rng.choices((1, 2, 3, 4), weights=(1, 3, 4, 4))[0])
        objects: list[SceneObject] = []
        for region in rng.sample(range(9), count):
            color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
            # Repeats make counting, and telling apart by the other attribute, worth asking about.
            if objects and rng.random() < 0.35:
                shape = rng.choice(objects).shape
            if objects and rng.random() < 0.25:
                color = rng.choice(objects).color
            if novel and not objects:
                color, shape, region = rng.choice(HELD_OUT)
            if any(region == o.region for o in objects) or (not novel and is_held_out(color, shape, region)):
                continue
            placed = _place(rng, color, shape, region, objects)
            if placed is not None:
                objects.append(placed)
        if objects:
            rng.shuffle(objects)
            return Scene(rng.choice(list(BACKGROUNDS)), tuple(objects))


def _place(rng: random.Random, color: str, shape: str, region: int, others: list[SceneObject]) -> SceneObject | None:
    for _ in range(20):
        size = rng.choice(list(SIZES))
        radius = rng.uniform(*SIZES[size])
        x, y = rng.uniform(*_BANDS[region % 3]), rng.uniform(*_BANDS[region // 3])
        # Shapes may overlap, but every one stays recognisable.
        if all((x - o.x) ** 2 + (y - o.y) ** 2 >= max(0.19, 0.72 * (radius + o.radius)) ** 2 for o in others):
            return SceneObject(color, shape, size, region, x, y, radius)
    return None


# --- picture ---------------------------------------------------------------------------------------------------------

_SUPERSAMPLE = 3


def _polygon(corners: int, radius: Callable[[int], float], turn: float) -> list[tuple[float, float]]:
    angles = (turn - np.pi / 2 + 2 * np.pi * i / corners for i in range(corners))
    return [(radius(i) * np.cos(a), radius(i) * np.sin(a)) for i, a in enumerate(angles)]


_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": _polygon(3, lambda i: 1.15, 0.0),
    "star": _polygon(10, lambda i: 1.15 if i % 2 == 0 else 0.46, 0.0),
    "cross": [
        (x * s, y * t)
        for s, t, corner in ((1, -1, 0), (1, 1, 1), (-1, 1, 0), (-1, -1, 1))
        for x, y in (
            ((0.33, 1.0), (0.33, 0.33), (1.0, 0.33)) if corner == 0 else ((1.0, 0.33), (0.33, 0.33), (0.33, 1.0))
        )
    ],
}


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """The picture of a scene, RGB, `IMAGE_SIZE` square; `rng` varies hue, tilt and grain a little."""
    side = IMAGE_SIZE * _SUPERSAMPLE
    image = Image.new("RGB", (side, side), _jitter(BACKGROUNDS[scene.background], rng, 7))
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        x, y, r = item.x * side, item.y * side, item.radius * side
        fill = _jitter(COLORS[item.color], rng, 12)
        if item.shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif item.shape == "ring":
            draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=round(0.42 * r))
        else:
            tilt = rng.uniform(-0.15, 0.15)
            cos, sin = np.cos(tilt), np.sin(tilt)
            draw.polygon(
                [(x + r * (u * cos - v * sin), y + r * (u * sin + v * cos)) for u, v in _OUTLINES[item.shape]],
                fill=fill,
            )
    small = image.reduce(_SUPERSAMPLE)
    grain = np.random.default_rng(rng.getrandbits(32)).integers(-5, 6, (IMAGE_SIZE, IMAGE_SIZE, 1), dtype=np.int16)
    return Image.fromarray(np.clip(np.asarray(small, np.int16) + grain, 0, 255).astype(np.uint8))


def _jitter(color: tuple[int, int, int], rng: random.Random, amount: int) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, c + rng.randint(-amount, amount))) for c in color)
    return red, green, blue
