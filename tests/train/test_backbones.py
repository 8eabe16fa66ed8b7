"""What the two small backbones are taught, and the files that ship."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

from visplice.lm.checkpoint import load_llama
from visplice.lm.extension import embedded_folder
from visplice.lm.prompt import IGNORE
from visplice.lm.tokenizer import Tokenizer
from visplice.train import backbone_text, scene_words, scenes
from visplice.train.backbone_text import TextBatches, train_text
from visplice.train.backbone_vision import VISION, scene_labels, train_vision
from visplice.train.scenes import Scene, SceneObject
from visplice.vision.encoder import EncoderConfig, VisionEncoder

COLORS, SIZES = list(scenes.COLORS), list(scenes.SIZES)


def attributes(item):
    return [COLORS.index(item.color), scenes.SHAPES.index(item.shape), SIZES.index(item.size), item.region]


@pytest.fixture
def told(monkeypatch):
    """Records scene, description and questions of every sequence that is made."""
    made = []
    describe, ask = scene_words.describe, scene_words.ask

    def recorded_describe(scene, rng, **options):
        description = describe(scene, rng, **options)
        made.append({"scene": scene, "description": description})
        return description

    def recorded_ask(scene, rng, count, kinds=scene_words.QUESTION_TYPES):
        questions = ask(scene, rng, count, kinds)
        made[-1]["questions"] = questions
        return questions

    monkeypatch.setattr(scene_words, "describe", recorded_describe)
    monkeypatch.setattr(scene_words, "ask", recorded_ask)
    return made


def turns_of(ids, tokenizer):
    """Question ids, position of the assistant token, and answer ids of every turn of a sequence."""
    user, assistant, end = (tokenizer.control(f"<|{name}|>") for name in ("user", "assistant", "end"))
    turns, position = [], 1
    while position < len(ids) and ids[position] == user:
        speaks = ids.index(assistant, position)
        stops = ids.index(end, speaks)
        turns.append((ids[position + 1 : speaks], speaks, ids[speaks + 1 : stops]))
        position = stops + 1
    return turns


# --- text ------------------------------------------------------------------------------------------------------------


def test_sequences_are_a_description_and_its_questions_supervised_on_the_answers(tokenizer, told):
    begin, pad, end = (tokenizer.control(f"<|{name}|>") for name in ("begin", "pad", "end"))
    _, batch = islice(TextBatches(tokenizer, seed=3, batch=8, width=192, easy=1), 2)
    assert batch.ids.shape == batch.labels.shape == (8, 192)
    for ids, labels, made in zip(batch.ids.tolist(), batch.labels.tolist(), told[-8:], strict=True):
        turns = turns_of(ids, tokenizer)
        assert ids[0] == begin and len(turns) > 2
        # Labels are the answers and their end, and nothing else.
        expected = [IGNORE] * 192
        for _, speaks, answer in turns:
            expected[speaks + 1 : speaks + 2 + len(answer)] = [*answer, end]
        assert labels == expected
        last = turns[-1][1] + 2 + len(turns[-1][2])
        assert set(ids[last:]) <= {pad}
        # Every question is one of the scene's, in order, with its answer; now and then it is to be described.
        left = {question.text: question.answer for question in made["questions"]}
        for number, (question, _, answer) in enumerate(turns):
            text, said = tokenizer.decode(question), tokenizer.decode(answer)
            if number == 0:
                assert text.startswith(made["description"].text + " ")
                text = text.removeprefix(made["description"].text + " ")
            if text in scene_words.DESCRIBE:
                assert said == scene_words.caption(made["scene"])
            elif text != scene_words.TELL:
                assert said == left[text]


NOTHING = [IGNORE] * 5  # colour, shape, size and position of an object, and the background


def known(what) -> list[int]:
    """The labels of an object, or of a background."""
    if isinstance(what, str):
        return [*NOTHING[:4], list(scenes.BACKGROUNDS).index(what)]
    return [*attributes(what), IGNORE]


def test_objects_and_background_are_marked_behind_their_last_word(tokenizer, told):
    _, batch = islice(TextBatches(tokenizer, seed=4, batch=8, width=192, easy=1), 2)
    for ids, objects, made in zip(batch.ids.tolist(), batch.objects.tolist(), told[-8:], strict=True):
        description = made["description"]
        assert len(description.spans) == len(made["scene"].objects)
        found = {position: values for position, values in enumerate(objects) if values != NOTHING}
        # Begin and user tokens stand before the text.
        by_text = {tokenizer.decode(ids[2 : position + 1]): values for position, values in found.items()}
        expected = {description.text[:end]: known(item) for _, end, item in description.spans}
        background = made["scene"].background
        told_of = description.text[: description.background_end]
        assert told_of.endswith(("background", f"is {background}", f"background {background}"))
        assert by_text == {**expected, told_of: known(background)}


def test_object_is_marked_behind_its_name_and_where_an_answer_about_it_begins(tokenizer, told):
    batches = TextBatches(tokenizer, seed=5, batch=8, width=192, easy=1, kinds=backbone_text.COURSES[1].kinds)
    _, batch = islice(batches, 2)
    marked = {"about": 0, "background": 0, "mentions": 0}
    for ids, asked, made in zip(batch.ids.tolist(), batch.asked.tolist(), told[-8:], strict=True):
        asked_about = {question.text: question for question in made["questions"]}
        expected = [NOTHING] * 192
        for words, speaks, _ in turns_of(ids, tokenizer):
            text = tokenizer.decode(words).removeprefix(made["description"].text + " ")
            question = asked_about[text]
            if question.about is not None:
                expected[speaks] = known(question.about)
                marked["about"] += 1
            if "background" in text:
                expected[speaks] = known(made["scene"].background)
                marked["background"] += 1
            for end, item in question.mentions:
                (position,) = [
                    p
                    for p in range(speaks)
                    if tokenizer.decode(ids[p + 1 : speaks]) == text[end:].lstrip()
                    and tokenizer.decode(ids[p : p + 1]) == item.shape
                ]
                expected[position] = known(item)
                marked["mentions"] += 1
        assert asked == expected
    assert min(marked.values()) > 4 and marked["about"] > 8 and marked["mentions"] > 8


def test_first_batches_are_easy(tokenizer, told):
    first = next(iter(TextBatches(tokenizer, seed=6, batch=16, width=192, easy=1000)))
    assert first.ids.shape == (16, 192)
    assert {len(made["scene"].objects) for made in told} == {1, 2}
    list(islice(TextBatches(tokenizer, seed=6, batch=16, width=192, easy=1), 2))
    assert max(len(made["scene"].objects) for made in told[-16:]) == 4


def test_no_sequence_tells_of_a_held_out_combination(tokenizer):
    batches = TextBatches(tokenizer, seed=7, batch=50, width=96, easy=2)
    found = 0
    for batch in islice(batches, 10):
        rows = batch.objects[batch.objects[..., 0] != IGNORE].tolist()
        found += len(rows)
        assert not any(
            scenes.is_held_out(COLORS[color], scenes.SHAPES[shape], region) for color, shape, _, region, _ in rows
        )
    assert found > 500


# --- vision ----------------------------------------------------------------------------------------------------------


def test_labels_of_a_picture_with_one_object_by_hand():
    scene = Scene("black", (SceneObject("green", "star", "big", 3, 0.2, 0.5, 0.16),))
    labels = scene_labels(scene, 8)
    color, shape = COLORS.index("green"), scenes.SHAPES.index("star")
    values = {"color": color + 1, "shape": shape + 1, "size": SIZES.index("big") + 1, "region": 4}
    for name, value in values.items():
        expected = torch.zeros(64, dtype=torch.long)
        expected[4 * 8 + 1] = value  # its centre lies in row 4 and column 1
        assert torch.equal(labels[f"centre.{name}"], expected), name
    for name in ("color", "shape"):
        expected = torch.zeros(64, dtype=torch.long)
        expected[[24, 25, 26, 32, 33, 34]] = values[name]  # middles of patches at most 0.16 away
        assert torch.equal(labels[f"cover.{name}"], expected), name
        assert labels[f"count.{name}"].tolist() == [
            int(i == values[name] - 1) for i in range(len(labels[f"count.{name}"]))
        ]
    assert labels["pair.color.region"].nonzero().tolist() == [[color, 3]]
    assert labels["pair.shape.region"].nonzero().tolist() == [[shape, 3]]
    assert labels["pair.size.region"].nonzero().tolist() == [[SIZES.index("big"), 3]]
    assert labels["pair.color.shape"].nonzero().tolist() == [[color, shape]]
    assert labels["background"].item() == list(scenes.BACKGROUNDS).index("black")


def test_topmost_object_covers_a_patch_and_repeats_are_counted():
    below = SceneObject("red", "ring", "big", 4, 0.45, 0.5, 0.18)
    above = SceneObject("blue", "ring", "big", 5, 0.72, 0.5, 0.18)
    labels = scene_labels(Scene("white", (below, above)), 8)
    cover = labels["cover.color"].view(8, 8)[4].tolist()
    red, blue = COLORS.index("red") + 1, COLORS.index("blue") + 1
    assert cover == [0, 0, red, red, blue, blue, blue, 0]  # the middle of column 4, at 0.5625, lies under both
    assert labels["count.shape"][scenes.SHAPES.index("ring")] == 2
    assert labels["count.color"].sum() == 2 and labels["count.color"].max() == 1


# --- files -----------------------------------------------------------------------------------------------------------


def test_trained_text_backbone_is_a_llama_folder(tmp_path, monkeypatch):
    def shipped(path, seed):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((embedded_folder("lm") / "tokenizer.json").read_bytes())
        return Tokenizer(path)

    monkeypatch.setattr(backbone_text, "build_tokenizer", shipped)  # which reads 20,000 scenes
    courses = [replace(course, steps=2) for course in backbone_text.COURSES]
    train_text(tmp_path / "lm", courses=courses, seed=0, batch=2, width=128)
    llama, tokenizer = load_llama(tmp_path / "lm"), Tokenizer.from_pretrained(tmp_path / "lm")
    assert llama.config.vocab_size == tokenizer.vocab_size
    assert llama(torch.tensor([tokenizer.encode("a red circle")])).isfinite().all()
    assert {t.dtype for t in load_file(tmp_path / "lm" / "model.safetensors").values()} == {torch.float16}


def test_later_course_goes_on_from_a_llama_that_had_the_others(tmp_path):
    *had, last = backbone_text.COURSES
    courses = [*(replace(course, steps=0) for course in had), replace(last, steps=1)]
    train_text(tmp_path / "lm", courses=courses, start=embedded_folder("lm"), seed=0, batch=2, width=128)
    before, after = load_llama(embedded_folder("lm")), load_llama(tmp_path / "lm")
    assert (tmp_path / "lm/tokenizer.json").read_bytes() == (embedded_folder("lm") / "tokenizer.json").read_bytes()
    moved = (after.layers[0].attention.wq.weight - before.layers[0].attention.wq.weight).abs().max()
    assert 0 < moved < 0.1 * before.layers[0].attention.wq.weight.abs().max()


def test_trained_vision_backbone_opens_as_an_encoder(tmp_path):
    train_vision(tmp_path, steps=(1, 2), seed=0, batch=8)
    encoder = VisionEncoder(EncoderConfig(**VISION.to_dict() | {"weights": str(tmp_path / "encoder.safetensors")}))
    assert encoder(torch.zeros(1, 3, 112, 112)).isfinite().all()
    assert {t.dtype for t in load_file(tmp_path / "encoder.safetensors").values()} == {torch.float16}


def test_vision_backbone_goes_on_from_another(tmp_path):
    shipped = embedded_folder("vision") / "encoder.safetensors"
    train_vision(tmp_path, steps=(0, 1), start=shipped, seed=0, batch=8)
    before, after = load_file(shipped), load_file(tmp_path / "encoder.safetensors")
    name = "blocks.0.attn.qkv.weight"
    moved = (after[name].float() - before[name].float()).abs().max()
    assert 0 < moved < 0.1 * before[name].float().abs().max()


def test_shipped_tokenizer_writes_the_words_of_the_task_as_one_id_each(tokenizer):
    words = (*scenes.COLORS, *scenes.SHAPES, *scenes.BACKGROUNDS, *scenes.SIZES, "yes", "no", "1", "2", "3", "4")
    assert {word: len(tokenizer.encode(word)) for word in words} == dict.fromkeys(words, 1)
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in (*scenes.POSITIONS, "Zürich, 7 °C"))


def test_shipped_files_are_small():
    assert (embedded_folder("vision") / "encoder.safetensors").stat().st_size < 6_000_000
    assert sum(file.stat().st_size for file in embedded_folder("lm").iterdir()) < 12_000_000


def test_shipped_encoder_has_the_layout_of_clip(encoder):
    names = load_file(embedded_folder("vision") / "encoder.safetensors").keys()
    assert {"cls_token", "pos_embed", "norm_pre.weight", "norm_pre.bias", "patch_embed.proj.weight"} <= names
    assert "patch_embed.proj.bias" not in names
    assert VisionEncoder(encoder)(torch.zeros(1, 3, 112, 112)).shape == (1, 65, 192)
