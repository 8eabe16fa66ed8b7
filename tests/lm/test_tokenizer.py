"""Tokenizers against the libraries that made them: small models made here, and LLaMA's own where they are at hand."""

import base64
import copy
import inspect
import io
import json
import os
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from visplice.lm import tokenizer_tiktoken
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
FRAGMENTS = [
    *["what", " is", "The", "color", " colour", "A", "ABCdef", "x", "I'm", "'s", "'LL", "we'll"],
    *[" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u3000", "\u2028", "\u200b", "\ufeff", "\x00", "\x1b"],
    *["0", "7", "12", "1234567", "3.14", "1,000", "²", "½", "Ⅷ", "٣", "==", "!!!", "...", "$%", "—"],
    *[
        "é",
        "e\u0301",
        "naïve",
        "Straße",
        "Ωμέγα",
        "Привет",
        "İ",
        "ﬁ",
        "ǅ",
        "क्षि",
        "漢字",
        "かな",
        "한국어",
        "العربية",
        "עברית",
    ],
    *["🙂", "👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "🏳️‍🌈", "\u200d", "\ufe0f", "\ufffd", "\ue000", "\U0010ffff"],
    *["<s>", "</s>", "<unk>", "<pad>", "[INST]", "<<SYS>>", "<image>", "<|begin_of_text|>", "<|eot_id|>", "<|eot|>"],
    *["<|image|>", "<|patch|>", "<0x41>", "<0xE2>", " <PRE>", *CONTROLS],
    *["def f(x):\n    return x ** 2\n", '{"a": [1, 2]}', "https://example.org/a?b=c&d=e#f"],
]
WORDS = "what is the color of the small red circle and where is the large blue square near the yellow triangle"
CODE = "<PRE> what is the color <SUF> of the circle <MID> small red <EOT>"

SHARED = Path(os.environ.get("VISPLICE_TOKENIZERS", Path(__file__).parents[3] / "shared" / "tokenizers"))
needs_shared = pytest.mark.skipif(
    not (SHARED / "reference.json").is_file(), reason=f"no LLaMA tokenizers in {SHARED}; set VISPLICE_TOKENIZERS"
)


def generated_texts(count, seed=0):
    rng = random.Random(seed)
    ranges = [(0x20, 0x7F), (0xA0, 0x2000), (0x2000, 0xD800), (0xE000, 0x110000)]
    for _ in range(count):
        parts = [
            rng.choice(FRAGMENTS) if rng.random() < 0.9 else chr(rng.randrange(*rng.choice(ranges)))
            for _ in range(rng.randrange(1, 20))
        ]
        yield "".join(parts).replace("▁", "")  # which SentencePiece takes for a blank


@dataclass(frozen=True, kw_only=True)
class Case:
    """A tokenizer file, and how its own library encodes."""

    file: Path
    encode: Callable[[str], list[int]]
    keeps_first_blank: bool = True  # the embedded file puts no blank before a blank, so that one is lost


def train_sentencepiece(text, vocab_size, **changes):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
        **changes,
    )
    return model.getvalue()


def tiktoken_lines(num_ranks, words=WORDS):
    """The bytes, every beginning of the words (so that merges reach the whole), and ranks that no text reaches."""
    ranks = [bytes([byte]) for byte in range(256)]
    for word in words.split():
        for text in (word, f" {word}"):
            ranks += [text[:end].encode() for end in range(2, len(text) + 1)]
    ranks = list(dict.fromkeys(ranks))
    ranks += [b"\xff\xfe" + number.to_bytes(4, "big") for number in range(num_ranks - len(ranks))]
    return b"".join(b"%b %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(ranks))


def llama_json(model, *, special=("<unk>", "<s>", "</s>")):
    """A SentencePiece model as the tokenizer.json that LLaMA 2 is published with."""
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    names = [pieces.id_to_piece(index) for index in range(pieces.get_piece_size())]
    scores = [(name, pieces.get_score(index)) for index, name in enumerate(names)]
    vocab = {name: index for index, name in enumerate(names)}
    merges = generate_merges(vocab, scores, skip_tokens=names[:3])
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in special])
    return backend


@pytest.fixture(scope="session")
def sentencepiece_model():
    return train_sentencepiece(WORDS, 340)


