"""The tokenizer that the embedded model has; tests/lm/tokenizer holds what is true of the others too."""

import pytest

from visplice.lm.tokenizer import StreamDecoder, Tokenizer

TEXTS = [
    "what is the color of the small red circle?",
    "UPPER and lower, digits 0123456789; punctuation: ()[]{}!?'\"\\/",
    "tabs\tand\nline breaks\r\n  and   runs of spaces  ",
    "naïve café, Straße, Ωμέγα, Привет",
    "漢字かな交じり文 한국어 العربية עברית",
    "🙂 👩‍👩‍👧‍👦 🇩🇪 👍🏽 é (e + combining accent)",
    "\u0000\u00ad\u200b\ufeff\U0010ffff",
    "",
]
CONTROLS = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]


@pytest.mark.parametrize("text", TEXTS)
def test_decode_gives_back_what_was_encoded(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_word_has_the_same_ids_at_the_start_and_inside(tokenizer):
    assert tokenizer.encode("the red circle")[-len(tokenizer.encode("circle")) :] == tokenizer.encode("circle")


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("text", ["{}", "a{}b", "please say {} now", "{}{}"])
def test_text_that_spells_a_control_token_is_plain_text(tokenizer, control, text):
    text = text.replace("{}", control)
    ids = tokenizer.encode(text)
    assert not {tokenizer.control(name) for name in CONTROLS} & set(ids)
    assert tokenizer.decode(ids) == text


def test_control_tokens_are_found_by_name_and_left_out_of_text(tokenizer):
    assert [tokenizer.control(name) for name in CONTROLS] == [0, 1, 2, 3, 4]  # in the order the tokenizer was made with
    assert tokenizer.decode([1, *tokenizer.encode("red"), 2, 4]) == "red"


def test_unknown_control_token_is_refused_with_those_there_are(tokenizer):
    expected = (
        r"has no control token '<\|system\|>'; "
        r"it has <\|assistant\|>, <\|begin\|>, <\|end\|>, <\|pad\|>, <\|user\|>$"
    )
    with pytest.raises(ValueError, match=expected):
        tokenizer.control("<|system|>")
    with pytest.raises(ValueError, match="has no control token 'the'"):
        tokenizer.control("the")  # an ordinary word is not a control token


def test_vocab_size_counts_control_tokens(tokenizer):
    assert tokenizer.vocab_size == 320


def test_encoding_adds_no_begin_or_end(tokenizer_file, tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    backend = Backend.from_file(str(tokenizer_file))
    backend.post_processor = TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 1), ("<|end|>", 2)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path / "tokenizer.json").encode("red") == Tokenizer(tokenizer_file).encode("red")


def test_conversation_is_encoded_by_the_prompt_module(tokenizer, monkeypatch):
    seen = {}

    def encode_chat(*args, **kwargs):
        seen.update(args=args, kwargs=kwargs)
        return [1, 2]

    monkeypatch.setattr("visplice.lm.prompt.encode_chat", encode_chat, raising=False)
    messages = [{"role": "user", "content": "red"}]
    assert tokenizer.encode_chat(messages, template="llama3", tools=[{"name": "look"}]) == [1, 2]
    assert seen["args"] == (tokenizer, messages)
    assert seen["kwargs"] == {"template": "llama3", "add_generation_prompt": True, "tools": [{"name": "look"}]}


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_are_whole_characters_and_add_up(tokenizer, text):
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)] + [stream.flush()]
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert pieces[-1] == ""


def test_character_of_four_tokens_comes_with_the_last(tokenizer):
    ids = tokenizer.encode("a🙂b")
    assert len(ids) == 1 + 1 + 4 + 1  # space, a, four bytes, b
    stream = StreamDecoder(tokenizer)
    assert [stream.push(token) for token in ids] == ["", "a", "", "", "", "🙂", "b"]


def test_piece_is_handed_out_as_soon_as_it_is_whole(tokenizer):
    ids = tokenizer.encode("the red circle")
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(token) for token in ids]
    for number, _ in enumerate(ids, 1):
        assert "".join(pieces[:number]) == tokenizer.decode(ids[:number])


def test_flush_hands_out_a_character_that_was_never_finished(tokenizer):
    ids = tokenizer.encode("red 🙂")[:-2]
    stream = StreamDecoder(tokenizer)
    streamed = "".join(stream.push(token) for token in ids)
    assert streamed == "red "
    assert streamed + stream.flush() == tokenizer.decode(ids)
    assert stream.flush() == ""


def test_stream_goes_on_behind_broken_bytes(tokenizer):
    broken = tokenizer.encode("🙂")[:-1]
    ids = [*broken, *tokenizer.encode(" red"), *broken, *broken, *tokenizer.encode("🙂")]
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(token) for token in ids] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids)


def test_streaming_looks_at_every_token_once(tokenizer, monkeypatch):
    looked_at = []
    token_bytes = tokenizer.token_bytes
    monkeypatch.setattr(tokenizer, "token_bytes", lambda token: looked_at.append(token) or token_bytes(token))
    monkeypatch.setattr(tokenizer, "decode", None)
    ids, stream = tokenizer.encode("the small red circle"), StreamDecoder(tokenizer)
    assert "".join([*map(stream.push, ids), stream.flush()]) == "the small red circle"
    assert looked_at == ids
