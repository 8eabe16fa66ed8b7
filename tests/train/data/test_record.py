"""Records: what fits the schema passes, everything else is a Fault with a name, whatever was written."""

import json
import pickle
import random
import tracemalloc

import pytest

from visplice.train.data.record import FAULTS, Fault, check_marks, check_record, has_text, load_json

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]


def fault_of(call, *arguments):
    with pytest.raises(Fault) as caught:
        call(*arguments)
    return caught.value.name


def good():
    return [
        {"captions": ["a dog"]},
        {"captions": ["a dog", "größer"], "images": ["jpg"], "id": 3, "url": None, "anything": {"else": [1, None]}},
        {"conversations": TURNS},
        {"conversations": TURNS * 2, "captions": ["both"]},
        {"conversations": TURNS, "captions": None, "images": []},
        {"conversations": TURNS, "questions": [{"question": "What?", "answers": ["that", "it"]}, {"question": "?"}]},
    ]


def test_good_records_pass_as_they_are():
    for record in good():
        before = json.dumps(record)
        check_record(load_json(before.encode()))
        assert has_text(record) and json.dumps(record) == before


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ([], "wrong-type"),
        ("captions", "wrong-type"),
        (None, "wrong-type"),
        ({"captions": "a dog"}, "wrong-type"),
        ({"captions": ["a dog", 1]}, "wrong-type"),
        ({"captions": [None]}, "wrong-type"),
        ({"captions": {"a dog": 1}}, "wrong-type"),
        ({"captions": ["a dog"], "images": "jpg"}, "wrong-type"),
        ({"captions": ["a dog"], "images": [3]}, "wrong-type"),
        ({"conversations": "human: What?"}, "wrong-type"),
        ({"conversations": [["human", "What?"]]}, "wrong-type"),
        ({"conversations": [{"from": "human"}]}, "wrong-type"),
        ({"conversations": [{"from": "human", "value": ["What?"]}]}, "wrong-type"),
        ({"conversations": [{"from": None, "value": "What?"}]}, "wrong-type"),
        ({"captions": ["a"], "questions": {"question": "?"}}, "wrong-type"),
        ({"captions": ["a"], "questions": ["What?"]}, "wrong-type"),
        ({"captions": ["a"], "questions": [{"answers": ["that"]}]}, "wrong-type"),
        ({"captions": ["a"], "questions": [{"question": "?", "answers": "that"}]}, "wrong-type"),
        ({"captions": ["a"], "questions": [{"question": "?", "answers": [{"answer": "that"}]}]}, "wrong-type"),
        ({}, "no-text"),
        ({"captions": []}, "no-text"),
        ({"captions": ["a dog", " \n"]}, "no-text"),
        ({"conversations": []}, "no-text"),
        ({"conversations": TURNS[:1]}, "no-answer"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": " "}]}, "no-answer"),
        ({"conversations": TURNS[::-1]}, "turn-order"),
        ({"conversations": [TURNS[0], TURNS[0], TURNS[1]]}, "turn-order"),
        ({"conversations": [{"from": "user", "value": "What?"}, TURNS[1]]}, "turn-order"),
        ({"captions": ["half \ud83d of a smile"]}, "not-utf8"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": "\udcff"}]}, "not-utf8"),
        ({"captions": ["a"], "questions": [{"question": "\ud83d?", "answers": []}]}, "not-utf8"),
    ],
)
def test_bad_record_is_named(record, name):
    assert fault_of(check_record, record) == name


@pytest.mark.parametrize(
    ("turns", "num_images", "fits"),
    [
        (["<image>\nWhat?"], 1, True),
        (["What?"], 1, True),  # it goes to the front
        (["What?"], 3, True),
        (["<image><image> which?", "<image> and this?"], 3, True),
        (["What?"], 0, True),
        (["<image>\nWhat?"], 0, False),
        (["<image>\nWhat?"], 2, False),
        (["<image><image>"], 1, False),
    ],
)
def test_every_picture_has_its_mark(turns, num_images, fits):
    conversation = [turn for question in turns for turn in ({"from": "human", "value": question}, TURNS[1])]
    record = {"conversations": conversation}
    if fits:
        check_marks(record, num_images)
    else:
        assert fault_of(check_marks, record, num_images) == "placeholder-count"


