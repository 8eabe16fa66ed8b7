"""The VQAv2 accuracy against values that the official code gave, and the report against values by hand.

The two tables were written by `vqaEval.py` of GT-Vision-Lab/VQA at commit a013f00 under Python 2.7.18, unmodified.
"""

import copy
from collections.abc import Sequence
from typing import Any

import pytest

from visplice.train.vqa_metric import VqaReport, accuracy, evaluate, normalize

# What is looked at: how many of the ten annotators gave which answer, and which predictions score how much.
# fmt: off
GOLDEN: dict[str, tuple[dict[str, int], dict[float, list[str]]]] = {
    "agreed answers are compared as typed": (
        {"yes": 10},
        {1.0: ["yes", " yes ", "\nyes\t", "yes\n"],
         0.0: ["Yes", "YES", "yes.", "yes!", "a yes", "the yes", "no", "", "yes yes"]},
    ),
    "agreed answers keep their numbers, marks and articles": (
        {"The two, dogs.": 10},
        {1.0: ["The two, dogs.", "The two,\ndogs.", "The two,\tdogs."],
         0.0: ["the two, dogs.", "two dogs", "2 dogs", "The two,\rdogs."]},
    ),
    "agreed after white space": (
        {"red": 4, " red": 3, "red\n": 2, "\tred": 1},
        {1.0: ["red", "red "],
         0.0: ["Red", "a red", "red."]},
    ),
    "agreed empty answers": (
        {"": 9, " \n": 1},
        {1.0: ["", "\n"],
         0.0: ["the", "."]},
    ),
    "three are enough": (
        {"red": 1, "blue": 2, "green": 3, "gold": 4},
        {1.0: ["gold", "Gold"],
         0.9: ["green", "GREEN."],
         0.6: ["blue", "the blue"],
         0.3: ["red"],
         0.0: ["pink", ""]},
    ),
    "empty after normalization": (
        {"the": 2, "!": 1, "": 1, "yes": 6},
        {1.0: ["", "a", "An", "?", ".", " - ", "yes", "the yes", "!!!"],
         0.0: ["'"]},
    ),
    "case makes a disagreement": (
        {"Yes": 1, "yes": 9},
        {1.0: ["yes", "Yes", "yES", "yes."],
         0.0: ["yes it is", "no"]},
    ),
    "articles": (
        {"a dog": 2, "the dog": 1, "dog": 1, "an apple": 3, "cats and the dog": 3},
        {1.0: ["dog", "THE dog", "a the an dog", "dog a", "a-dog", "the,dog"],
         0.9: ["apple", "cats and dog", "cats and a dog"],
         0.0: ["dogs", "theatre"]},
    ),
    "number words": (
        {"two": 3, "2": 1, "none": 1, "zero": 1, "0": 1, "ten": 1, "eleven": 2},
        {1.0: ["2", "two", "TWO", "Two."],
         0.9: ["0", "none", "Zero"],
         0.6: ["eleven"],
         0.3: ["10", "ten!"],
         0.0: ["to", "nothing", "11", "two two", "twenty two"]},
    ),
    "more number words": (
        {"one": 1, "three": 1, "four": 1, "five": 1, "six": 1, "seven": 1, "eight": 1, "nine": 1, "1": 2},
        {0.9: ["1", "one", "a one"],
         0.3: ["3", "4", "5", "6", "7", "8", "9"],
         0.0: ["first"]},
    ),
    "commas in numbers": (
        {"1,000": 3, "1000": 2, "1,000 people": 2, "1.000": 1, "10,5": 2},
        {1.0: ["1000", "1,000", "1,000."],
         0.6: ["1,000 people", "1000 people", "1000-people", "105"],
         0.3: ["1.000"],
         0.0: ["1 000", "1, 000", "10.5", "1,,000"]},
    ),
    "a comma in a number deletes all marks": (
        {"1,000-2,000": 2, "10002000": 2, "1000 2000": 2, "a,1,2": 4},
        {1.0: ["1,000-2,000", "a12", "a,1,2"],
         0.6: ["1000-2000", "1000/2000"],
         0.0: ["a 12", "12", "1,2"]},
    ),
    "periods and decimals": (
        {"3.5": 3, "3.5.": 1, "35": 1, "5.": 2, ".5": 1, "p.m.": 2},
        {1.0: ["3.5", "3.5."],
         0.6: ["5", "5.", "pm", "p.m.", "p.m", "P.M."],
         0.3: ["35", ".5", "..5"],
         0.0: ["3. 5", "3 5", "0.5", "p. m."]},
    ),
    "times and money": (
        {"10:30": 3, "10:30 am": 2, "$5": 2, "5": 1, "50%": 2},
        {0.9: ["10:30"],
         0.6: ["10:30 a.m.", "10:30 AM", "$5", "50%"],
         0.3: ["5"],
         0.0: ["1030", "10 30", "10:30am", "$5.00", "50", "50 %"]},
    ),
    "glued marks become spaces": (
        {"t-shirt": 3, "t shirt": 1, "tshirt": 2, "black/white": 2, "black and white": 2},
        {1.0: ["t-shirt", "t shirt", "T-Shirt", "t_shirt", "t--shirt", "t - shirt", "t -shirt"],
         0.6: ["tshirt", "black/white", "black white", "black / white", "black, white", "a black/white"],
         0.0: ["blackwhite", "black&white"]},
    ),
    "one mark beside a space decides for all of its kind": (
        {"a-b -c": 2, "ab c": 2, "a b c": 3, "x, y,z": 3},
        {1.0: ["a-b -c", "ab-c", "ab c"],
         0.9: ["a-b-c", "a b c", "b c", "x, y,z", "x yz", "x ,y,z"],
         0.0: ["x y z", "x,y,z"]},
    ),
    "all marks": (
        {';/[]"{}()=+\\_-><@`,?!word': 3, "word": 1, "a:b": 3, "it's": 3},
        {1.0: ["word", "[word]", "{word}", "(word)", '"word"', "word;", 'word\\', "<word>", "`word`", "word=+"],
         0.9: ["a:b", "it's"],
         0.0: ["w@rd", "'word'", ":word", "b", "a b", "its", "it s"]},
    ),
    "contractions": (
        {"dont": 2, "don't": 1, "couldn't've": 2, "couldntve": 1, "somebody'd": 3, "somebodyd": 1},
        {1.0: ["somebodyd", "somebody'd"],
         0.9: ["dont", "don't", "Dont"],
         0.6: ["couldnt've", "couldn'tve", "couldn't've"],
         0.3: ["couldntve"],
         0.0: ["don’t", "do not", "somebody had"]},
    ),
    "contractions that stay": (
        {"Im": 2, "I'm": 2, "lets": 1, "let's": 2, "'ow'sat": 1, "y'all'dve": 2},
        {0.6: ["im", "I'm", "i'm", "let's", "yall'd've", "y'all'd've"],
         0.3: ["lets", "ow's'at", "'ow's'at"],
         0.0: ["yalldve"]},
    ),
    "unicode": (
        {"café": 3, "cafe": 1, "１,０": 1, "10": 1, "日本": 3, "naïve": 1},
        {0.9: ["café", "CAFÉ", "日本", "日本.", "\u3000日本\u00a0"],
         0.3: ["cafe", "１,０", "１ ０", "10", "NAÏVE"],
         0.0: ["cafe\u0301", "１０", "日本。", "日 本"]},
    ),
    "white space inside": (
        {"hot\ndog": 3, "hot dog": 1, "hot  dog": 1, "hotdog": 4, "hot\u00a0dog": 1},
        {1.0: ["hot dog", "hot\tdog", "hot \n dog", "hotdog", "hot\rdog", "hot\u2003dog", "\u00a0hot dog"]},
    ),
    "at most 32 full stops": (
        {"." * 32 + "a1": 2, "." * 33 + "b": 3, "b": 3, ".b": 2},
        {1.0: ["b", ".b"],
         0.9: ["." * 33 + "b"],
         0.6: ["a1"],
         0.0: ["." * 33 + "a1", "." * 34 + "a1", "." * 34 + "b", "." * 40 + "b"]},
    ),
    "marks as the answer": (
        {"?": 2, "!": 1, "&": 3, "*": 1, "no idea?": 3},
        {0.9: ["?", "", "&", "no idea", "no idea!", "no  idea ?", "no-idea", "no,idea?"],
         0.3: ["*"]},
    ),
}