@pytest.fixture(scope="session")
def code_llama_model():
    """A model that has learnt " <PRE>" as one ordinary piece, as Code Llama's has."""
    model = train_sentencepiece(CODE, 400, split_by_unicode_script=False)
    assert "▁<PRE>" in sentencepiece.SentencePieceProcessor(model_proto=model).encode("a <PRE>", return_type=str)
    return model


@pytest.fixture(scope="session")
def cases(sentencepiece_model, tokenizer_file, tmp_path_factory):
    """One small file of every kind, and LLaMA's own where they are at hand."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    folder = tmp_path_factory.mktemp("tokenizers")
    cases = {}

    def add_json(name, file, **changes):
        backend = tokenizers.Tokenizer.from_file(str(file))
        backend.encode_special_tokens = True
        cases[name] = Case(file=file, encode=lambda text: backend.encode(text, add_special_tokens=False).ids, **changes)

    def add_sentencepiece(name, file):
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        cases[name] = Case(file=file, encode=pieces.encode)

    def add_tiktoken(name, file, family):
        ranks = {}
        for line in file.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
        encoding = tiktoken.Encoding(name, pat_str=family.pattern, mergeable_ranks=ranks, special_tokens={})
        cases[name] = Case(file=file, encode=encoding.encode_ordinary)

    llama3, llama4 = tokenizer_tiktoken._LLAMA3, tokenizer_tiktoken._LLAMA4
    add_json("byte-level json", tokenizer_file, keeps_first_blank=False)
    (folder / "llama2").write_bytes(sentencepiece_model)
    add_sentencepiece("sentencepiece", folder / "llama2")
    llama_json(sentencepiece_model).save(str(folder / "llama2.json"))
    add_json("sentencepiece json", folder / "llama2.json")
    for name, family in (("llama3", llama3), ("llama4", llama4)):
        (folder / name).write_bytes(tiktoken_lines(family.num_ranks))
        add_tiktoken(f"tiktoken {name}", folder / name, family)
    converter = TikTokenConverter(
        str(folder / "llama3"), pattern=llama3.pattern, extra_special_tokens=list(llama3.controls)
    )
    backend = converter.converted()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)  # as published
    backend.save(str(folder / "llama3.json"))
    add_json("tiktoken json", folder / "llama3.json")
    if (SHARED / "reference.json").is_file():
        add_sentencepiece("LLaMA 2", SHARED / "llama2" / "tokenizer.model")
        add_tiktoken("LLaMA 3", SHARED / "llama3" / "tokenizer.model", llama3)
        add_tiktoken("LLaMA 4", SHARED / "llama4" / "tokenizer.model", llama4)
    return cases


KINDS = [
    "byte-level json",
    "sentencepiece",
    "sentencepiece json",
    "tiktoken llama3",
    "tiktoken llama4",
    "tiktoken json",
    *(pytest.param(name, marks=needs_shared) for name in ("LLaMA 2", "LLaMA 3", "LLaMA 4")),
]


@pytest.fixture(params=KINDS, scope="session")
def case(request, cases):
    return cases[request.param]


@pytest.fixture(scope="session")
def any_tokenizer(case):
    return Tokenizer.from_pretrained(case.file)


@pytest.fixture(scope="session")
def llama3_file(cases):
    return cases["tiktoken llama3"].file


def starts_by_bytes(tokenizer, text, ids):
    """The character at which every token's bytes begin, counted over what all tokens together spell."""
    characters = [index for index, character in enumerate(text) for _ in character.encode()]
    pieces = [tokenizer.token_bytes(token) for token in ids]
    position, starts = len(characters) - len(b"".join(pieces)), []  # below 0 inside what was put before the text
    for piece in pieces:
        starts.append(characters[max(position, 0)])
        position += len(piece)
    return starts


def streamed(tokenizer, ids):
    stream = StreamDecoder(tokenizer)
    return [stream.push(token) for token in ids] + [stream.flush()]


def test_ids_are_those_of_the_library(case, any_tokenizer):
    for text in [*TEXTS, *generated_texts(400)]:
        assert any_tokenizer.encode(text) == case.encode(text), text


def test_text_never_becomes_a_control_token(any_tokenizer):
    controls = set(any_tokenizer.controls.values())
    for text in [*any_tokenizer.controls, *generated_texts(400)]:
        assert controls.isdisjoint(any_tokenizer.encode(f"{text}{text} {text}")), text


