import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from visplice.lm.tokenizer import Tokenizer

WORDS = "what is the color of the small red circle and where is the large blue square near the yellow triangle"


def test_truncation_and_padding_of_the_file_change_nothing(tokenizer_file, tokenizer, changed_json):
    file = changed_json(
        tokenizer_file,
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
        | {"pad_type_id": 0, "pad_token": "<|pad|>"},
    )
    assert Tokenizer(file).encode_with_starts(WORDS) == tokenizer.encode_with_starts(WORDS)
    assert len(tokenizer.encode(WORDS)) > 4


def test_added_tokens_that_are_not_special_are_text(tokenizer_file, changed_json, streamed):
    added = json.loads(tokenizer_file.read_text())["added_tokens"]
    token = added[0] | {"id": 320, "content": "<café>", "special": False}
    tokenizer = Tokenizer(changed_json(tokenizer_file, added_tokens=[*added, token]))
    assert tokenizer.vocab_size == 321
    assert "<café>" not in tokenizer.controls
    ids, starts = tokenizer.encode_with_starts("red<café>")
    assert (ids[-1], starts[-1]) == (320, 3)
    assert tokenizer.decode(ids) == "red<café>" == "".join(streamed(tokenizer, ids))


def test_unknown_token_of_a_file_without_bytes_is_no_control_token_spelled(cases, changed_json):
    raw = json.loads(cases["sentencepiece json"].file.read_text())
    model = raw["model"] | {
        "byte_fallback": False,
        "merges": [],
        "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4},
    }
    tokenizer = Tokenizer(changed_json(cases["sentencepiece json"].file, model=model))
    assert tokenizer.encode("aé") == [3, 4, 0]
    assert tokenizer.encode("</s>") == [3, 0]


def test_decoder_of_another_family_is_refused(tokenizer_file, changed_json):
    with pytest.raises(ValueError, match=r"tokenizer\.json: decoder WordPiece is not a LLaMA's"):
        Tokenizer(changed_json(tokenizer_file, decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}))


def test_file_without_a_decoder_has_its_tokens_parted_by_blanks_as_the_library_does(tmp_path, streamed):
    words = WORDS.split()
    backend = Backend(models.WordLevel({word: n for n, word in enumerate(dict.fromkeys([*words, "?"]))}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode(WORDS)
    assert tokenizer.decode(ids) == backend.decode(ids) == WORDS == "".join(streamed(tokenizer, ids))


def test_metaspace_files_keep_blanks_inside(cases, changed_json, streamed, starts_by_bytes):
    """As transformers 5 writes LLaMA 2's: blanks are put before words by a pre-tokenizer, not a normalizer."""
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    for decoder in (space, json.loads(cases["sentencepiece json"].file.read_text())["decoder"]):
        file = cases["sentencepiece json"].file
        tokenizer = Tokenizer(changed_json(file, normalizer=None, pre_tokenizer=space, decoder=decoder))
        ids, starts = tokenizer.encode_with_starts("the  red circle ")
        assert ids == Tokenizer(file).encode("the  red circle ")
        assert starts == starts_by_bytes(tokenizer, "the  red circle ", ids)
        assert tokenizer.decode(ids) == "the  red circle " == "".join(streamed(tokenizer, ids))


@pytest.mark.parametrize(
    ("config", "bos", "eos"),
    [
        (None, 1, 2),  # <|begin|>, <|end|>
        ({}, 1, 2),
        ({"bos_token": "<|user|>", "eos_token": {"content": "<|assistant|>", "lstrip": False}}, 3, 4),
        ({"bos_token": None, "eos_token": ""}, None, 2),
    ],
)
def test_begin_and_end_are_what_the_configuration_says(tokenizer_file, config, bos, eos, changed_json, beside):
    file = changed_json(tokenizer_file)
    if config is not None:
        beside(tokenizer_config=config)
    tokenizer = Tokenizer(file)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, eos)


@pytest.mark.parametrize("token", ["<s>", 7, ["<s>"]])
def test_begin_that_the_tokenizer_lacks_is_refused(tokenizer_file, token, changed_json, beside):
    beside(tokenizer_config={"bos_token": token})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: bos_token is .*that tokenizer\.json does not have"):
        Tokenizer(changed_json(tokenizer_file))
