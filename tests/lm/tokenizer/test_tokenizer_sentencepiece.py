import io
import random

import pytest
import sentencepiece

from visplice.lm.tokenizer import Tokenizer

CODE = "<PRE> what is the color <SUF> of the circle <MID> small red <EOT>"


@pytest.fixture(scope="session")
def code_llama_model(train_sentencepiece):
    """A model that has learnt " <PRE>" as one ordinary piece, as Code Llama's has."""
    model = train_sentencepiece(CODE, 400, split_by_unicode_script=False)
    assert "▁<PRE>" in sentencepiece.SentencePieceProcessor(model_proto=model).encode("a <PRE>", return_type=str)
    return model


def test_sentencepiece_decodes_any_pieces_as_its_library_does(sentencepiece_model, cases):
    tokenizer = Tokenizer(cases["sentencepiece"].file)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    blank = pieces.piece_to_id("▁")
    rng = random.Random(0)
    for _ in range(500):  # byte pieces aside, whose broken characters the library replaces one by one
        ids = [rng.choice([1, 2, blank, rng.randrange(259, tokenizer.vocab_size)]) for _ in range(rng.randrange(8))]
        assert tokenizer.decode(ids) == pieces.decode(ids)


def test_sentencepiece_keeps_all_blanks_but_its_own(cases, streamed):
    tokenizer = Tokenizer(cases["sentencepiece"].file)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (340, 1, 2)
    assert tokenizer.controls == {"<unk>": 0, "<s>": 1, "</s>": 2}
    ids = tokenizer.encode("the red")
    assert tokenizer.decode([1, *ids, 2]) == "the red"
    assert tokenizer.decode([*ids, *ids]) == "the red the red"  # the second one's blank stands inside the text
    assert streamed(tokenizer, [1, *ids, 2, *ids]) == ["", "the", " red", "", " the", " red", ""]
    assert tokenizer.encode_with_starts("\n")[1] == [0, 0]  # the blank before the text, and the byte


def test_sentencepiece_without_byte_pieces_is_refused(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CODE] * 20), model_writer=model, vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match=r"tokenizer\.model: this SentencePiece model has no byte pieces"):
        Tokenizer.from_pretrained(tmp_path)


def test_tokens_added_beside_a_sentencepiece_model_are_control_tokens(sentencepiece_model, tmp_path, beside):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    plain = Tokenizer(tmp_path / "tokenizer.model")
    beside(added_tokens={"<pad>": 340})
    decoder = {"0": {"content": "<unk>", "special": True}, "1": {"content": "<s>", "special": True}}
    decoder |= {"340": {"content": "<pad>", "special": True}, "343": {"content": "<tool>", "special": False}}
    the = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model).piece_to_id("▁the")
    decoder |= {str(the): {"content": "▁the", "special": False}}  # stays the word it is
    beside(tokenizer_config={"added_tokens_decoder": decoder})
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        tokenizer = Tokenizer.from_pretrained(path)
        assert tokenizer.controls == {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 340, "<tool>": 343}
        assert tokenizer.vocab_size == 344
        assert tokenizer.encode("a <pad> the<tool>") == plain.encode("a <pad> the<tool>")
        assert tokenizer.decode([340, *plain.encode("red"), 341, 343]) == "red"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<pad>": 2}}, r"id 2 is '</s>', but the files beside it add '<pad>' there"),
        ({"added_tokens": {"<pad>": "340"}}, r"added_tokens\.json: token '<pad>' has the id '340'"),
        ({"added_tokens": ["<pad>"]}, r"added_tokens\.json: expected a JSON object, found list"),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, r"tokenizer_config\.json: added_tokens_decoder is \[\]"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"340": "<pad>"}}},
            r"added_tokens_decoder holds '340': '<pad>'",
        ),
    ],
)
def test_files_that_contradict_the_sentencepiece_model_are_refused(
    sentencepiece_model, tmp_path, files, message, beside
):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    beside(**files)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path)
    for name in files:
        (tmp_path / f"{name}.json").write_text("{")
        with pytest.raises(ValueError, match=rf"{name}\.json: not JSON"):
            Tokenizer.from_pretrained(tmp_path)


def test_text_cannot_spell_the_infilling_tokens_of_code_llama(code_llama_model, tmp_path, llama_json):
    """They are ordinary pieces of its file, in both formats."""
    (tmp_path / "tokenizer.model").write_bytes(code_llama_model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=code_llama_model)
    infilling = [name for name in ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>") if pieces.piece_to_id(name)]
    assert "▁<PRE>" in infilling
    backend = llama_json(code_llama_model, special=("<unk>", "<s>", "</s>", *infilling))
    backend.save(str(tmp_path / "code.json"))
    for tokenizer in (Tokenizer(tmp_path / "tokenizer.model"), Tokenizer(tmp_path / "code.json")):
        assert tokenizer.vocab_size == pieces.get_piece_size()
        assert tokenizer.control("▁<PRE>") == pieces.piece_to_id("▁<PRE>")
        assert tokenizer.encode("the color") == pieces.encode("the color")
        ids = tokenizer.encode(CODE)
        assert set(tokenizer.controls.values()).isdisjoint(ids)
        assert tokenizer.decode([tokenizer.control("▁<PRE>"), *ids]) == CODE
    one, other = Tokenizer(tmp_path / "tokenizer.model"), Tokenizer(tmp_path / "code.json")
    assert one.controls == other.controls
    assert one.encode_with_starts(CODE) == other.encode_with_starts(CODE)
