"""The embedded task: scenes of coloured shapes, questions about them, captions, and descriptions in words.

A scene holds one to four objects, each in another ninth of the picture at a continuous position, on a plain
background. Every text is a function of the scene, so the answers are exact. Some combinations of colour, shape and
position are held out: no training scene, picture or sentence contains one, and half of the test scenes do.
"""

import random
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class Question:
    """A question with its only right answer. `answer_type` is one of VQAv2's three."""

    text: str
    answer: str
    question_type: str  # color, shape, count, existence, position or comparison
    answer_type: str  # yes/no, number or other
    about: SceneObject | None = None  # the one object that is asked about, if it is one
    about_background: bool = False
    mentions: tuple[tuple[int, SceneObject], ...] = ()  # where in the text the name of an object ends


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


# --- words -----------------------------------------------------------------------------------------------------------


def at(position: str) -> str:
    """The position with its preposition."""
    return "in the center" if position == "center" else f"at the {position}"


def caption(scene: Scene) -> str:
    """One sentence that names everything, objects in reading order; what the model says when asked to describe."""
    named = [f"a {o.size} {o.color} {o.shape} {at(o.position)}" for o in sorted(scene.objects, key=lambda o: o.region)]
    return f"{' and '.join(named)} on a {scene.background} background."


_OBJECT_WORDINGS: tuple[Callable[[SceneObject], str], ...] = (
    lambda o: f"a {o.size} {o.color} {o.shape} {at(o.position)}",
    lambda o: f"{at(o.position)} a {o.size} {o.color} {o.shape}",
    lambda o: f"the {o.shape} {at(o.position)} is {o.size} and {o.color}",
    lambda o: f"{o.position}: {o.color} {o.shape}, {o.size}",
    lambda o: f"{o.shape} {o.color} {o.size} {o.position}",
)
_BACKGROUND_WORDINGS = ("on a {} background", "the background is {}", "background {}")


@dataclass(frozen=True)
class Description:
    """A scene in words, and which characters tell of which object."""

    text: str
    spans: tuple[tuple[int, int, SceneObject], ...]  # begin, end, object
    background_end: int  # where the words about the background end


def describe(scene: Scene, rng: random.Random, *, variety: float = 1.0) -> Description:
    """The whole scene in words, where the picture will stand; in many orders and wordings.

    `variety` from 0 to 1 is the share of the wordings in use.
    """
    parts: list[SceneObject | None] = list(scene.objects)
    rng.shuffle(parts)
    parts.insert(rng.choice((0, len(parts))), None)  # the background stands first or last
    wordings = _OBJECT_WORDINGS[: max(1, round(variety * len(_OBJECT_WORDINGS)))]
    one_wording = rng.choice(wordings) if rng.random() < 0.5 else None
    separator = rng.choice((". ", "; ", ", and ", ", "))
    text, spans, background_end = "", [], 0
    for number, item in enumerate(parts):
        text += separator if number else ""
        begin = len(text)
        if item is None:
            text += rng.choice(_BACKGROUND_WORDINGS).format(scene.background)
            background_end = len(text)
        else:
            text += (one_wording or rng.choice(wordings))(item)
            spans.append((begin, len(text), item))
    return Description(text + ".", tuple(spans), background_end)


def facts(scene: Scene, rng: random.Random, count: int) -> str:
    """At most `count` short statements about a scene: much to bind in few words.

    Which ones is chance, their order is not: the whole, then object by object as one reads, so that whoever has learnt
    to tell them knows what comes next and never says a thing twice.
    """
    objects = sorted(scene.objects, key=lambda o: o.region)
    found = [f"there {_are(len(objects), 'shape')}", f"the background is {scene.background}"]
    for item in objects:
        if sum(o.shape == item.shape for o in objects) == 1:
            found += [f"the {item.shape} is {word}" for word in (item.color, item.size, at(item.position))]
        if sum(o.color == item.color for o in objects) == 1:
            found += [f"the {item.color} one is {words}" for words in (f"a {item.shape}", at(item.position))]
        found += [f"{at(item.position)} is a {word}" for word in (item.shape, f"{item.color} one", f"{item.size} one")]
    for shape in SHAPES:
        if (number := sum(o.shape == shape for o in objects)) > 0:
            found.append(f"there {_are(number, shape)}")
    for color in COLORS:
        if (number := sum(o.color == color for o in objects)) > 0:
            found.append(f"there {_are(number, f'{color} shape')}")
    chosen = sorted(rng.sample(range(len(found)), min(count, len(found))))
    return ". ".join(found[index] for index in chosen) + "."


def _are(number: int, noun: str) -> str:
    return f"is 1 {noun}" if number == 1 else f"are {number} {plural(noun)}"


# --- questions -------------------------------------------------------------------------------------------------------

_Maker = Callable[[Scene, random.Random], Question | None]


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _reference(scene: Scene, item: SceneObject, rng: random.Random) -> str | None:
    """Words that fit this object alone, the colour left out now and then where the shape is enough."""
    same_shape = [o for o in scene.objects if o.shape == item.shape]
    if len(same_shape) == 1 and rng.random() < 0.4:
        return item.shape
    if sum(o.color == item.color for o in same_shape) == 1:
        return f"{item.color} {item.shape}"
    return None


def _ask_background(scene: Scene, rng: random.Random) -> Question:
    text = rng.choice(("What color is the background?", "Which color is the background?"))
    return Question(text, scene.background, "color", "other", about_background=True)


def _ask_color(scene: Scene, rng: random.Random) -> Question | None:
    kind = rng.random()
    if kind < 0.15:
        return _ask_background(scene, rng)
    item = rng.choice(scene.objects)
    if kind < 0.6:
        if sum(o.shape == item.shape for o in scene.objects) > 1:
            return None
        wording = rng.choice(("What color is the {}?", "Which color is the {}?", "What is the color of the {}?"))
        return Question(wording.format(item.shape), item.color, "color", "other", item)
    return Question(f"What color is the shape {at(item.position)}?", item.color, "color", "other", item)


