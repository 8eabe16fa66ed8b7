"""Who answers what: marks in prompts, pictures of other questions, batches and shares."""

import pytest

from visplice.train.evaluate.answering import Work, batches, message, other_pictures, plan
from visplice.train.evaluate.tasks import Question


def content(prompt, question):
    return [part.get("text", "<image>") for part in message(prompt, question)["content"]]


def test_the_picture_stands_where_the_prompt_says():
    assert content("{question}\nShort.", "Why?") == ["<image>", "Why?\nShort."]
    assert content("Look: <image>\n{question}", "Why?") == ["Look: ", "<image>", "Why?"]


def test_marks_inside_a_question_are_its_own_text(model):
    assert content("{question} ok", "is <image> {question}?") == ["<image>", "is <image> {question}? ok"]
    built = model.prompts.build([message("{question}", "is <image> there?")], add_generation_prompt=True)
    assert built.num_images == 1


def test_every_picture_is_swapped_for_another_each_once():
    names = [f"{number}.png" for number in range(50)]
    swapped = other_pictures(names, 0)
    assert sorted(swapped) == sorted(swapped.values()) == sorted(names)
    assert all(one != other for one, other in swapped.items())
    assert other_pictures(names[::-1], 0) == swapped != other_pictures(names, 1)
    with pytest.raises(ValueError, match="needs two pictures or more, found one"):
        other_pictures(["a.png"], 0)


def work(count):
    return Work(image="x", shown="x", questions=[Question(id=1, text="", image="x")] * count)


def test_batches_hold_whole_pictures_up_to_a_number_of_questions():
    counts = [[len(one.questions) for one in batch] for batch in batches([work(n) for n in (1, 2, 2, 3, 9, 1)], 4)]
    assert counts == [[1, 2], [2], [3], [9], [1]]


def test_processes_share_the_pictures_and_keep_their_questions_together():
    questions = [Question(id=number, text=f"q {number}", image=f"{number // 3}.png") for number in range(21)]
    shares = [plan(questions, {}, (process, 3)) for process in range(3)]
    assert sorted(one.image for share in shares for one in share) == [f"{number}.png" for number in range(7)]
    assert [len(share) for share in shares] == [3, 2, 2]
    for one in shares[0]:
        assert [question.image for question in one.questions] == [one.image] * 3