def test_text_comes_back_whole_and_streams_alike(case, any_tokenizer):
    for text in [*TEXTS, "  leading and trailing  ", " ", "\n", *generated_texts(400)]:
        if text.startswith(" ") and not case.keeps_first_blank:
            continue
        ids = any_tokenizer.encode(text)
        assert any_tokenizer.decode(ids) == text
        assert "".join(streamed(any_tokenizer, ids)) == text


def test_starts_are_where_the_bytes_of_tokens_begin(case, any_tokenizer):
    for text in [*TEXTS, "  leading and trailing  ", " ", "\n", *generated_texts(400)]:
        ids, starts = any_tokenizer.encode_with_starts(text)
        assert ids == case.encode(text)
        assert starts == starts_by_bytes(any_tokenizer, text, ids), text


def test_any_ids_decode_and_stream_alike(any_tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(any_tokenizer.vocab_size) for _ in range(rng.randrange(12))]
        assert "".join(streamed(any_tokenizer, ids)) == any_tokenizer.decode(ids)


def test_sentencepiece_decodes_any_pieces_as_its_library_does(sentencepiece_model, cases):
    tokenizer = Tokenizer(cases["sentencepiece"].file)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    blank = pieces.piece_to_id("▁")
    rng = random.Random(0)
    for _ in range(500):  # byte pieces aside, whose broken characters the library replaces one by one
        ids = [rng.choice([1, 2, blank, rng.randrange(259, tokenizer.vocab_size)]) for _ in range(rng.randrange(8))]
        assert tokenizer.decode(ids) == pieces.decode(ids)


def test_ids_cut_inside_a_character_decode_with_a_replacement(any_tokenizer):
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


@needs_shared
@pytest.mark.parametrize("family", ["llama2", "llama3", "llama4"])
def test_reference_ids_of_the_llamas(family):
    reference = json.loads((SHARED / "reference.json").read_text())
    tokenizer = Tokenizer.from_pretrained(SHARED / family)
    special = reference["special"][family]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (special["n"], special["bos"], special["eos"])
    if "eot" in special:
        assert special["eot"] == tokenizer.control("<|eot_id|>" if family == "llama3" else "<|eot|>")
    assert len(reference["cases"]) > 10
    for case in reference["cases"]:
        assert tokenizer.encode(case["text"]) == case[family]
        assert tokenizer.decode(case[family]) == case.get(f"{family}_decoded", case["text"])


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


def test_json_converted_from_a_model_gives_the_ids_and_starts_of_the_model(cases):
    for model, converted in (("sentencepiece", "sentencepiece json"), ("tiktoken llama3", "tiktoken json")):
        one, other = Tokenizer(cases[model].file), Tokenizer(cases[converted].file)
        assert one.controls == other.controls
        assert (one.vocab_size, one.bos_id, one.eos_id) == (other.vocab_size, other.bos_id, other.eos_id)
        for text in [*TEXTS, *generated_texts(200, seed=1)]:
            assert one.encode_with_starts(text) == other.encode_with_starts(text)


def test_sentencepiece_keeps_all_blanks_but_its_own(cases):
    tokenizer = Tokenizer(cases["sentencepiece"].file)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (340, 1, 2)
    assert tokenizer.controls == {"<unk>": 0, "<s>": 1, "</s>": 2}
    ids = tokenizer.encode("the red")
    assert tokenizer.decode([1, *ids, 2]) == "the red"
    assert tokenizer.decode([*ids, *ids]) == "the red the red"  # the second one's blank stands inside the text
    assert streamed(tokenizer, [1, *ids, 2, *ids]) == ["", "the", " red", "", " the", " red", ""]
    assert tokenizer.encode_with_starts("\n")[1] == [0, 0]  # the blank before the text, and the byte


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


@pytest.mark.parametrize("kind", ["tiktoken llama3", "tiktoken llama4"])
def test_very_long_texts_are_cut_where_meta_cuts_them(cases, kind):
    tokenizer = Tokenizer(cases[kind].file)
    for text in LONG:
        ids, starts = tokenizer.encode_with_starts(text)
        assert ids == [token for piece in cut_as_meta_does(text) for token in cases[kind].encode(piece)]
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
        assert starts == starts_by_bytes(tokenizer, text, ids)


@pytest.mark.parametrize("text", ["a" * 60_000, "x" + " " * 60_000, "\n" * 60_000, "1" * 60_000], ids=repr)
def test_runs_of_any_length_are_encoded(any_tokenizer, text):
    ids, starts = any_tokenizer.encode_with_starts(text)
    assert any_tokenizer.decode(ids) == text
    assert starts == starts_by_bytes(any_tokenizer, text, ids)


