"""From samples to tensors: ids and labels written out by hand, and what cannot be used is passed over by name."""

import io

import pytest
import torch
from PIL import Image

from visplice.lm.prompt import IGNORE, TURNS, PromptBuilder, VisualTokens
from visplice.train.data.module import ShardData, ShardDataset
from visplice.train.data.prepare import AlignPreparer, InstructPreparer, SkippedSample
from visplice.train.data.shards import Sample, write_shards
from visplice.vision.image import ImageError
from visplice.vision.transform import Transform

TRANSFORM = Transform(image_size=28, resize="squash", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
QUESTIONS = [("What color is the circle?", "red"), ("How many shapes are there?", "2")]


def png(color="white"):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(buffer, "PNG")
    return buffer.getvalue()


def talk(*texts):
    """Turns of human and gpt in LLaVA's form."""
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def sample(*texts, image=None, **record):
    return Sample(key="s1", image=image, record=({"conversations": talk(*texts)} if texts else {}) | record)


@pytest.fixture
def align(tokenizer):
    return AlignPreparer(transform=TRANSFORM, tokenizer=tokenizer)


@pytest.fixture
def instruct(tokenizer):
    """Builds the preparer of stage 2 for pictures of five visual tokens."""

    def make(max_length=500):
        prompts = PromptBuilder(tokenizer, TURNS, VisualTokens(vocab_size=tokenizer.vocab_size, count=5))
        return InstructPreparer(transform=TRANSFORM, prompts=prompts, max_length=max_length, image_size=28)

    return make


@pytest.fixture
def written(tokenizer):
    """Ids and labels written out: a string is text, a list ids as they are, `answer` is supervised with its end."""
    controls = {name: tokenizer.control(f"<|{name}|>") for name in ("begin", "user", "assistant", "end")}
    first = tokenizer.vocab_size

    def ids_and_labels(*turns):
        ids, labels = [controls["begin"]], [IGNORE]
        for parts, answer in turns:
            asked = [controls["user"]]
            for part in parts:
                asked += [first, *[first + 2] * 5, first + 1] if part is Image else tokenizer.encode(part)
            asked.append(controls["assistant"])
            said = [*tokenizer.encode(answer), controls["end"]]
            ids, labels = ids + asked + said, labels + [IGNORE] * len(asked) + said
        return ids, labels

    return ids_and_labels


# --- stage 1 ---------------------------------------------------------------------------------------------------------


def test_align_gives_pixels_and_the_ids_of_a_caption(align, tokenizer, rng):
    captions = ["a red circle", "a circle that is red"]
    drawn = {tuple(align(sample(image=png(), captions=captions), rng)["caption"].tolist()) for _ in range(20)}
    assert drawn == {tuple(tokenizer.encode(caption)) for caption in captions}
    row = align(sample(image=png("white"), captions=captions), rng)
    assert row["key"] == "s1" and torch.equal(row["pixels"], torch.ones(3, 28, 28))


def test_align_collates_captions_flat_with_their_beginnings(align, tokenizer, rng):
    texts = ["a red circle", "a ring", "a big blue square at the top"]
    batch = align.collate([align(sample(image=png(), captions=[text]), rng) for text in texts])
    pieces = [tokenizer.encode(text) for text in texts]
    assert batch["captions"].tolist() == [token for piece in pieces for token in piece]
    assert batch["offsets"].tolist() == [0, len(pieces[0]), len(pieces[0]) + len(pieces[1])]
    assert batch["pixels"].shape == (3, 3, 28, 28) and batch["keys"] == ["s1"] * 3


@pytest.mark.parametrize(
    ("image", "record", "message"),
    [
        (None, {"captions": ["a"]}, "s1 has no picture"),
        (png(), {}, "s1 has no captions"),
        (png(), {"captions": []}, "s1 has no captions"),
        (png(), {"captions": [""]}, "s1 has an empty caption"),
    ],
)
def test_align_skips_what_it_cannot_use(align, rng, image, record, message):
    with pytest.raises(SkippedSample, match=message):
        align(sample(image=image, **record), rng)


def test_broken_picture_is_an_image_error(align, instruct, rng):
    with pytest.raises(ImageError):
        align(sample(image=png()[:60], captions=["a"]), rng)
    with pytest.raises(ImageError):
        instruct()(sample("<image>q", "a", image=b"no picture"), rng)


# --- stage 2 ---------------------------------------------------------------------------------------------------------


def test_conversation_with_a_picture_by_hand(instruct, written, rng):
    (q1, a1), (q2, a2) = QUESTIONS
    row = instruct()(sample("<image>\n" + q1, a1, q2, a2, image=png("white")), rng)
    assert (row["ids"], row["labels"]) == written(([Image, q1], a1), ([q2], a2))
    assert (row["key"], row["dropped"]) == ("s1", 0)
    assert len(row["pixels"]) == 1 and torch.equal(row["pixels"][0], torch.ones(3, 28, 28))


def test_picture_stands_where_its_mark_stands(instruct, written, rng):
    (q1, a1), (q2, a2) = QUESTIONS
    row = instruct()(sample(q1, a1, "now <image>" + q2, a2, image=png()), rng)
    assert (row["ids"], row["labels"]) == written(([q1], a1), (["now ", Image, q2], a2))


def test_picture_without_a_mark_goes_to_the_front(instruct, written, rng):
    (q1, a1), (q2, a2) = QUESTIONS
    row = instruct()(sample(q1, a1, q2, a2, image=png()), rng)
    assert (row["ids"], row["labels"]) == written(([Image, q1], a1), ([q2], a2))


def test_text_alone_has_no_pixels(instruct, written, rng):
    (q1, a1), _ = QUESTIONS
    row = instruct()(sample(q1, a1), rng)
    assert (row["ids"], row["labels"]) == written(([q1], a1))
    assert row["pixels"] == []


def test_turns_that_do_not_fit_are_dropped_whole_and_counted(instruct, written, rng):
    (q1, a1), (q2, a2) = QUESTIONS
    whole = written(([Image, q1], a1), ([q2], a2), ([q1], a1))
    two, one = written(([Image, q1], a1), ([q2], a2)), written(([Image, q1], a1))
    conversation = sample("<image>" + q1, a1, q2, a2, q1, a1, image=png())
    for limit, expected, dropped in (
        (len(whole[0]), whole, 0),
        (len(whole[0]) - 1, two, 1),
        (len(two[0]), two, 1),
        (len(two[0]) - 1, one, 2),
        (len(one[0]), one, 2),
    ):
        row = instruct(limit)(conversation, rng)
        assert ((row["ids"], row["labels"]), row["dropped"]) == (expected, dropped), limit
    with pytest.raises(SkippedSample, match=f"s1 needs more than max_length {len(one[0]) - 1} positions"):
        instruct(len(one[0]) - 1)(conversation, rng)


def test_question_that_nobody_answered_is_left_out(instruct, written, rng):
    (q1, a1), (q2, _) = QUESTIONS
    row = instruct()(sample("<image>" + q1, a1, q2, image=png()), rng)
    assert (row["ids"], row["labels"]) == written(([Image, q1], a1))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "no conversation"),
        ({"conversations": talk("alone")}, "no conversation"),
        ({"conversations": "text"}, "no conversation"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "bot", "value": "a"}]}, "has a turn that is not"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt"}]}, "has a turn that is not"),
        ({"conversations": ["q", "a"]}, "has a turn that is not"),
        ({"conversations": talk("q", "a")[::-1]}, "sample s1: message 1 has role 'assistant'"),
        ({"conversations": talk("q", "a")[:1] * 2}, "sample s1: message 2 has role 'user'"),
        ({"conversations": talk("<image><image>q", "a")}, "s1 has 2 image slots but 1 image"),
    ],
)
def test_instruct_skips_what_it_cannot_use_and_names_it(instruct, rng, record, message):
    with pytest.raises(SkippedSample, match=message):
        instruct()(sample(image=png(), **record), rng)


