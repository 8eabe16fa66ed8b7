"""The embedded task: what is asked has one answer, and what is held out stays out."""

import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from visplice.train import scene_words, scenes
from visplice.train.scenes import Scene, SceneObject


def make(color: str, shape: str, position: str, size: str = "big") -> SceneObject:
    region = scenes.POSITIONS.index(position)
    x, y = (0.2, 0.5, 0.8)[region % 3], (0.2, 0.5, 0.8)[region // 3]
    return SceneObject(color, shape, size, region, x, y, 0.16 if size == "big" else 0.09)


def drawn(split: str, count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [scenes.sample_scene(rng, split) for _ in range(count)]


def test_training_scenes_hold_no_held_out_combination() -> None:
    for scene in drawn(scenes.TRAIN, 2000):
        assert not any(scenes.is_held_out(o.color, o.shape, o.region) for o in scene.objects)


def test_half_of_the_test_scenes_hold_one() -> None:
    novel = [any(scenes.is_held_out(o.color, o.shape, o.region) for o in s.objects) for s in drawn(scenes.TEST, 2000)]
    assert 0.45 < np.mean(novel) < 0.55


def test_every_pair_of_attributes_is_still_seen_in_training() -> None:
    seen = [c for c in scenes.HELD_OUT]
    every = len(scenes.COLORS) * len(scenes.SHAPES) * 9
    assert 0.05 < len(seen) / every < 0.15
    kept = [
        (c, s, r) for c in scenes.COLORS for s in scenes.SHAPES for r in range(9) if not scenes.is_held_out(c, s, r)
    ]
    sizes = (len(scenes.COLORS), len(scenes.SHAPES), 9)
    for a, b in combinations(range(3), 2):
        assert len({(combo[a], combo[b]) for combo in kept}) == sizes[a] * sizes[b]


def test_objects_stand_in_different_ninths_off_any_grid_and_sometimes_overlap() -> None:
    objects = [o for scene in drawn(scenes.TRAIN, 500) for o in scene.objects]
    for o in objects:
        assert (int(o.x * 3), int(o.y * 3)) == (o.column, o.row)
    assert len({round(o.x, 4) for o in objects}) > 0.8 * len(objects)
    overlaps = 0
    for scene in drawn(scenes.TRAIN, 500):
        assert len({o.region for o in scene.objects}) == len(scene.objects)
        overlaps += any(np.hypot(a.x - b.x, a.y - b.y) < a.radius + b.radius for a, b in combinations(scene.objects, 2))
    assert overlaps > 10


SCENE = Scene(
    "gray",
    (make("red", "circle", "top left"), make("blue", "square", "bottom right", "small"), make("red", "star", "center")),
)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What color is the circle?", "red"),
        ("What color is the background?", "gray"),
        ("What color is the shape in the center?", "red"),
        ("Which shape is blue?", "square"),
        ("What shape is at the top left?", "circle"),
        ("How many shapes are there?", "3"),
        ("How many red shapes are there?", "2"),
        ("How many circles are there?", "1"),
        ("Is there a red circle?", "yes"),
        ("Is there a blue circle?", "no"),
        ("Is there a star at the top left?", "no"),
        ("Where is the blue square?", "bottom right"),
        ("Is the circle left of the blue square?", "yes"),
        ("Is the circle below the blue square?", "no"),
        ("Is the blue square smaller than the circle?", "yes"),
        ("Are there more squares than stars?", "no"),
    ],
)
def test_questions_about_a_scene_written_by_hand(question: str, answer: str) -> None:
    rng = random.Random(0)
    asked: dict[str, str] = {}
    for _ in range(400):
        asked |= {q.text: q.answer for q in scene_words.ask(SCENE, rng, 12)}
    assert asked[question] == answer


def test_ambiguous_questions_are_never_asked() -> None:
    rng = random.Random(0)
    asked = {q.text for _ in range(400) for q in scene_words.ask(SCENE, rng, 12)}
    assert not any(text in asked for text in ("Which shape is red?", "What shape is the red one?"))


def test_types_are_drawn_evenly_and_yes_is_as_likely_as_no() -> None:
    rng = random.Random(0)
    questions = [q for scene in drawn(scenes.TEST, 1500) for q in scene_words.ask(scene, rng, 6)]
    kinds = Counter(q.question_type for q in questions)
    assert set(kinds) == set(scene_words.QUESTION_TYPES)
    assert min(kinds.values()) > 0.7 * max(kinds.values())
    for kind in ("existence", "comparison"):
        yes = np.mean([q.answer == "yes" for q in questions if q.question_type == kind])
        assert 0.45 < yes < 0.55


def test_caption_names_every_object_in_reading_order() -> None:
    assert scene_words.caption(SCENE) == (
        "a big red circle at the top left and a big red star in the center "
        "and a small blue square at the bottom right on a gray background."
    )


def test_description_and_facts_are_true() -> None:
    rng = random.Random(0)
    for _ in range(100):
        text = scene_words.describe(SCENE, rng).text
        for word in ("red", "blue", "circle", "square", "star", "gray", "top left", "bottom right", "center", "small"):
            assert word in text
        told = scene_words.facts(SCENE, rng, 99)
        assert "the circle is red" in told and "the blue one is a square" in told and "there are 2 red shapes" in told
        assert "the red one" not in told and "there is 1 square" in told


def test_facts_are_told_in_one_order_and_never_twice() -> None:
    rng = random.Random(0)
    whole = scene_words.facts(SCENE, rng, 99).rstrip(".").split(". ")
    assert whole[:2] == ["there are 3 shapes", "the background is gray"]
    assert len(set(whole)) == len(whole)
    for _ in range(50):
        some = scene_words.facts(SCENE, rng, 8).rstrip(".").split(". ")
        assert len(some) == 8 and some == sorted(some, key=whole.index)


def test_picture_shows_the_color_where_the_object_is() -> None:
    rng = random.Random(0)
    picture = np.asarray(scenes.render(SCENE, rng)).astype(int)
    side = scenes.IMAGE_SIZE
    assert picture.shape == (side, side, 3)
    for item in SCENE.objects:
        pixel = picture[round(item.y * side), round(item.x * side)]
        assert np.abs(pixel - scenes.COLORS[item.color]).max() < 25
    assert np.abs(picture[5, side - 5] - scenes.BACKGROUNDS["gray"]).max() < 20


def test_same_seed_gives_the_same_picture() -> None:
    first, second = (np.asarray(scenes.render(SCENE, random.Random(7))) for _ in range(2))
    assert (first == second).all()
