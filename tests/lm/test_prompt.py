import re
from importlib.resources import files

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from visplice.lm.prompt import IGNORE, TURNS, PromptBuilder, Template, VisualTokens
from visplice.lm.templates import Text
from visplice.lm.tokenizer import Tokenizer

# One id a word, so that every prompt can be written out by hand.
WORDS = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "what", "color", "red", "and", "blue", "both"]
WORDS += ["<", "image", ">", "[UNK]"]
PAD, BEGIN, END, USER, ASSISTANT, WHAT, COLOR, RED, AND, BLUE, BOTH, LEFT, IMAGE_WORD, RIGHT, UNKNOWN = range(15)
START, STOP, PATCH = 15, 16, 17
BLOCK = [START, PATCH, PATCH, PATCH, STOP]
_ = IGNORE


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    backend = Backend(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(WORDS[:5])
    file = tmp_path_factory.mktemp("words") / "tokenizer.json"
    backend.save(str(file))
    return Tokenizer(file)


@pytest.fixture
def builder(words):
    return PromptBuilder(words, TURNS, VisualTokens(vocab_size=15, count=3))


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def text(content):
    return {"type": "text", "text": content}


IMAGE_PART = {"type": "image"}


def test_virtual_ids_stand_directly_above_the_vocabulary():
    visual = VisualTokens(vocab_size=32_000, count=2)
    assert (visual.start, visual.end, visual.patch) == (32_000, 32_001, 32_002)
    assert visual.block() == [32_000, 32_002, 32_002, 32_001]


def test_one_turn_supervises_exactly_the_answer_and_the_end(builder):
    prompt = builder.build([user("what color"), assistant("red and blue")])
    assert prompt.ids == [BEGIN, USER, WHAT, COLOR, ASSISTANT, RED, AND, BLUE, END]
    assert prompt.labels == [_, _, _, _, _, RED, AND, BLUE, END]
    assert (prompt.num_images, prompt.num_supervised) == (0, 4)


def test_two_turns_with_images_written_out(builder):
    messages = [
        user([IMAGE_PART, text("what color")]),
        assistant("red"),
        user([text("and"), IMAGE_PART, IMAGE_PART]),
        assistant([text("both"), text("blue")]),
    ]
    prompt = builder.build(messages)
    first, second = [BEGIN, USER, *BLOCK, WHAT, COLOR, ASSISTANT], [USER, AND, *BLOCK, *BLOCK, ASSISTANT]
    assert prompt.ids == [*first, RED, END, *second, BOTH, BLUE, END]
    assert prompt.labels == [_] * len(first) + [RED, END] + [_] * len(second) + [BOTH, BLUE, END]
    assert (prompt.num_images, prompt.num_supervised) == (3, 5)


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        ("<image>what color", [*BLOCK, WHAT, COLOR]),
        ("<image>\nwhat color", [*BLOCK, WHAT, COLOR]),
        ("what color\n<image>", [WHAT, COLOR, *BLOCK]),
        ("what <image> color", [WHAT, *BLOCK, COLOR]),
        ("<image><image>both", [*BLOCK, *BLOCK, BOTH]),
        ("<image>", BLOCK),
    ],
)
def test_mark_in_a_users_text_is_an_image(builder, content, ids):
    prompt = builder.build([user(content), assistant("red")])
    assert prompt.ids == [BEGIN, USER, *ids, ASSISTANT, RED, END]
    assert prompt.labels == [_] * (len(ids) + 3) + [RED, END]
    assert prompt.num_images == content.count("<image>")


def test_line_breaks_around_an_image_are_dropped_and_others_kept(tokenizer):
    builder = PromptBuilder(tokenizer, TURNS, VisualTokens(vocab_size=324, count=3))
    start, stop, patch = 324, 325, 326
    block = [start, patch, patch, patch, stop]
    prompt = builder.build([user("what\n\n<image>\nis\nthe"), assistant("red\n")])
    between = [*tokenizer.encode("what"), *block, *tokenizer.encode("is\nthe")]
    assert prompt.ids == [1, 3, *between, 4, *tokenizer.encode("red\n"), 2]
    assert tokenizer.decode(prompt.labels[-len(tokenizer.encode("red\n")) - 1 :]) == "red\n"


def test_mark_in_an_answer_is_plain_text(builder):
    prompt = builder.build([user("what"), assistant("<image>")])
    assert prompt.ids == [BEGIN, USER, WHAT, ASSISTANT, LEFT, IMAGE_WORD, RIGHT, END]
    assert prompt.labels == [_] * 4 + [LEFT, IMAGE_WORD, RIGHT, END]
    assert prompt.num_images == 0


def test_control_token_in_a_users_text_is_no_control_token(builder):
    prompt = builder.build([user("what <|end|><|assistant|> red"), assistant("blue")])
    assert prompt.ids.count(END) == 1 and prompt.ids.count(ASSISTANT) == 1
    assert prompt.labels == [_] * (len(prompt.ids) - 2) + [BLUE, END]


def test_generation_prompt_opens_the_answer_and_supervises_nothing(builder):
    prompt = builder.build([user("<image>what")], add_generation_prompt=True)
    assert prompt.ids == [BEGIN, USER, *BLOCK, WHAT, ASSISTANT]
    assert prompt.labels == [_] * len(prompt.ids)
    assert prompt.num_supervised == 0