def test_mark_without_a_picture_is_skipped(instruct, rng):
    with pytest.raises(SkippedSample, match="s1 has 1 image slot but 0 images"):
        instruct()(sample("<image>q", "a"), rng)


def test_picture_whose_turn_does_not_fit_is_skipped(instruct, written, rng):
    (q1, a1), (q2, a2) = QUESTIONS
    limit = len(written(([q1], a1))[0])
    with pytest.raises(SkippedSample, match="s1 has 0 image slots but 1 image"):
        instruct(limit)(sample(q1, a1, "<image>" + q2, a2, image=png()), rng)


def test_collate_pads_on_the_right_without_labels(instruct, written, rng):
    (q1, a1), (q2, a2) = QUESTIONS
    preparer = instruct()
    rows = [preparer(sample(q1, a1), rng), preparer(sample("<image>" + q1, a1, q2, a2, image=png()), rng)]
    batch = preparer.collate(rows)
    (short, short_labels), (long, long_labels) = written(([q1], a1)), written(([Image, q1], a1), ([q2], a2))
    padding = len(long) - len(short)
    assert batch["ids"].tolist() == [short + [0] * padding, long]
    assert batch["labels"].tolist() == [short_labels + [IGNORE] * padding, long_labels]
    assert batch["pixels"].shape == (1, 3, 28, 28)  # of the row that has a picture
    assert (batch["keys"], batch["dropped_turns"]) == (["s1", "s1"], 0)
    assert preparer.supervised(batch)
    assert not preparer.supervised(batch | {"labels": torch.full_like(batch["labels"], IGNORE)})


