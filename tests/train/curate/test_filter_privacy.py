"""Private data goes, and numbers that only look like it stay."""

import random
from collections import Counter

import pytest

from visplice.train.curate.privacy import mask


def reasons(verdicts):
    return dict(Counter(removal.reason for verdict in verdicts.values() for removal in verdict.removed))


# Captions and answers of the kind that people write, none of which is private.
ORDINARY = (
    """
2014|10:30|10:30:15|3 1/2|$19.99|€1.299,00|£5|ABC 1234|7XYZ123|KA 01 AB 1234|B-MW 4711|bus 37|the number 4012 train
12/25/2014|25.12.2014|2014-12-25|20140512|2014-2015|1985 1986 1987|1,000,000|100 000|614 264 023|10 20 30 40 50|0-0
4 x 100 m|1920x1080|50%|3.14159|12345|90210|911|9:00-17:00|flight BA2490|room 1408|page 12 of 345|6-3 6-4 7-5|3-2-1
A man with the number 23 on his jersey|A bus with route 555 to Main Street|a sign that reads 55 mph|42nd street
A stop sign at the corner of Elm Street and 3rd Avenue|5th Avenue|9780306406157|ISBN 978-0-306-40615-7|SN 1234567890
4006381333931|version 1.2.3.4|firmware 10.0.0.1|Canon EOS 5D Mark III 24-105mm|1/250 s f/2.8 ISO 400|51.5074, -0.1278
IMG_20140512_153012.jpg|@nasa|a tweet from @user at 10:20|meet at dot com|dinner @ 8|N12345|Boeing 747-400|0-0
1 large pizza, 2 small drinks|16.9 fl oz (500 ml)|100 Broadway musicals|24 Hour Fitness|7 elephants walk on a dirt road
A 1957 Chevy parked on Main Street|50 people walk down the street in London|What is the number on the bus?|yes|:::
via 4 lanes, 20000 cars drive|calle 5|place 3, 12000 people|weg|the call at 10:30 on 12.05.2014|phone from 2010 - 2014
""".replace("\n", "|")
    .strip("|")
    .split("|")
)

PRIVATE = {
    "write to joe.public@example.com now": "write to [email] now",
    "a+b@mail.example.co.uk, jürgen@müller.de": "[email], [email]",
    "joe (at) example (dot) com": "[email]",
    "joe[at]example.org": "[email]",
    "Call (212) 736-5000 today": "Call [phone] today",
    "212-736-5000 or 212.736.5000": "[phone] or [phone]",
    "+1 212 736 5000": "[phone]",
    "1-800-273-8255": "[phone]",
    "call 2127365000": "call [phone]",
    "Tel: 212 736 5000": "Tel: [phone]",
    "call us at 555-0123!": "call us at [phone]!",
    "+44 20 7946 0958 in London": "[phone] in London",
    "020 7930 4832": "[phone]",
    "+49 30 901820": "[phone]",
    "030 901820": "[phone]",
    "01 42 68 53 00": "[phone]",
    "+81 3-3211-1111": "[phone]",
    "+91 22 2266 4801": "[phone]",
    "Lives at 350 Fifth Avenue, New York, NY 10118.": "Lives at [address].",
    "1600 Pennsylvania Avenue NW, Washington, DC 20500": "[address]",
    "a letter to PO Box 1234, Austin, TX 78701": "a letter to [address]",
    "10 Downing Street, London SW1A 2AA": "[address]",
    "111 Wellington Street, Ottawa, ON K1A 0A9": "[address]",
    "Hauptstraße 12, 10115 Berlin": "[address]",
    "12 rue de la Paix, 75002 Paris": "[address]",
    "Calle Mayor 5, 28013 Madrid": "[address]",
    "Via Roma 10, 00184 Roma": "[address]",
    "Bahnhofstrasse 1, 8001 Zürich": "[address]",
    "the camera at 192.168.0.1 records": "the camera at [ip] records",
    "2001:db8::ff00:42:8329": "[ip]",
}


def test_ordinary_captions_and_answers_stay_untouched(sample, apply):
    left, verdicts = apply("privacy", [sample(str(index), text) for index, text in enumerate(ORDINARY)])
    assert {text: left[str(index)]["captions"][0] for index, text in enumerate(ORDINARY)} == {
        text: text for text in ORDINARY
    }
    assert reasons(verdicts) == {}


