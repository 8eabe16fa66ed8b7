"""`visplice choice` and `perplexity` beside lm-evaluation-harness, on a LLaMA of random weights.

    python tests/benchmarks/lm_eval_parity.py

in an environment of its own: `pip install torch lm_eval` and visplice. The harness runs a task made of a local file
through transformers; both are given the begin token. Compared are the log-likelihood of every choice, acc, acc_norm and
acc_bytes, and the log-likelihood of whole texts. Ends with status 1 where a difference is over 1e-5 of the larger or a
score is another.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from visplice.app.cli import main
from visplice.vision._torchvision import declare_missing_operators

WORDS = (
    "what is the color of small red circle and where large blue square near yellow triangle über naïve 東京 "
    "does it stand left right above below seven twenty-one it's don't , . ? ! ( )"
).split()
TASK = """task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: acc_bytes
"""
NUM_QUESTIONS, TOLERANCE = 120, 1e-5


def byte_level() -> Tokenizer:
    """As LLaMA 3's are: bytes, split into words first."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    return backend


def sentencepiece_like() -> Tokenizer:
    """As LLaMA 2's are: a blank belongs to the word behind it, and begins a text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    backend.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    raw = json.loads(backend.to_str())
    raw["added_tokens"] = raw["added_tokens"][:3]  # bytes are pieces, no control tokens
    return Tokenizer.from_str(json.dumps(raw))


def write_llama(folder: Path, backend: Tokenizer, begin: str, end: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=backend.get_vocab_size(),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=512,
        bos_token_id=backend.token_to_id(begin),
        eos_token_id=backend.token_to_id(end),
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))]
    )
    backend.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def question() -> dict[str, Any]:
    """Some end with blanks, which move to the choice."""
    text = " ".join(random.choices(WORDS, k=random.randint(1, 40))) + random.choice(["", "", "?", " ", "  ", "\n"])
    choices = [" ".join(random.choices(WORDS, k=random.randint(1, 6))) for _ in range(random.randint(2, 5))]
    return {"question": text, "choices": choices, "answer": random.randrange(len(choices))}


def ours(*words: str) -> dict[str, Any]:
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert main([*words, "--device", "cpu", "--json"]) == 0, words
    result: dict[str, Any] = json.loads(told.getvalue())
    return result


def compare(name: str, backend: Tokenizer, begin: str, end: str, folder: Path) -> bool:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder.mkdir()
    (folder / "task").mkdir()
    write_llama(folder / "llama", backend, begin, end)
    questions = [question() for _ in range(NUM_QUESTIONS)]
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in questions))
    (folder / "task/local.yaml").write_text(TASK.format(file=file))
    harness = HFLM(pretrained=str(folder / "llama"), device="cpu", dtype="float32", batch_size=1, add_bos_token=True)
    theirs = simple_evaluate(
        model=harness,
        tasks=["local"],
        task_manager=TaskManager(include_path=str(folder / "task"), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        verbosity="ERROR",
    )
    out = folder / "scores.jsonl"
    found = ours("choice", "--model", str(folder / "llama"), "--questions", str(file), "--out", str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    worst, num_choices = 0.0, 0
    for row, sample in zip(rows, sorted(theirs["samples"]["local"], key=lambda s: s["doc_id"]), strict=True):
        for mine, (expected, _) in zip(row["log_probabilities"], sample["filtered_resps"], strict=True):
            worst, num_choices = max(worst, abs(mine - expected) / abs(expected)), num_choices + 1
    ok = worst < TOLERANCE
    print(f"{name}: {num_choices} choices of {len(rows)} questions, log-likelihoods differ by {worst:.1e} at most")
    for score in ("acc", "acc_norm", "acc_bytes"):
        expected = theirs["results"]["local"][f"{score},none"]
        print(f"  {score}: harness {expected:.6f}, visplice {found[score]:.6f}")
        ok &= abs(expected - found[score]) < 1e-9

    texts = [" ".join(random.choices(WORDS, k=n)) for n in (3, 20, 60)]
    worst = 0.0
    for text in texts:
        (folder / "text.txt").write_text(text)
        request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
        # The begin token comes from the rolling window itself.
        harness.add_bos_token = False
        (expected,) = harness.loglikelihood_rolling([request], disable_tqdm=True)
        mine = ours("perplexity", "--model", str(folder / "llama"), "--text", str(folder / "text.txt"))
        worst = max(worst, abs(mine["log_probability"] - expected) / abs(expected))
    print(f"  whole texts: log-likelihoods differ by {worst:.1e} at most")
    return ok and worst < TOLERANCE


def run() -> int:
    declare_missing_operators()  # transformers imports torchvision
    random.seed(0)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        same = [
            compare("byte-level", byte_level(), "<|begin_of_text|>", "<|end_of_text|>", Path(folder, "a")),
            compare("SentencePiece's kind", sentencepiece_like(), "<s>", "</s>", Path(folder, "b")),
        ]
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(run())
