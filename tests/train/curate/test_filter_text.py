"""Filters by language, length and size of pictures; and options that no filter takes."""

import io
import sys
from collections import Counter

import pytest
from PIL import Image

from visplice.train.curate import text as filter_text
from visplice.train.curate.curate import make_filter
from visplice.vision.image import ImageError


def reasons(verdicts):
    return dict(Counter(removal.reason for verdict in verdicts.values() for removal in verdict.removed))


def noted(verdicts):
    return dict(Counter(note for verdict in verdicts.values() for note in verdict.noted))


SPOKEN = {
    "en": ["A dog runs across the green meadow.", "Two children play with a ball on the beach."],
    "de": ["Ein Hund läuft über die grüne Wiese.", "Zwei Kinder spielen am Strand mit einem Ball."],
    "fr": ["Un chien court sur la pelouse verte.", "Deux enfants jouent au ballon sur la plage."],
    "es": ["Un perro corre por el césped verde.", "Dos niños juegan con una pelota en la playa."],
    "zh": ["一只狗在绿色的草地上奔跑"],
    "ja": ["緑の芝生の上を犬が走っている"],
    "ru": ["Собака бежит по зелёной траве."],
    "ar": ["كلب يركض على العشب الأخضر"],
}


@pytest.mark.parametrize("keep", [("en",), ("de", "en"), ("zh",), ("fr", "ru", "ar")])
def test_captions_in_kept_languages_stay(sample, apply, keep):
    samples = [sample(f"{code}{at}", text) for code, texts in SPOKEN.items() for at, text in enumerate(texts)]
    left, verdicts = apply("language", samples, keep=keep)
    assert {key[:2] for key in left} == set(keep)
    assert set(reasons(verdicts)) == {f"language-{code}" for code in SPOKEN if code not in keep}


def test_texts_too_short_to_judge_stay(sample, apply):
    short = ["ja", "Hund", "rouge", "zwei Hunde", "Coca-Cola", "1234567890123456789012345", "狗"]
    left, verdicts = apply("language", [sample(str(at), text) for at, text in enumerate(short)], keep=("en",))
    assert len(left) == len(short) and noted(verdicts) == {"too short to judge": len(short)}


def test_a_conversation_is_judged_as_a_whole(sample, apply):
    german = [
        "<image>\nWas ist auf dem Bild zu sehen?",
        "Ein Hund läuft über die Wiese.",
        "Und welche Farbe hat er?",
        "braun",
    ]
    english = ["<image>\nHow do you say dog in German and in French?", "Hund", "And in French, please?", "chien"]
    samples = [sample("de", turns=german), sample("en", turns=english), sample("both", SPOKEN["en"][0], turns=german)]
    left, verdicts = apply("language", samples, keep=("en",))
    assert list(left) == ["en", "both"] and left["both"]["conversations"] == []
    assert reasons(verdicts) == {"language-de": 2}
    assert len(apply("language", samples, keep=("en",), fields=("captions",))[0]) == 3


def test_length_counts_words_characters_and_tokens(sample, apply):
    samples = [sample("a", "one two three", "one"), sample("b", "four"), sample("c", turns=["q", "a"])]
    left, verdicts = apply("length", samples, min_words=2)
    assert left == {"a": {"captions": ["one two three"]}, "c": samples[2].record}
    assert verdicts["b"].removed == (("too-few-words", "1: four"),)
    left, verdicts = apply("length", samples, min_characters=4, max_characters=4)
    assert list(left) == ["b", "c"] and reasons(verdicts) == {"too-few-characters": 1, "too-many-characters": 1}
    left, verdicts = apply("length", samples, max_tokens=2, tokenizer="embedded")
    assert reasons(verdicts) and all("tokens" in reason for reason in reasons(verdicts))
    left, _ = apply("length", samples, max_characters=2, fields=("conversations",))
    assert list(left) == ["a", "b"]


def test_pictures_are_measured_by_their_header(sample, apply):
    def make(width, height):
        buffer = io.BytesIO()
        Image.new("RGB", (width, height)).save(buffer, "PNG")
        return buffer.getvalue()

    sizes = {"fits": (64, 64), "small": (64, 20), "narrow": (300, 64), "tall": (64, 300)}
    samples = [sample(key, "x", images=[make(*size)]) for key, size in sizes.items()] + [sample("text", "x", images=[])]
    assert list(apply("picture-size", samples, min_side=32)[0]) == ["fits", "narrow", "tall", "text"]
    left, verdicts = apply("picture-size", samples, min_side=32, max_aspect=3.0)
    assert list(left) == ["fits", "text"]
    assert verdicts["tall"].removed == (("narrow-picture", "64 x 300"),)
    cut = make(64, 64)[:20]
    with pytest.raises(ImageError):
        make_filter("picture-size", {"min_side": 32}).measure(sample("cut", "x", images=[cut]))


# --- foolish options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("duplicate-lines", {"keep": 0}, r"--keep is 0"),
        ("near-lines", {"threshold": 85}, r"--threshold is 85; it is 0\.5 to 1"),
        ("near-lines", {"threshold": float("nan")}, r"--threshold is nan"),
        ("near-lines", {"keep": -1}, r"--keep is -1"),
        ("near-pictures", {"max_distance": 65}, r"--max-distance is 65 bits; it is 0 to"),
        ("privacy", {"kinds": ("emails",)}, r"--kinds is emails; it is some of email,ip,address,phone"),
        ("privacy", {"kinds": ()}, r"--kinds is empty"),
        ("privacy", {"regions": ("USA",)}, r"--regions: USA is no region"),
        ("privacy", {"fields": ("text",)}, r"--fields is text"),
        ("language", {"keep": ("english",)}, r"--keep english: english is none that is known"),
        ("language", {"keep": ()}, r"--keep : no language"),
        ("language", {"keep": ("en",), "min_probability": 1.5}, r"--min-probability is 1\.5"),
        ("length", {}, r"without a bound"),
        ("length", {"min_words": 5, "max_words": 3}, r"--min-words 5 is more than --max-words 3"),
        ("length", {"max_tokens": 5}, r"need --tokenizer"),
        ("length", {"max_tokens": 5, "tokenizer": "nowhere"}, r"nowhere"),
        ("length", {"min_words": 1, "fields": ("questions",)}, r"--fields is questions"),
        ("picture-size", {}, r"without a bound"),
        ("picture-size", {"max_aspect": 0.5}, r"--max-aspect is 0\.5"),
        ("picture-size", {"min_side": 0}, r"--min-side is 0"),
        ("clip-score", {"model": "x", "weights": "y", "min_score": 20}, r"--min-score is 20"),
        ("clip-score", {"model": "x", "weights": "y", "batch_size": 0}, r"--batch-size is 0"),
        ("clip-score", {"model": "x", "weights": "y", "beam": 1}, r"does not take these options"),
        ("spelling", {}, r"spelling is no filter of this version; it has duplicate-urls"),
    ],
)
def test_foolish_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_filter(name, options)


def png(width, height):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "package", "options"),
    [
        ("near-lines", "datasketch", {}),
        ("privacy", "phonenumbers", {}),
        ("privacy", "pyap", {}),
        ("language", "py3langid.langid", {"keep": ("en",)}),
        ("near-pictures", "imagehash", {}),
    ],
)
def test_missing_packages_are_named_with_what_installs_them(sample, apply, monkeypatch, name, package, options):
    filter_text._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package.partition('.')[0]}.*pip install 'visplice\[data\]'"):
        apply(name, [sample("a", "350 Fifth Avenue", images=[png(40, 40)])], **options)
    filter_text._identifier.cache_clear()
