"""Tokenizer files of every kind, each with its own library beside it: small ones made here, and LLaMA's own."""

import base64
import io
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from visplice.lm import tokenizer_tiktoken
from visplice.lm.tokenizer import StreamDecoder, Tokenizer

FRAGMENTS = [
    *["what", " is", "The", "color", " colour", "A", "ABCdef", "x", "I'm", "'s", "'LL", "we'll"],
    *[" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u3000", "\u2028", "\u200b", "\ufeff", "\x00", "\x1b"],
    *["0", "7", "12", "1234567", "3.14", "1,000", "²", "½", "Ⅷ", "٣", "==", "!!!", "...", "$%", "—"],
    *["é", "e\u0301", "naïve", "Straße", "Ωμέγα", "Привет", "İ", "ﬁ", "ǅ", "क्षि"],
    *["漢字", "かな", "한국어", "العربية", "עברית"],
    *["🙂", "👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "🏳️‍🌈", "\u200d", "\ufe0f", "\ufffd", "\ue000", "\U0010ffff"],
    *["<s>", "</s>", "<unk>", "<pad>", "[INST]", "<<SYS>>", "<image>", "<|begin_of_text|>", "<|eot_id|>", "<|eot|>"],
    *["<|image|>", "<|patch|>", "<0x41>", "<0xE2>", " <PRE>", "<|pad|>", "<|user|>"],
    *["def f(x):\n    return x ** 2\n", '{"a": [1, 2]}', "https://example.org/a?b=c&d=e#f"],
]
WORDS = "what is the color of the small red circle and where is the large blue square near the yellow triangle"
SHARED = Path(os.environ.get("VISPLICE_TOKENIZERS", Path(__file__).parents[4] / "shared" / "tokenizers"))
KINDS = [
    *["byte-level json", "sentencepiece", "sentencepiece json", "tiktoken llama3", "tiktoken llama4", "tiktoken json"],
    *["LLaMA 2", "LLaMA 3", "LLaMA 4"],
]


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


@pytest.fixture(scope="session")
def sentencepiece_model():
    return train_sentencepiece(WORDS, 340)


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


@pytest.fixture(scope="session")
def shared():
    """The folder of LLaMA's own tokenizers."""
    if not (SHARED / "reference.json").is_file():
        pytest.skip(f"no LLaMA tokenizers in {SHARED}; set VISPLICE_TOKENIZERS")
    return SHARED


@pytest.fixture(params=KINDS, scope="session")
def case(request, cases):
    if request.param not in cases:
        request.getfixturevalue("shared")
    return cases[request.param]


@pytest.fixture(scope="session")
def any_tokenizer(case):
    return Tokenizer.from_pretrained(case.file)


@pytest.fixture(scope="session")
def texts():
    """Hand-written texts, and four hundred of fragments and characters thrown together."""
    written = ["", " ", "\n", "  leading and trailing  ", WORDS, "".join(FRAGMENTS)]
    return written + list(generated_texts(400))


@pytest.fixture(scope="session", name="starts_by_bytes")
def starts_by_bytes_fixture():
    return starts_by_bytes


@pytest.fixture(scope="session", name="streamed")
def streamed_fixture():
    return streamed


@pytest.fixture(scope="session", name="train_sentencepiece")
def train_sentencepiece_fixture():
    return train_sentencepiece


@pytest.fixture(scope="session", name="llama_json")
def llama_json_fixture():
    return llama_json


@pytest.fixture
def beside(tmp_path):
    """Writes JSON files into the test's folder: `beside(added_tokens={"<pad>": 340})`."""

    def write(**files):
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))

    return write


@pytest.fixture
def changed_json(tmp_path):
    """Copies a tokenizer.json to the test's folder with some of its sections replaced."""

    def change(file, **changes):
        (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(file.read_text()) | changes))
        return tmp_path / "tokenizer.json"

    return change