@pytest.mark.parametrize("text", PRIVATE)
def test_private_data_is_replaced_by_what_it_is(sample, apply, text):
    left, _ = apply("privacy", [sample("a", text)])
    assert left["a"]["captions"] == [PRIVATE[text]]


def test_random_numbers_are_hardly_ever_taken_for_private(sample, apply):
    rng = random.Random(0)
    makers = [
        lambda: f"{rng.randint(0, 23)}:{rng.randint(0, 59):02d}",
        lambda: f"{rng.randint(1, 28):02d}/{rng.randint(1, 12):02d}/{rng.randint(1900, 2030)}",
        lambda: (
            f"{rng.randint(1990, 2030)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d} {rng.randint(0, 23)}:15:00"
        ),
        lambda: f"{rng.choice('$€£')}{rng.randint(0, 9999999):,}.{rng.randint(0, 99):02d}",
        lambda: str(rng.randint(0, 10 ** rng.randint(1, 12))),
        lambda: f"{rng.randint(0, 10**9):,}".replace(",", " "),
        lambda: "".join(rng.choices("ABCDEFGHJK", k=3)) + f" {rng.randint(0, 9999):04d}",
        lambda: " ".join(f"{rng.randint(0, 7)}-{rng.randint(0, 7)}" for _ in range(4)),
        lambda: " ".join(str(rng.randint(0, 999)) for _ in range(4)),
        lambda: f"{rng.uniform(-90, 90):.4f}, {rng.uniform(-180, 180):.4f}",
    ]
    texts = [make() for make in makers for _ in range(100)]
    _, verdicts = apply("privacy", [sample(str(index), text) for index, text in enumerate(texts)])
    assert sum(reasons(verdicts).values()) <= 1


def test_every_text_of_a_record_is_scrubbed_and_nothing_else(sample, apply):
    questions = [
        {"question_id": 5551234567, "question": "Mail of joe@example.com?", "answers": ["joe@example.com", "no"]}
    ]
    item = sample(
        "a",
        "joe@example.com",
        "clean",
        turns=["<image>\nWhose is joe@example.com?", "He is at 212-736-5000."],
        questions=questions,
        url="http://example.com/joe@example.com",
        id="joe@example.com",
    )
    left, verdicts = apply("privacy", [item])
    assert left["a"] == {
        "captions": ["[email]", "clean"],
        "conversations": [
            {"from": "human", "value": "<image>\nWhose is [email]?"},
            {"from": "gpt", "value": "He is at [phone]."},
        ],
        "questions": [{"question_id": 5551234567, "question": "Mail of [email]?", "answers": ["[email]", "no"]}],
        "url": "http://example.com/joe@example.com",
        "id": "joe@example.com",
    }
    assert reasons(verdicts) == {"email": 4, "phone": 1}
    assert "joe" not in str(verdicts["a"].removed) and "736" not in str(verdicts["a"].removed)


def test_only_chosen_kinds_and_fields_are_scrubbed(sample, apply):
    item = sample("a", "joe@example.com 212-736-5000", turns=["joe@example.com?", "yes"])
    left, verdicts = apply("privacy", [item], kinds=("phone",), fields=("captions",))
    assert left["a"]["captions"] == ["joe@example.com [phone]"]
    assert left["a"]["conversations"][0]["value"] == "joe@example.com?"
    assert reasons(verdicts) == {"phone": 1}


def test_scrubbed_text_is_not_scrubbed_again(sample, apply):
    left, _ = apply("privacy", [sample("a", *PRIVATE)])
    _, verdicts = apply("privacy", [sample("a", *left["a"]["captions"])])
    assert reasons(verdicts) == {}


@pytest.mark.parametrize(
    ("kind", "secret", "masked"),
    [
        ("email", "joe.public@mail.example.com", "j***@m***.com"),
        ("email", "joe (at) example (dot) com", "j***"),
        ("phone", "+1 (212) 736-5087", "+* (***) ***-**87"),
        ("ip", "192.168.0.1", "*.*.*.*"),
        ("address", "10 Downing Street, London SW1A 2AA", "*** D*** S***, L*** S*** ***"),
    ],
)
def test_a_report_shows_too_little_to_use(kind, secret, masked):
    assert mask(kind, secret) == masked
