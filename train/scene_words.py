"""What is said about a scene: captions, descriptions, facts, and questions with their answers.

Every text is a function of the scene, so the answers are exact.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from visplice.train.scenes import COLORS, POSITIONS, SHAPES, Scene, SceneObject


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
