"""What holds for a tokenizer of any kind, with the library that made it as the reference."""

import copy
import json
import pickle
import random

import pytest

from visplice.lm.tokenizer import StreamDecoder, Tokenizer


def test_ids_are_those_of_the_library(case, any_tokenizer, texts):
    for text in texts:
        assert any_tokenizer.encode(text) == case.encode(text), text


def test_text_never_becomes_a_control_token(any_tokenizer, texts):
    controls = set(any_tokenizer.controls.values())
    for text in [*any_tokenizer.controls, *texts]:
        assert controls.isdisjoint(any_tokenizer.encode(f"{text}{text} {text}")), text


def test_text_comes_back_whole_and_streams_alike(case, any_tokenizer, texts, streamed):
    for text in texts:
        if text.startswith(" ") and not case.keeps_first_blank:
            continue
        ids = any_tokenizer.encode(text)
        assert any_tokenizer.decode(ids) == text
        assert "".join(streamed(any_tokenizer, ids)) == text


def test_starts_are_where_the_bytes_of_tokens_begin(case, any_tokenizer, texts, starts_by_bytes):
    for text in texts:
        ids, starts = any_tokenizer.encode_with_starts(text)
        assert ids == case.encode(text)
        assert starts == starts_by_bytes(any_tokenizer, text, ids), text


def test_any_ids_decode_and_stream_alike(any_tokenizer, streamed):
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(any_tokenizer.vocab_size) for _ in range(rng.randrange(12))]
        assert "".join(streamed(any_tokenizer, ids)) == any_tokenizer.decode(ids)


def test_ids_cut_inside_a_character_decode_with_a_replacement(any_tokenizer, streamed):
    ids = any_tokenizer.encode("red \U000f1234")
    for end in range(len(ids)):
        text = any_tokenizer.decode(ids[:end])
        assert "red ".startswith(text.rstrip("\ufffd"))
        assert "".join(streamed(any_tokenizer, ids[:end])) == text
    assert any_tokenizer.decode(ids[:-1]).endswith("\ufffd")
    assert any_tokenizer.decode(ids) == "red \U000f1234"


def test_ids_outside_the_vocabulary_are_refused(any_tokenizer):
    size = any_tokenizer.vocab_size
    any_tokenizer.decode([size - 1])
    for token in (size, -1, size + 3):
        with pytest.raises(
            ValueError, match=rf"id {token} is not in the tokenizer's vocabulary; ids are 0 to {size - 1}"
        ):
            any_tokenizer.decode([0, token])
        with pytest.raises(ValueError, match=f"id {token} is not in"):
            StreamDecoder(any_tokenizer).push(token)


def test_lone_surrogate_counts_as_the_replacement_character(any_tokenizer):
    assert any_tokenizer.encode_with_starts("a\ud800b") == any_tokenizer.encode_with_starts("a\ufffdb")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))])
def test_copies_and_workers_encode_alike(any_tokenizer, copied):
    again = copied(any_tokenizer)
    text = "red " + " ".join(any_tokenizer.controls)
    assert again.encode_with_starts(text) == any_tokenizer.encode_with_starts(text)
    assert again.decode(again.encode(text)) == text
    assert again.controls == any_tokenizer.controls


@pytest.mark.parametrize("character", ["a", " ", "\n", "1", "漢"])
def test_runs_of_any_length_are_encoded(any_tokenizer, character, starts_by_bytes):
    text = "x" + character * 60_000
    ids, starts = any_tokenizer.encode_with_starts(text)
    assert any_tokenizer.decode(ids) == text
    assert starts == starts_by_bytes(any_tokenizer, text, ids)


@pytest.mark.parametrize("family", ["llama2", "llama3", "llama4"])
def test_reference_ids_of_the_llamas(family, shared):
    reference = json.loads((shared / "reference.json").read_text())
    tokenizer = Tokenizer.from_pretrained(shared / family)
    special = reference["special"][family]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (special["n"], special["bos"], special["eos"])
    if "eot" in special:
        assert special["eot"] == tokenizer.control("<|eot_id|>" if family == "llama3" else "<|eot|>")
    assert len(reference["cases"]) > 10
    for case in reference["cases"]:
        assert tokenizer.encode(case["text"]) == case[family]
        assert tokenizer.decode(case[family]) == case.get(f"{family}_decoded", case["text"])


def test_json_converted_from_a_model_gives_the_ids_and_starts_of_the_model(cases, texts):
    for model, converted in (("sentencepiece", "sentencepiece json"), ("tiktoken llama3", "tiktoken json")):
        one, other = Tokenizer(cases[model].file), Tokenizer(cases[converted].file)
        assert one.controls == other.controls
        assert (one.vocab_size, one.bos_id, one.eos_id) == (other.vocab_size, other.bos_id, other.eos_id)
        for text in texts:
            assert one.encode_with_starts(text) == other.encode_with_starts(text)