# Answer: what the official code makes of it where the annotators disagree.
NORMALIZED = {
    "": "", "The": "", "A dog!": "dog", "an one-way street": "1 way street", "none": "0", "ten tens": "10 tens",
    "Twenty One": "twenty 1", "1,000 people": "1000 people", "1,000 (people)": "1000 people", "(a)": "",
    "x,y": "x y", "x, y": "x y", "x ,y, z,w": "x y zw", "it's 5:30 p.m.": "it's 5:30 pm", "3.14": "3.14",
    "v2.": "v2", ".5": ".5", "<=5.x": "5x", "a/b/c": "b c", "a /b/c": "bc", "U.S.A.": "usa", "e.g. this": "eg this",
    "rock'n'roll": "rock'n'roll", "Whats up": "what's up", "wheres the cat": "where's cat", "theyre": "they're",
    "youd've": "you'd've", "shed": "shed", "ill": "ill", "Ive": "ive", "id've": "id've", "lets": "lets",
    "twas": "'twas", "oclock": "o'clock", "maam": "ma'am", "ows'at": "ows'at", "ow's'at": "'ow's'at",
    "yallll": "yallll", "y'allll": "y'all'll", "somebody'd": "somebodyd", "somebody'dve": "somebody'd've",
    "half-full": "half full", "no_1": "no 1", "50% off": "50% off", "£5.00": "£5.00", "１,０": "１ ０", "x١.٢": "x١٢",
    "École": "école", "tab\tnew\nline": "tab new line", "\\o/": "o", "...": "", "." * 35: "...",
}
# fmt: on