def test_collate_of_text_alone_has_no_pixels(instruct, rng):
    preparer = instruct()
    batch = preparer.collate([preparer(sample("q", "a"), rng)])
    assert batch["pixels"].shape == (0, 3, 28, 28)


def test_collate_sums_the_dropped_turns(instruct, written, rng):
    (q1, a1), (q2, a2) = QUESTIONS
    preparer = instruct(len(written(([q1], a1))[0]))
    assert preparer.collate([preparer(sample(q1, a1, q2, a2), rng)] * 3)["dropped_turns"] == 3


# --- the data set ----------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """Twelve samples with captions, of which `s03` and `s07` have broken pictures."""
    images = [b"broken" if index in (3, 7) else png() for index in range(12)]
    samples = [Sample(key=f"s{i:02d}", image=image, record={"captions": ["a"]}) for i, image in enumerate(images)]
    write_shards(samples, tmp_path, source={}, per_shard=5)
    return tmp_path


GOOD = [f"s{index:02d}" for index in range(12) if index not in (3, 7)]


def keys(dataset):
    return [row["key"] for row in dataset]


def test_bad_pictures_are_named_and_passed_over(data, align, capsys):
    dataset = ShardDataset(data, align, seed=0, max_skipped=2)
    assert sorted(keys(dataset)) == GOOD
    lines = sorted(capsys.readouterr().err.splitlines())
    assert [line.split(":")[:2] for line in lines] == [["skipped", " s03"], ["skipped", " s07"]]
    assert "is not an image" in lines[0]
    assert sorted(keys(dataset)) == GOOD  # the budget is one epoch's


def test_one_bad_picture_more_than_allowed_stops_the_run(data, align):
    with pytest.raises(ValueError, match=r"2 samples could not be used, more than data\.max_skipped 1.*s07"):
        keys(ShardDataset(data, align, seed=None, max_skipped=1))


def test_every_epoch_has_its_own_order_and_the_seed_decides_it(data, align):
    def epochs(seed):
        dataset = ShardDataset(data, align, seed=seed, max_skipped=2)
        return keys(dataset), keys(dataset)

    first, second = epochs(1)
    assert epochs(1) == (first, second)
    assert first != second and sorted(first) == sorted(second) == GOOD
    assert epochs(2)[0] != first
    assert epochs(None) == (GOOD, GOOD)


def test_length_is_the_number_of_samples(data, align):
    assert len(ShardDataset(data, align, seed=0, max_skipped=2)) == 12


def test_empty_data_set_is_refused(tmp_path, align):
    write_shards([], tmp_path, source={})
    with pytest.raises(ValueError, match="holds no samples"):
        ShardDataset(tmp_path, align, seed=0, max_skipped=0)


def test_data_module_refuses_a_wrong_path_and_an_empty_batch_at_once(data, tmp_path):
    for paths in ({"path": str(tmp_path / "none")}, {"path": str(data), "val_path": str(tmp_path / "none")}):
        with pytest.raises(ValueError, match=r"none/manifest\.json: no such file"):
            ShardData(**paths)
    with pytest.raises(ValueError, match=r"data\.batch_size is 0"):
        ShardData(str(data), batch_size=0)