def beside(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_kind_is_told_by_content_whatever_the_name(case, tmp_path):
    file = tmp_path / ("tokenizer.json" if case.file.suffix != ".json" else "tokenizer.model")
    file.write_bytes(case.file.read_bytes())
    assert Tokenizer.from_pretrained(tmp_path).encode("the red circle") == case.encode("the red circle")


def test_folder_gives_its_json_first_then_its_model_then_the_original(cases, tmp_path):
    (tmp_path / "original").mkdir()
    for name, kind in [
        ("original/tokenizer.model", "tiktoken llama3"),
        ("tokenizer.model", "sentencepiece"),
        ("tokenizer.json", "byte-level json"),
    ]:
        (tmp_path / name).write_bytes(cases[kind].file.read_bytes())
        tokenizer = Tokenizer.from_pretrained(tmp_path)
        assert tokenizer.encode("the red circle") == cases[kind].encode("the red circle")
        assert tokenizer.vocab_size == Tokenizer(cases[kind].file).vocab_size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n", "git-LFS pointer.*git lfs pull"),
        (b"hello world\n", "not a tokenizer; expected"),
        (b"[1, 2]", "not a tokenizer; expected"),
        (bytes(range(256)), "not a tokenizer; expected"),
        (b"\n" + bytes(range(256)), "not a SentencePiece model"),
        (b'{"version": "1.0"}', "not a tokenizer.json"),
        (b'{"version": "1.0"', "not a tokenizer.json"),
        (b"IQ== 0\nIg== 1\n", "found 2 different tokens; expected 128000"),
        (b"IQ== 0\nIg== one\n", "not whole, or not lines of 'base64 rank'"),
        (b"IQ== 0\n!!!! 1\n", "not whole, or not lines of 'base64 rank'"),
        (b"IQ== 0\nIg==", "not whole, or not lines of 'base64 rank'"),
    ],
)
def test_files_of_another_kind_are_refused_by_name(tmp_path, content, message):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    for path in (file, tmp_path):
        with pytest.raises(ValueError, match=rf"^{file}: .*{message}"):
            Tokenizer.from_pretrained(path)


def test_missing_files_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=rf"^{tmp_path}: no tokenizer in this folder; looked for tokenizer\.json, "):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"llama/tokenizer\.json: no such tokenizer file"):
        Tokenizer.from_pretrained(tmp_path / "llama" / "tokenizer.json")


@pytest.mark.parametrize("part", [0.0001, 0.01, 0.5, 0.9, 0.999])
def test_files_that_are_cut_off_are_refused(case, tmp_path, part):
    content = case.file.read_bytes()
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match=f"^{file}: "):
        Tokenizer.from_pretrained(file)


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


def test_sentencepiece_without_byte_pieces_is_refused(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 20), model_writer=model, vocab_size=30, hard_vocab_limit=False, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match=r"tokenizer\.model: this SentencePiece model has no byte pieces"):
        Tokenizer.from_pretrained(tmp_path)


def test_tokens_added_beside_a_sentencepiece_model_are_control_tokens(sentencepiece_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    plain = Tokenizer(tmp_path / "tokenizer.model")
    beside(tmp_path, added_tokens={"<pad>": 340})
    decoder = {"0": {"content": "<unk>", "special": True}, "1": {"content": "<s>", "special": True}}
    decoder |= {"340": {"content": "<pad>", "special": True}, "343": {"content": "<tool>", "special": False}}
    the = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model).piece_to_id("▁the")
    decoder |= {str(the): {"content": "▁the", "special": False}}  # stays the word it is
    beside(tmp_path, tokenizer_config={"added_tokens_decoder": decoder})
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
def test_files_that_contradict_the_sentencepiece_model_are_refused(sentencepiece_model, tmp_path, files, message):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    beside(tmp_path, **files)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path)
    for name in files:
        (tmp_path / f"{name}.json").write_text("{")
        with pytest.raises(ValueError, match=rf"{name}\.json: not JSON"):
            Tokenizer.from_pretrained(tmp_path)


def test_text_cannot_spell_the_infilling_tokens_of_code_llama(code_llama_model, tmp_path):
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