def test_marks_in_answers_and_captions_are_text():
    check_marks({"conversations": [TURNS[0], {"from": "gpt", "value": "<image> is a mark"}]}, 1)
    check_marks({"captions": ["<image>"]}, 1)


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"", "bad-json"),
        (b"{", "bad-json"),
        (b"{'captions': ['a']}", "bad-json"),
        (b'{"captions": ["a"]} {}', "bad-json"),
        (b"\0" * 512, "bad-json"),
        (b"[" * 100_000, "bad-json"),
        (b"[" * 100_000 + b"]" * 100_000, "bad-json"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "bad-json"),
        (b"9" * 5_000, "bad-json"),  # Python refuses to read numbers of so many digits
        ("größe".encode("latin-1"), "not-utf8"),
        ('"größe"'.encode("utf-16"), "not-utf8"),
        (b"\xff\xfe", "not-utf8"),
    ],
)
def test_what_is_no_json_is_named(data, name):
    assert fault_of(load_json, data) == name


def test_numbers_that_json_has_not_become_null():
    assert load_json(b'{"captions": ["a"], "score": NaN, "more": [Infinity, -Infinity]}') == {
        "captions": ["a"],
        "score": None,
        "more": [None, None],
    }


@pytest.mark.parametrize("depth", [95, 150, 400, 900])
def test_depth_is_bounded_where_pickle_and_json_would_fail(depth):
    text = b'{"captions": ["a"], "more": ' + b"[" * depth + b"]" * depth + b"}"
    record = load_json(text)
    if depth < 100:
        check_record(record)
        pickle.dumps(record)
    else:
        assert fault_of(check_record, record) == "bad-json"


def test_wide_records_are_not_deep():
    check_record({"captions": ["a"] * 10_000, "boxes": [[1, 2, 3, 4]] * 10_000})


def test_key_of_ten_megabytes_costs_no_more_than_itself():
    data = json.dumps({"captions": "x" * 10_000_000, "k" * 10_000_000: [1]}).encode()
    tracemalloc.start()
    record = load_json(data)
    peak_of_reading = tracemalloc.get_traced_memory()[1]
    with pytest.raises(Fault) as caught:
        check_record(record)
    assert len(str(caught.value)) < 200
    assert tracemalloc.get_traced_memory()[1] < peak_of_reading + 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("field", ["captions", "conversations", "images", "questions"])
def test_messages_stay_short_and_on_one_line(field):
    for value in ("\x1b[2J\n" * 9_999, ["\ud800"] * 9_999 + [1], {"\x07": 1}, [[["x" * 9_999]]]):
        with pytest.raises(Fault) as caught:
            check_record({field: value, **({} if field == "captions" else {"captions": ["a"]})})
        message = str(caught.value)
        assert len(message) < 300 and message.isprintable()


def test_random_values_give_faults_or_pass():
    rng = random.Random(0)
    atoms = [None, True, 0, -1.5, "", "<image>", "human", "gpt", "\ud800", "text"]
    names = ["from", "value", "captions", "conversations", "images", "questions", "question", "answers", "id"]

    def value(depth):
        if depth == 0 or rng.random() < 0.2:
            return rng.choice(atoms)
        if rng.random() < 0.4:
            return [value(depth - 1) for _ in range(rng.randrange(4))]
        return {rng.choice(names): value(depth - 1) for _ in range(rng.randrange(5))}

    seen = set()
    for _ in range(20_000):
        record = value(4)
        try:
            check_record(record)
            check_marks(record, 1)
        except Fault as fault:
            seen.add(fault.name)
    assert {"wrong-type", "no-text"} <= seen <= FAULTS.keys()


# --- the fault itself ------------------------------------------------------------------------------------------------


def test_fault_crosses_process_borders():
    fault = pickle.loads(pickle.dumps(Fault("no-text", "nothing")))
    assert (fault.name, str(fault)) == ("no-text", "nothing")


def test_message_can_be_printed_anywhere():
    message = str(Fault("bad-json", "line\n\x1b[31mred\x00 \ud800 größer 猫\u202e"))
    assert message == "line\\n\\x1b[31mred\\x00 \\ud800 größer 猫\\u202e"
    message.encode()


def test_unknown_names_are_our_own_mistake():
    with pytest.raises(AssertionError):
        Fault("no-such-name", "")
