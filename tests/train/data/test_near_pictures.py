"""Near-same pictures: found when they were saved again, resized, a little cropped or brightened; others are left."""

import importlib.util
import io
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from visplice.train.data.near_pictures import LIMIT, near_groups, near_matches, picture_hash
from visplice.train.scenes import COLORS, TRAIN, render, sample_scene


def saved_again(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def cropped(image, part):
    width, height = image.size
    return image.crop((int(width * part), int(height * part), int(width * (1 - part)), int(height * (1 - part))))


# How a copy comes about, and of how many the copy is to be found.
COPIES = {
    "JPEG 90": (lambda image: saved_again(image, 90), 1.0),
    "JPEG 50": (lambda image: saved_again(image, 50), 1.0),
    "JPEG 20": (lambda image: saved_again(image, 20), 1.0),
    "half": (lambda image: image.resize((image.width // 2, image.height // 2)), 1.0),
    "a third": (lambda image: image.resize((image.width // 3, image.height // 3)), 1.0),
    "double": (lambda image: image.resize((image.width * 2, image.height * 2)), 1.0),
    "other aspect": (lambda image: image.resize((image.width // 2, int(image.height / 1.9))), 1.0),
    "cropped by 1 % a side": (lambda image: cropped(image, 0.01), 0.95),
    "cropped by 2 % a side": (lambda image: cropped(image, 0.02), 0.9),
    "darker": (lambda image: ImageEnhance.Brightness(image).enhance(0.8), 1.0),
    "brighter": (lambda image: ImageEnhance.Brightness(image).enhance(1.2), 0.9),
    "more contrast": (lambda image: ImageEnhance.Contrast(image).enhance(1.2), 0.95),
    "256 colours": (lambda image: image.quantize(256, Image.Quantize.FASTOCTREE).convert("RGB"), 0.9),
}


def photographs():
    """Parts of the photographs that come with matplotlib and gradio, none overlapping another."""
    files = []
    for package, pattern in (
        ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
        ("gradio", "media_assets/images/*.jp*g"),
        ("gradio", "test_data/cheetah2.jpg"),
    ):
        spec = importlib.util.find_spec(package)
        files += sorted(Path(spec.origin).parent.glob(pattern)) if spec and spec.origin else []
    for file in files:
        image = Image.open(file).convert("RGB")
        image.thumbnail((900, 900))
        for left in range(0, image.width - 160, 320):
            for top in range(0, image.height - 120, 240):
                yield image.crop((left, top, min(left + 320, image.width), min(top + 240, image.height)))


def clouds(seed, side=(320, 240)):
    """Noise on six scales, as much on each as photographs have."""
    rng = np.random.default_rng(seed)
    levels = np.zeros((*side[::-1], 3))
    for power in range(1, 7):
        noise = rng.normal(size=(2**power, 2**power, 1)) + 0.4 * rng.normal(size=(2**power, 2**power, 3))
        noise = (noise - noise.min()) / (noise.max() - noise.min())
        levels += np.asarray(Image.fromarray((noise * 255).astype(np.uint8)).resize(side, Image.Resampling.BICUBIC)) / (
            2**power
        )
    levels -= levels.min()
    return Image.fromarray((levels * 255 / levels.max()).astype(np.uint8))


def soft(seed):
    """Nothing but slow changes of colour."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pictures():
    found = [*photographs(), *(clouds(seed) for seed in range(40)), *(soft(seed) for seed in range(20))]
    assert len(found) > 65
    return found


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found_and_nothing_else(pictures, kind):
    change, recall = COPIES[kind]
    hashes = [picture_hash(picture) for picture in pictures]
    matches = near_matches(hashes, [picture_hash(change(picture)) for picture in pictures])
    assert all(own == other for own, other in matches)
    assert len(matches) >= recall * len(pictures)


def test_different_pictures_are_in_no_group(pictures):
    rng = random.Random(0)
    scenes = [render(sample_scene(rng, TRAIN), rng) for _ in range(300)]
    assert near_groups([picture_hash(picture) for picture in [*pictures, *scenes]]) == []


def test_scenes_that_differ_in_an_object_are_told_apart():
    """What the hash alone takes for the same: of these pairs it is nearer than its limit for most."""
    rng = random.Random(1)
    told, close = 0, 0
    for number in range(100):
        scene = sample_scene(rng, TRAIN)
        first = scene.objects[0]
        color = rng.choice([name for name in COLORS if name != first.color])
        objects = scene.objects[1:] if number % 2 else (replace(first, color=color), *scene.objects[1:])
        pair = [
            picture_hash(render(replace(scene, objects=which), random.Random(number)))
            for which in (scene.objects, objects)
        ]
        bits = [np.unpackbits(np.frombuffer(item[:8], np.uint8)) for item in pair]
        close += int((bits[0] != bits[1]).sum()) <= 8
        told += near_groups(pair) == []
    assert close > 40 and told == 100


def test_pages_of_one_layout_are_told_apart():
    font = ImageFont.load_default(14)
    pages = []
    for seed in range(20):
        rng = random.Random(seed)
        page = Image.new("RGB", (600, 800), "white")
        for top in range(40, 760, 20):
            words = " ".join("".join(rng.choices("abcdefghi", k=rng.randrange(2, 9))) for _ in range(9))
            ImageDraw.Draw(page).text((50, top), words, fill="black", font=font)
        pages.append(page)
    hashes = [picture_hash(page) for page in pages]
    assert near_groups(hashes) == []
    again = [picture_hash(saved_again(page, 60).resize((300, 400))) for page in pages]
    assert near_matches(hashes, again) == [(index, index) for index in range(20)]


@pytest.mark.parametrize("level", ["white", "black", "gray", (200, 30, 30)])
def test_pictures_of_one_colour_are_near_to_none(level):
    flat = [picture_hash(Image.new("RGB", (50 + index, 60), level)) for index in range(4)]
    assert near_groups(flat) == [] and near_matches(flat, flat) == []


# --- the search ------------------------------------------------------------------------------------------------------


def made_up(count, seed=0, copies=0.2):
    """Hashes of nothing, some of them copies in which up to 14 bits, a few waves and a few levels are changed."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (count, 568), dtype=np.uint8)
    for index in rng.choice(np.arange(1, count), int(count * copies), replace=False):
        rows[index] = rows[rng.integers(0, index)]
        bits = np.unpackbits(rows[index, :8])
        bits[rng.integers(0, 64, rng.integers(0, 15))] ^= 1
        rows[index, :8] = np.packbits(bits)
        rows[index, rng.integers(8, 136, rng.integers(0, 11))] ^= 0x80
        rows[index, 136:] = np.clip(rows[index, 136:].astype(int) + rng.integers(-2, 3, 432), 0, 255)
    return [row.tobytes() for row in rows]


def near(first, second, distance):
    """The definition, without any search."""
    a, b = (np.frombuffer(item, np.uint8) for item in (first, second))
    waves = [item[8:136].view(np.int8).astype(int) for item in (a, b)]
    if np.bitwise_count(a[:8] ^ b[:8]).sum() > distance or np.abs(waves[0] - waves[1]).mean() / 32 >= 0.2:
        return False
    x, y = (item[136:].reshape(144, 3) - item[136:].reshape(144, 3).mean(axis=0) for item in (a, b))
    difference = np.abs(x / x.std() - y / y.std())
    return difference.mean() < 0.2 and difference.max() < 1.25


@pytest.mark.parametrize("distance", [0, 1, 4, 8, 9, 10, LIMIT])
def test_search_finds_what_comparing_all_pairs_finds(distance):
    hashes = made_up(300, seed=distance)
    pairs = [(a, b) for a in range(300) for b in range(300) if near(hashes[a], hashes[b], distance)]
    assert near_matches(hashes, hashes, max_distance=distance) == pairs
    half = [(a, b - 150) for a, b in pairs if a < 150 <= b]
    assert near_matches(hashes[:150], hashes[150:], max_distance=distance) == half
    groups = near_groups(hashes, max_distance=distance)
    members = [index for group in groups for index in group]
    assert len(members) == len(set(members)) and groups == sorted(groups)
    for group in groups:
        assert group == sorted(group) and all((group[0], other) in set(pairs) for other in group[1:])
    leaders = set(range(300)) - {index for group in groups for index in group[1:]}
    assert not [(a, b) for a, b in pairs if a < b and {a, b} <= leaders]  # no two that are kept are near


def test_order_and_repetition_do_not_matter():
    hashes = made_up(200)
    groups = near_groups(hashes)
    assert near_groups([item for item in hashes for _ in range(2)]) == [
        group
        for index in range(200)
        for group in [next((group for group in groups if index in group), [index])]
        if group[0] == index
        for group in [sorted([2 * member for member in group] + [2 * member + 1 for member in group])]
    ]


def test_thousands_that_look_alike_take_no_time():
    """All pairs of 5,000 copies would be twelve million."""
    rng = np.random.default_rng(0)
    rows = np.tile(rng.integers(0, 256, 568, dtype=np.uint8), (5000, 1))
    rows[:, 136:] = np.clip(rows[:, 136:].astype(int) + rng.integers(0, 4, (5000, 432)), 0, 255)
    started = time.monotonic()
    (group,) = near_groups([row.tobytes() for row in rows])
    assert group == list(range(5000)) and time.monotonic() - started < 5


def test_twenty_thousand_are_searched_in_seconds():
    hashes = made_up(20_000, copies=0.01)
    started = time.monotonic()
    groups = near_groups(hashes)
    assert time.monotonic() - started < 10 and 40 < len(groups) < 200


def test_nothing_gives_nothing():
    assert near_groups([]) == [] and near_matches([], made_up(3)) == [] and near_matches(made_up(3), []) == []


@pytest.mark.parametrize("distance", [-1, LIMIT + 1, 64])
def test_distance_out_of_range_is_refused(distance):
    with pytest.raises(ValueError, match=rf"max_distance is {distance} bits; it is 0 to 14"):
        near_groups(made_up(3), max_distance=distance)


def test_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(ValueError, match=r"pip install 'visplice\[data\]'"):
        picture_hash(Image.new("RGB", (8, 8)))
