"""What filters do to records, and duplicates: each on samples whose right answer is known."""

import io
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from visplice.train.curate.duplicates import normalised_url
from visplice.train.curate.near import jaccard, shingles
from visplice.train.curate.verdict import normalised, shown, without
from visplice.train.data.record import check_marks, check_record


def reasons(verdicts):
    return dict(Counter(removal.reason for verdict in verdicts.values() for removal in verdict.removed))


def noted(verdicts):
    return dict(Counter(note for verdict in verdicts.values() for note in verdict.noted))


def picture(seed, *, size=(160, 120), format="PNG", quality=95, shift=0):
    """A soft random picture, of which every seed gives another."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = small.resize((320, 240), Image.Resampling.BICUBIC).crop((shift, shift, 320 - shift, 240 - shift))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, format, quality=quality)
    return buffer.getvalue()


# --- records ----------------------------------------------------------------------------------------------------------


def test_text_is_compared_without_case_spaces_and_forms_of_unicode():
    assert normalised("  A  red\nBall ") == normalised("a red ball")
    assert normalised("Caf\u00e9 \ufb01sh \u2460") == normalised("cafe\u0301 fish 1") == "caf\u00e9 fish 1"
    assert normalised("STRASSE") == normalised("stra\u00dfe")
    assert normalised("<image>\nWhat?") == "what?"
    assert normalised("a dog.") != normalised("a dog")


def test_what_is_shown_is_short_and_harmless_to_a_terminal():
    assert shown("a\n\tb  \x1b[31mred\x07") == "a b \\x1b[31mred\\x07"
    assert len(shown("x" * 1000)) == 100


def test_removed_questions_leave_their_pictures_with_those_that_stay(sample):
    turns = ["<image>\nfirst?", "1", "<image>\nsecond?", "2", "third? <image>", "3"]
    record = sample("a", turns=turns).record
    for removed in ([0], [1], [2], [0, 1], [0, 2], [1, 2]):
        drop, edits = without(record, pairs=removed)
        assert not drop
        check_record(edits)
        check_marks(edits, 3)
        answers = [turn["value"] for turn in edits["conversations"][1::2]]
        assert answers == [str(index + 1) for index in range(3) if index not in removed]
    assert without(record, pairs=[0])[1]["conversations"][0]["value"] == "<image>\n<image>\nsecond?"
    assert without(record, pairs=[2])[1]["conversations"][2]["value"] == "<image>\nsecond?\n<image>"
    assert without(record, pairs=[0, 1, 2]) == (True, {})


def test_a_sample_goes_when_its_last_text_does(sample):
    both = sample("a", "one", "two", turns=["q", "a"]).record
    assert without(both, captions=[0]) == (False, {"captions": ["two"]})
    assert without(both, captions=[0, 1]) == (False, {"captions": []})
    assert without(both, pairs=[0]) == (False, {"conversations": []})
    assert without(both, captions=[0, 1], pairs=[0]) == (True, {})
    assert without(both) == (False, {})


# --- duplicates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        "https://example.com/a/B.jpg",
        "HTTP://EXAMPLE.com/a/B.jpg",
        "http://example.com:80/a/B.jpg/",
        "https://example.com:443/a/B.jpg#top",
        "//example.com/a/B.jpg".removeprefix("//"),
        "http://example.com./a/B.jpg?utm_source=x&fbclid=1&UTM_medium=y",
    ],
)
def test_addresses_of_the_same_picture_are_equal(other):
    assert normalised_url(other) == normalised_url(" http://example.com/a/B.jpg ")


@pytest.mark.parametrize(
    "other",
    [
        "http://example.com/a/b.jpg",
        "http://example.com:8080/a/B.jpg",
        "http://www.example.com/a/B.jpg",
        "http://example.com/a/B.jpg?id=2",
        "ftp://example.com/a/B.jpg",
    ],
)
def test_addresses_of_other_pictures_differ(other):
    assert normalised_url(other) != normalised_url("http://example.com/a/B.jpg")


def test_parameters_of_an_address_count_in_any_order():
    assert normalised_url("http://x.org/i?b=2&a=1&utm_id=9") == normalised_url("https://x.org/i?a=1&b=2")


@pytest.mark.parametrize("url", ["http://[broken", "http://x:port/", "", "data:image/png;base64,AAAA", "C:\\a.jpg"])
def test_what_is_no_address_is_taken_as_it_is(url):
    assert normalised_url(url) == normalised_url(f" {url} ")


def test_the_first_sample_of_an_address_is_kept(sample, apply):
    samples = [
        sample("a", "one", url="http://x.org/1.jpg"),
        sample("b", "two", url="https://X.org/1.jpg?utm_source=mail"),
        sample("c", "three", url="http://x.org/2.jpg"),
        sample("d", "four"),
        sample("e", "five", url=17),
    ]
    left, verdicts = apply("duplicate-urls", samples)
    assert list(left) == ["a", "c", "d", "e"]
    assert verdicts["b"].removed == (("same-url", "x.org/1.jpg, as a"),)
    assert noted(verdicts) == {"no url": 2}


def test_a_report_shows_no_key_of_an_address(sample, apply):
    samples = [sample(key, "one", url="http://me:pass@x.org/1.jpg?token=secret") for key in "ab"]
    _, verdicts = apply("duplicate-urls", samples)
    assert "secret" not in str(verdicts) and "pass" not in str(verdicts)


def test_same_pictures_with_captions_are_dropped_whatever_the_caption(sample, apply):
    samples = [
        sample("a", "one", images=[b"x"]),
        sample("b", "two", images=[b"y"]),
        sample("c", "three", images=[b"x"]),
        sample("d", "four", images=[b"x", b"y"]),
        sample("e", "five", images=[b"y", b"x"]),
        sample("f", "six", images=[b"x", b"y"]),
        sample("g", "seven", images=[]),
        sample("h", "eight", images=[]),
    ]
    left, verdicts = apply("duplicate-pictures", samples)
    assert list(left) == ["a", "b", "d", "e", "g", "h"]
    assert reasons(verdicts) == {"same-picture": 2} and noted(verdicts) == {"no picture": 2}


def test_a_picture_that_is_asked_about_again_loses_no_question(sample, apply):
    question = {"question_id": 1, "question": "What?", "answers": ["red"]}
    samples = [
        sample("a", turns=["What color?", "red"], images=[b"x"]),
        sample("b", turns=["How many?", "two"], images=[b"x"]),
        sample("c", turns=["what COLOR?", "Red"], images=[b"x"]),  # said before
        sample("d", turns=["What color?", "blue"], images=[b"x"]),  # another answer
        sample("e", "a ball", images=[b"x"]),  # the first caption of this picture
        sample("f", "a red ball", images=[b"x"]),
        sample("g", "a ball", turns=["How big?", "small"], images=[b"x"]),
        sample("h", "a ball", images=[b"x"], questions=[question]),
        sample("i", "a ball", images=[b"x"], questions=[question]),
    ]
    left, _ = apply("duplicate-pictures", samples)
    assert list(left) == ["a", "b", "d", "e", "g", "h"]


def test_answers_of_one_pair_can_stand_for_captions(sample, apply):
    samples = [sample(key, turns=["Describe it.", text], images=[b"x"]) for key, text in (("a", "one"), ("b", "two"))]
    assert list(apply("duplicate-pictures", samples)[0]) == ["a", "b"]
    assert list(apply("duplicate-pictures", samples, answers_are_captions=True)[0]) == ["a"]


def test_a_caption_stays_where_it_was_read_first(sample, apply):
    samples = [
        sample("a", "a dog", "image of"),
        sample("b", "A  Dog", "a cat"),
        sample("c", "Image of"),
        sample("d", "a bird", "A bird", "a bird."),
    ]
    left, verdicts = apply("duplicate-lines", samples)
    assert left == {
        "a": {"captions": ["a dog", "image of"]},
        "b": {"captions": ["a cat"]},
        "d": {"captions": ["a bird", "a bird."]},
    }
    assert verdicts["c"].drop and reasons(verdicts) == {"same-caption": 3}


def test_so_many_of_a_caption_are_kept_as_asked_for(sample, apply):
    samples = [sample(str(index), "image of", f"caption {index}") for index in range(9)]
    left, verdicts = apply("duplicate-lines", samples, keep=3)
    assert sum("image of" in record["captions"] for record in left.values()) == 3
    assert len(left) == 9 and reasons(verdicts) == {"same-caption": 6}


def test_the_same_question_about_other_pictures_is_no_duplicate(sample, apply):
    samples = [
        sample("a", turns=["<image>\nWhat color?", "red", "How many?", "2"], images=[b"x"]),
        sample("b", turns=["<image>\nWhat color?", "red"], images=[b"y"]),
        sample("c", turns=["<image>\nHow many?", "2", "Is it big?", "yes"], images=[b"x"]),
        sample("d", turns=["<image>\nWhat color?", "green"], images=[b"x"]),
        sample("e", turns=["<image>\nWhat color?", "red", "what color? ", "Red"], images=[b"z"]),
        sample("f", turns=["what color?\n<image>", "red"], images=[b"y"]),
    ]
    left, verdicts = apply("duplicate-lines", samples)
    assert list(left) == ["a", "b", "c", "d", "e"]
    assert [turn["value"] for turn in left["c"]["conversations"]] == ["<image>\nIs it big?", "yes"]
    assert [turn["value"] for turn in left["e"]["conversations"]] == ["<image>\nWhat color?", "red"]
    assert reasons(verdicts) == {"same-answer": 3}


def test_captions_written_as_answers_are_lines_only_when_told(sample, apply):
    samples = [
        sample(str(index), turns=["<image>\nDescribe it.", "image of"], images=[b"%d" % index]) for index in (1, 2)
    ]
    assert len(apply("duplicate-lines", samples)[0]) == 2
    assert list(apply("duplicate-lines", samples, answers_are_captions=True)[0]) == ["1"]


def test_near_pictures_are_dropped_and_others_stay(sample, apply):
    samples = [sample(f"p{seed}", f"caption {seed}", images=[picture(seed)]) for seed in range(12)]
    samples += [
        sample("jpeg", "again", images=[picture(3, format="JPEG", quality=60)]),
        sample("small", "again", images=[picture(4, size=(80, 60))]),
        sample("asked", turns=["What is it?", "soft"], images=[picture(5, format="JPEG", quality=70)]),
        sample("two", "again", images=[picture(6, format="JPEG"), picture(7, format="JPEG")]),
        sample("two again", "again", images=[picture(6, size=(80, 60)), picture(7, size=(80, 60))]),
        sample("other order", "again", images=[picture(7, size=(80, 60)), picture(6, size=(80, 60))]),
        sample("text", "again", images=[]),
    ]
    left, verdicts = apply("near-pictures", samples)
    assert [item.key for item in samples if item.key not in left] == ["jpeg", "small", "two again"]
    assert verdicts["jpeg"].removed == (("near-picture", "as p3"),)


def test_flat_pictures_are_near_to_none_but_equal_to_themselves(sample, apply):
    def flat(color):
        buffer = io.BytesIO()
        Image.new("RGB", (50, 50), color).save(buffer, "PNG")
        return buffer.getvalue()

    samples = [sample(str(at), "flat", images=[flat(color)]) for at, color in enumerate(["red", "blue", "red"])]
    assert list(apply("near-pictures", samples)[0]) == ["0", "1"]


def test_near_captions_are_those_that_share_most_letters(sample, apply):
    long = "a man in a red jacket rides a brown horse along the beach while two dogs run behind him at sunset"
    samples = [
        sample("a", long),
        sample("b", long.replace("sunset", "sunrise") + "!"),
        sample("c", long.upper() + ".", "a cat"),
        sample("d", "a woman reads a book"),
        sample("e", "a woman reads a look"),
        sample("f", "Flight 447 to Paris, 12 May 2009, gate 4, seats in the last row, photographed by a passenger"),
        sample("g", "Flight 448 to Paris, 12 May 2009, gate 4, seats in the last row, photographed by a passenger"),
        sample("h", "ab"),
        sample("i", "ab"),
    ]
    left, verdicts = apply("near-lines", samples)
    assert list(left) == ["a", "c", "d", "e", "f", "g", "h"]
    assert left["c"] == {"captions": ["a cat"]}
    assert reasons(verdicts) == {"near-caption": 3}
    assert list(apply("near-lines", samples, threshold=0.6)[0]) == ["a", "c", "d", "f", "g", "h"]
    assert len(apply("near-lines", samples, keep=2)[0]) == 9


def test_near_captions_are_those_that_comparing_all_finds(sample, apply):
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("ba", "ri", "mo", "tel", "gar", "sun") for b in ("lo", "nek", "pi", "sto", "vum")]
    lines = [" ".join(rng.choices(words, k=14)) for _ in range(150)]
    for line in lines[:100]:
        changed = line.split()
        changed[rng.randrange(14)] = rng.choice(words)
        lines.append(" ".join(changed))
    kept, expected = [], set()
    for index, line in enumerate(lines):
        runs = shingles(line)
        if any(jaccard(runs, other) >= 0.8 for other in kept):
            expected.add(str(index))
        else:
            kept.append(runs)
    left, _ = apply("near-lines", [sample(str(index), line) for index, line in enumerate(lines)], threshold=0.8)
    found = {str(index) for index in range(len(lines))} - set(left)
    assert len(expected) > 50 and found <= expected and len(found) >= 0.95 * len(expected)