CASES = [
    pytest.param(prediction, [answer for answer, times in given.items() for _ in range(times)], score, id=name)
    for name, (given, by_score) in GOLDEN.items()
    for score, predictions in by_score.items()
    for prediction in predictions
]


@pytest.mark.parametrize(("prediction", "answers", "expected"), CASES)
def test_accuracy_equals_the_official_code(prediction: str, answers: list[str], expected: float) -> None:
    assert len(answers) == 10
    assert accuracy(prediction, answers) == pytest.approx(expected, abs=1e-9)
    assert accuracy(prediction, answers[::-1]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("answer", "expected"), NORMALIZED.items())
def test_normalize_equals_the_official_code(answer: str, expected: str) -> None:
    assert normalize(answer) == expected


def test_full_stops_are_deleted_32_times() -> None:
    assert normalize("." * 32) == ""
    assert normalize("." * 33) == "."


@pytest.mark.parametrize(("num_equal", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
def test_three_matching_annotators_are_enough(num_equal: int, expected: float) -> None:
    answers = ["yes"] * num_equal + ["no"] * (10 - num_equal)
    assert accuracy("yes", answers) == pytest.approx(expected)


def test_a_single_annotator_has_nobody_to_agree_with() -> None:
    assert accuracy("yes", ["yes"]) == 0


def test_accuracy_refuses_no_answers() -> None:
    with pytest.raises(ValueError, match="found no answers"):
        accuracy("yes", [])


def annotation(question_id: int, question_type: str, answer_type: str, answers: Sequence[str]) -> dict[str, Any]:
    return {
        "question_id": question_id,
        "image_id": 100 + question_id,
        "question_type": question_type,
        "answer_type": answer_type,
        "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers, start=1)],
    }


ANNOTATIONS = [
    annotation(1, "is the", "yes/no", ["yes"] * 10),
    annotation(2, "how many", "number", ["two"] * 2 + ["3"] * 8),
    annotation(3, "what", "other", ["a dog"] * 3 + ["cat"] * 7),
    annotation(4, "what", "number", ["1,000"] * 9 + ["1000"]),
]


def test_report_holds_unrounded_fractions() -> None:
    report = evaluate(ANNOTATIONS, {4: "1000", 3: "Dog.", 2: "2", 1: "Yes"})
    assert report == VqaReport(
        accuracy=pytest.approx((0 + 0.6 + 0.9 + 1) / 4, abs=1e-12),
        by_answer_type=pytest.approx({"yes/no": 0, "number": (0.6 + 1) / 2, "other": 0.9}, abs=1e-12),
        by_question_type=pytest.approx({"is the": 0, "how many": 0.6, "what": (0.9 + 1) / 2}, abs=1e-12),
        num_questions=4,
    )
    thirds = [annotation(i, "is the", "yes/no", ["yes"] * 10) for i in range(3)]
    assert evaluate(thirds, {0: "yes", 1: "no", 2: "no"}).accuracy == pytest.approx(1 / 3, abs=1e-15)


def test_evaluate_leaves_the_annotations_as_they_are() -> None:
    annotations = copy.deepcopy(ANNOTATIONS)
    evaluate(annotations, dict.fromkeys(range(1, 5), "Yes\n"))
    assert annotations == ANNOTATIONS


def test_evaluate_refuses_questions_without_prediction() -> None:
    with pytest.raises(ValueError, match=r"^2 of 4 questions have no prediction: 2, 4$"):
        evaluate(ANNOTATIONS, {1: "yes", 3: "dog"})


def test_evaluate_names_only_the_first_few_questions() -> None:
    annotations = [annotation(i, "what", "other", ["dog"] * 10) for i in range(10, 17)]
    with pytest.raises(ValueError, match=r"^6 of 7 questions have no prediction: 10, 11, 12, 13, 14, \.\.\.$"):
        evaluate(annotations, {16: "dog"})


def test_evaluate_refuses_predictions_for_unknown_questions() -> None:
    predictions: dict[Any, str] = dict.fromkeys(range(1, 5), "yes") | {"1": "yes", 9: "no"}
    with pytest.raises(ValueError, match=r"^2 of 6 predictions have .* not annotated: '1', 9$"):
        evaluate(ANNOTATIONS, predictions)


def test_evaluate_refuses_a_question_annotated_twice() -> None:
    with pytest.raises(ValueError, match=r"^1 of 4 questions are annotated twice or more: 3$"):
        evaluate([*ANNOTATIONS, ANNOTATIONS[2]], dict.fromkeys(range(1, 5), "yes"))


def test_evaluate_names_a_question_without_answers() -> None:
    with pytest.raises(ValueError, match="question 7 has no answers"):
        evaluate([annotation(7, "what", "other", [])], {7: "dog"})


def test_evaluate_refuses_an_empty_set() -> None:
    with pytest.raises(ValueError, match="found no annotations"):
        evaluate([], {})