def changed_json(file, folder, **changes):
    """The file with some of its sections replaced, as tokenizer.json in the folder."""
    raw = json.loads(file.read_text())
    (folder / "tokenizer.json").write_text(json.dumps(raw | changes))
    return folder / "tokenizer.json"


def test_truncation_and_padding_of_the_file_change_nothing(tokenizer_file, tokenizer, tmp_path):
    file = changed_json(
        tokenizer_file,
        tmp_path,
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
        | {"pad_type_id": 0, "pad_token": "<|pad|>"},
    )
    assert Tokenizer(file).encode_with_starts(WORDS) == tokenizer.encode_with_starts(WORDS)
    assert len(tokenizer.encode(WORDS)) > 4


def test_added_tokens_that_are_not_special_are_text(tokenizer_file, tmp_path):
    added = json.loads(tokenizer_file.read_text())["added_tokens"]
    token = added[0] | {"id": 320, "content": "<café>", "special": False}
    tokenizer = Tokenizer(changed_json(tokenizer_file, tmp_path, added_tokens=[*added, token]))
    assert tokenizer.vocab_size == 321
    assert "<café>" not in tokenizer.controls
    ids, starts = tokenizer.encode_with_starts("red<café>")
    assert (ids[-1], starts[-1]) == (320, 3)
    assert tokenizer.decode(ids) == "red<café>" == "".join(streamed(tokenizer, ids))


def test_unknown_token_of_a_file_without_bytes_is_no_control_token_spelled(cases, tmp_path):
    raw = json.loads(cases["sentencepiece json"].file.read_text())
    model = raw["model"] | {
        "byte_fallback": False,
        "merges": [],
        "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4},
    }
    tokenizer = Tokenizer(changed_json(cases["sentencepiece json"].file, tmp_path, model=model))
    assert tokenizer.encode("aé") == [3, 4, 0]
    assert tokenizer.encode("</s>") == [3, 0]


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}])
def test_decoder_of_another_family_is_refused(tokenizer_file, tmp_path, decoder):
    with pytest.raises(ValueError, match=r"tokenizer\.json: decoder (null|WordPiece) is not a LLaMA's"):
        Tokenizer(changed_json(tokenizer_file, tmp_path, decoder=decoder))


def test_metaspace_files_keep_blanks_inside(cases, tmp_path):
    """As transformers 5 writes LLaMA 2's: blanks are put before words by a pre-tokenizer, not a normalizer."""
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    for decoder in (space, json.loads(cases["sentencepiece json"].file.read_text())["decoder"]):
        file = cases["sentencepiece json"].file
        tokenizer = Tokenizer(changed_json(file, tmp_path, normalizer=None, pre_tokenizer=space, decoder=decoder))
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
def test_begin_and_end_are_what_the_configuration_says(tokenizer_file, tmp_path, config, bos, eos):
    file = changed_json(tokenizer_file, tmp_path)
    if config is not None:
        beside(tmp_path, tokenizer_config=config)
    tokenizer = Tokenizer(file)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, eos)


@pytest.mark.parametrize("token", ["<s>", 7, ["<s>"]])
def test_begin_that_the_tokenizer_lacks_is_refused(tokenizer_file, tmp_path, token):
    beside(tmp_path, tokenizer_config={"bos_token": token})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: bos_token is .*that tokenizer\.json does not have"):
        Tokenizer(changed_json(tokenizer_file, tmp_path))


def test_nothing_is_fetched_or_cached(cases, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a tokenizer reached for the network")

    monkeypatch.setattr("socket.socket", refuse)
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", "HF_HOME", "TMPDIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    for case in cases.values():
        Tokenizer.from_pretrained(case.file).encode("the red circle")
    assert list(tmp_path.iterdir()) == []


def test_unknown_control_token_of_llama_3_is_refused_without_the_reserved_ones(llama3_file):
    with pytest.raises(ValueError, match=r"'<s>'; it has <\|begin_of_text\|>, .*<\|step_id\|> and 246 reserved ones$"):
        Tokenizer(llama3_file).control("<s>")


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


def test_a_word_has_the_same_ids_at_the_start_and_inside(tokenizer):
    assert tokenizer.encode("the red circle")[-len(tokenizer.encode("circle")) :] == tokenizer.encode("circle")


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
    ids = tokenizer.encode(WORDS)
    assert "".join(streamed(tokenizer, ids)) == WORDS
    assert looked_at == ids
