import pytest

from visplice.lm.tokenizer import Tokenizer


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


def test_nothing_is_fetched_or_cached(cases, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a tokenizer reached for the network")

    monkeypatch.setattr("socket.socket", refuse)
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", "HF_HOME", "TMPDIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    for case in cases.values():
        Tokenizer.from_pretrained(case.file).encode("the red circle")
    assert list(tmp_path.iterdir()) == []
