import inspect
from itertools import pairwise

import pytest

from visplice.lm import tokenizer_tiktoken
from visplice.lm.tokenizer import Tokenizer

LONG = [
    "the" * 8333 + "t",
    "the" * 8333 + "th",
    "a " * 5_000 + "the" * 8333 + "th",
    "\n" * 60_001 + "b" * 60_000,
    "a " * 13_000 + " " * 30_000,
    "漢" * 30_000,
]
LONG += ["red " * 100_100 + " " * 25_002 + "🙂" * 25_003, "\u3000" * 26_000 + "\x1c" * 26_000 + "\u200b" * 26_000]


def cut_as_meta_does(text):
    """llama-models cuts texts at 400,000 characters, and in those every 25,000 of a run without or of white space."""
    for start in range(0, len(text), 400_000):
        piece = length = 0
        chunk = text[start : start + 400_000]
        for index, (before, character) in enumerate(pairwise(" " + chunk)):
            length = length + 1 if index and before.isspace() == character.isspace() else 1
            if length == 25_001:
                yield chunk[piece:index]
                piece, length = index, 1
        yield chunk[piece:]


@pytest.fixture(scope="session")
def llama3_file(cases):
    return cases["tiktoken llama3"].file


@pytest.mark.parametrize("kind", ["tiktoken llama3", "tiktoken llama4"])
def test_very_long_texts_are_cut_where_meta_cuts_them(cases, kind, starts_by_bytes):
    tokenizer = Tokenizer(cases[kind].file)
    for text in LONG:
        ids, starts = tokenizer.encode_with_starts(text)
        assert ids == [token for piece in cut_as_meta_does(text) for token in cases[kind].encode(piece)]
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
        assert starts == starts_by_bytes(tokenizer, text, ids)


def test_ids_of_llama_3_control_tokens(cases):
    tokenizer = Tokenizer.from_pretrained(cases["tiktoken llama3"].file)
    assert tokenizer.vocab_size == 128_256
    assert len(tokenizer.controls) == 256
    assert (tokenizer.bos_id, tokenizer.eos_id) == (128_000, 128_001)
    named = {"<|finetune_right_pad_id|>": 4, "<|start_header_id|>": 6, "<|end_header_id|>": 7, "<|eom_id|>": 8}
    named |= {"<|eot_id|>": 9, "<|python_tag|>": 10, "<|image|>": 11, "<|reserved_special_token_245|>": 255}
    assert {name: tokenizer.control(name) - 128_000 for name in named} == named


def test_ids_of_llama_4_control_tokens(cases):
    tokenizer = Tokenizer.from_pretrained(cases["tiktoken llama4"].file)
    assert tokenizer.vocab_size == 202_048
    assert len(tokenizer.controls) == 2048
    assert (tokenizer.bos_id, tokenizer.eos_id) == (200_000, 200_001)
    named = {"<|header_start|>": 5, "<|header_end|>": 6, "<|eom|>": 7, "<|eot|>": 8, "<|python_start|>": 16}
    named |= {"<|finetune_right_pad|>": 18, "<|text_post_train_reserved_special_token_68|>": 79}
    named |= {"<|image_start|>": 80, "<|image_end|>": 81, "<|image|>": 90, "<|patch|>": 92}
    named |= {"<|vision_reserved_special_token_1047|>": 1133, "<|reasoning_thinking_end|>": 1143}
    named |= {"<|reserved_special_token_0|>": 1144, "<|reserved_special_token_903|>": 2047}
    assert {name: tokenizer.control(name) - 200_000 for name in named} == named


def test_split_patterns_are_the_published_ones(monkeypatch):
    """Meta took LLaMA 4's over from o200k; transformers converts LLaMA 3 with its own copy."""
    from tiktoken_ext import openai_public
    from transformers.convert_slow_tokenizer import TikTokenConverter

    published = inspect.signature(TikTokenConverter).parameters["pattern"].default
    assert tokenizer_tiktoken._LLAMA3.pattern == published
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: {})  # it would download the ranks
    assert tokenizer_tiktoken._LLAMA4.pattern == openai_public.o200k_base()["pat_str"]


def test_ranks_must_be_whole_and_hold_every_byte(llama3_file, tmp_path):
    lines = llama3_file.read_bytes().splitlines(keepends=True)
    file = tmp_path / "tokenizer.model"
    for changed in (
        lines[:-1],
        [*lines[:-1], lines[0]],
        [*lines[:-1], b"/v3//f8= 128000\n"],
        [b"//8= 0\n", *lines[1:]],
    ):
        file.write_bytes(b"".join(changed))
        with pytest.raises(
            ValueError, match=r"tokenizer\.model: found \d+ different tokens; expected 128000 \(LLaMA 3\)"
        ):
            Tokenizer(file)
    file.write_bytes(b"".join(reversed(lines)))
    assert Tokenizer(file).encode("the red circle") == Tokenizer(llama3_file).encode("the red circle")


def test_unknown_control_token_of_llama_3_is_refused_without_the_reserved_ones(llama3_file):
    with pytest.raises(ValueError, match=r"'<s>'; it has <\|begin_of_text\|>, .*<\|step_id\|> and 246 reserved ones$"):
        Tokenizer(llama3_file).control("<s>")