def _ask_shape(scene: Scene, rng: random.Random) -> Question | None:
    item = rng.choice(scene.objects)
    if rng.random() < 0.5:
        if sum(o.color == item.color for o in scene.objects) > 1:
            return None
        wording = rng.choice(("Which shape is {}?", "What shape is the {} one?"))
        return Question(wording.format(item.color), item.shape, "shape", "other", item)
    wording = rng.choice(("What shape is {}?", "Which shape is {}?"))
    return Question(wording.format(at(item.position)), item.shape, "shape", "other", item)


def _ask_count(scene: Scene, rng: random.Random) -> Question | None:
    kind = rng.random()
    if kind < 0.3:
        return Question("How many shapes are there?", str(len(scene.objects)), "count", "number")
    if kind < 0.65:
        shape = rng.choice(scene.objects).shape if rng.random() < 0.75 else rng.choice(SHAPES)
        found, name = sum(o.shape == shape for o in scene.objects), plural(shape)
    else:
        color = rng.choice(scene.objects).color if rng.random() < 0.75 else rng.choice(list(COLORS))
        found, name = sum(o.color == color for o in scene.objects), f"{color} shapes"
    return Question(f"How many {name} are there?", str(found), "count", "number")


def plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def _ask_existence(scene: Scene, rng: random.Random) -> Question | None:
    """Half yes, half no; wrong ones are built from what is there, so that binding decides."""
    kind, truth = rng.random(), rng.random() < 0.5
    for _ in range(20):
        item, other = rng.choice(scene.objects), rng.choice(scene.objects)
        color, shape, position = item.color, item.shape, item.position
        if kind < 0.5:
            if not truth:
                color, shape = rng.choice(
                    ((other.color, shape), (color, rng.choice(SHAPES)), (rng.choice(list(COLORS)), shape))
                )
            found = any((o.color, o.shape) == (color, shape) for o in scene.objects)
            text = f"Is there {'an' if color == 'orange' else 'a'} {color} {shape}?"
        elif kind < 0.65:
            shape = shape if truth else rng.choice(SHAPES)
            found = any(o.shape == shape for o in scene.objects)
            text = f"Is there a {shape}?"
        else:
            if not truth:
                shape, position = rng.choice(
                    ((other.shape, position), (shape, rng.choice(POSITIONS)), (rng.choice(SHAPES), position))
                )
            found = any((o.shape, o.position) == (shape, position) for o in scene.objects)
            text = f"Is there a {shape} {at(position)}?"
        if found == truth:
            return Question(text, _yes(found), "existence", "yes/no")
    return None


def _ask_position(scene: Scene, rng: random.Random) -> Question | None:
    item = rng.choice(scene.objects)
    reference = _reference(scene, item, rng)
    if reference is None:
        return None
    return Question(f"Where is the {reference}?", item.position, "position", "other", item)


def _ask_comparison(scene: Scene, rng: random.Random) -> Question | None:
    truth = rng.random() < 0.5
    make = _more if rng.random() < 0.2 or len(scene.objects) < 2 else _relation
    for _ in range(20):
        made = make(scene, rng)
        if made is not None and made.answer == _yes(truth):
            return made
    return None


def _more(scene: Scene, rng: random.Random) -> Question:
    first = rng.choice(scene.objects).shape
    second = rng.choice([s for s in SHAPES if s != first])
    if rng.random() < 0.5:
        first, second = second, first
    numbers = [sum(o.shape == s for o in scene.objects) for s in (first, second)]
    text = f"Are there more {plural(first)} than {plural(second)}?"
    return Question(text, _yes(numbers[0] > numbers[1]), "comparison", "yes/no")


def _relation(scene: Scene, rng: random.Random) -> Question | None:
    a, b = rng.sample(scene.objects, 2)
    names = _reference(scene, a, rng), _reference(scene, b, rng)
    if None in names:
        return None
    relations: list[tuple[str, bool]] = []
    if a.column != b.column:
        relations += [("left of", a.column < b.column), ("right of", a.column > b.column)]
    if a.row != b.row:
        relations += [("above", a.row < b.row), ("below", a.row > b.row)]
    if a.size != b.size:
        relations += [("bigger than", a.size == "big"), ("smaller than", a.size == "small")]
    relation, answer = rng.choice(relations)
    text = f"Is the {names[0]} {relation} the {names[1]}?"
    mentions = ((len(f"Is the {names[0]}"), a), (len(text) - 1, b))
    return Question(text, _yes(answer), "comparison", "yes/no", mentions=mentions)


_MAKERS: dict[str, _Maker] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "existence": _ask_existence,
    "position": _ask_position,
    "comparison": _ask_comparison,
}
QUESTION_TYPES = tuple(_MAKERS)
_MAKERS["background"] = _ask_background  # among the questions on colour; here to be practised by itself
DESCRIBE = ("Describe the picture.", "What is in the picture?", "What do you see?")
TELL = "Tell me about the picture."


def ask(scene: Scene, rng: random.Random, count: int, kinds: Sequence[str] = QUESTION_TYPES) -> list[Question]:
    """At most `count` different questions about a scene, their types drawn evenly from `kinds`."""
    questions: dict[str, Question] = {}
    for _ in range(3 * count):
        make = _MAKERS[rng.choice(kinds)]
        for _ in range(10):  # not every drawn object can be asked about without ambiguity
            question = make(scene, rng)
            if question is not None and question.text not in questions:
                questions[question.text] = question
                break
        if len(questions) == count:
            break
    return list(questions.values())