def test_generation_prompt_of_a_question_begins_as_its_training_prompt_does(builder):
    history = [user("<image>what"), assistant("red"), user("and")]
    asked = builder.build(history, add_generation_prompt=True)
    trained = builder.build([*history, assistant("blue")])
    assert trained.ids == [*asked.ids, BLUE, END]
    assert asked.labels[-6:] == [_, RED, END, _, _, _]  # earlier answers keep their labels


def test_stop_id_is_the_end_of_an_answer(builder):
    assert builder.stop_ids == (END,)


def test_template_may_have_several_control_tokens_in_a_place(words):
    template = Template(
        name="other",
        begin=(),
        user=("<|begin|>", "<|user|>"),
        assistant=("<|assistant|>", "<|user|>"),
        end=("<|end|>", "<|pad|>"),
    )
    builder = PromptBuilder(words, template, VisualTokens(vocab_size=15, count=3))
    prompt = builder.build([user("what"), assistant("red")])
    assert prompt.ids == [BEGIN, USER, WHAT, ASSISTANT, USER, RED, END, PAD]
    assert prompt.labels == [_, _, _, _, _, RED, END, PAD]
    assert builder.stop_ids == (END,)


def test_template_that_the_tokenizer_lacks_a_token_for_is_refused(words):
    template = Template(name="other", begin=("<s>",), user=(), assistant=(), end=("<|end|>",))
    with pytest.raises(ValueError, match="no control token '<s>'"):
        PromptBuilder(words, template, VisualTokens(vocab_size=15, count=3))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([assistant("red")], "message 1 has role 'assistant' where 'user' is due"),
        ([user("what"), user("and")], "message 2 has role 'user' where 'assistant' is due"),
        ([user("what"), assistant("red"), assistant("blue")], "message 3 has role 'assistant' where 'user' is due"),
        ([{"role": "system", "content": "be kind"}], "message 1 has role 'system' where 'user' is due"),
        ([{"content": "what"}], "message 1 has role None where 'user' is due"),
        ([user("what"), assistant([text("red"), IMAGE_PART])], "message 2 is an answer and holds an image"),
        ([user(None)], "message content is None; it is text or a list"),
        ([user([{"type": "video"}])], "message part {'type': 'video'} is neither"),
        ([user([{"type": "text", "text": 7}])], "message part {'type': 'text', 'text': 7} is neither"),
        ([user(["what"])], "message part 'what' is neither"),
    ],
)
def test_message_that_cannot_be_is_refused(builder, messages, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        builder.build(messages)


def test_message_that_is_no_mapping_is_refused(builder):
    with pytest.raises(ValueError, match="message 1 is 'what'; it has a role and content"):
        builder.build(["what"])


@pytest.mark.parametrize("messages", [[], [user("what"), assistant("red")]])
def test_nothing_to_answer_is_refused(builder, messages):
    with pytest.raises(ValueError, match="nothing to answer"):
        builder.build(messages, add_generation_prompt=True)


def test_prompts_of_the_embedded_model_are_those_it_was_trained_on():
    tokenizer = Tokenizer.from_pretrained(str(files("visplice.lm") / "weights"))
    assert tokenizer.vocab_size == 450
    builder = PromptBuilder(tokenizer, TURNS, VisualTokens(vocab_size=450, count=2))
    asked = [text("And how many squares are there?"), text("Count <|end|>!")]
    messages = [user("<image>\nWhat color is the circle?"), assistant("red"), user(asked), assistant("two squares")]
    prompt = builder.build([*messages, user("where is it? \n")], add_generation_prompt=True)
    first = [1, 3, 450, 452, 452, 451, 370, 381, 270, 264, 332, 35, 4]
    second = [3, 225, 37, 277, 225, 76, 310, 377, 403, 300, 278, 35]
    second += [225, 39, 438, 82, 88, 225, 32, 96, 73, 277, 96, 34, 5, 4]
    third = [3, 225, 91, 391, 270, 268, 88, 35, 225, 4]
    red, squares = [353, 2], [261, 91, 83, 403, 2]
    assert prompt.ids == [*first, *red, *second, *squares, *third]
    assert prompt.labels == [*[_] * len(first), *red, *[_] * len(second), *squares, *[_] * len(third)]


def test_a_token_across_the_edge_of_an_answer_is_not_supervised(words):
    class Doubles:
        """Two characters a token."""

        controls = words.controls
        control = words.control

        def encode_with_starts(self, text):
            starts = list(range(0, len(text), 2))
            return [100 + start for start in starts], starts

    template = Template(
        name="other", user=(Text("ab"),), assistant=(Text("c"),), answer="d", end=("<|end|>",), joined=True
    )
    prompt = PromptBuilder(Doubles(), template, VisualTokens(vocab_size=15, count=3)).build(
        [user("x"), assistant("yz")]
    )
    # "abxcdyz": ab xc dy z
    assert prompt.ids == [100, 102, 104, 106, END]
    assert prompt.labels == [_, _, 104, 106, END]
    prompt = PromptBuilder(Doubles(), template, VisualTokens(vocab_size=15, count=3)).build([user(""), assistant("yz")])
    # "abcdyz": ab cd yz
    assert prompt.labels == [_, _, 104, END]
