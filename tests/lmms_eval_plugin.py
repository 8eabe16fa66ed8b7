"""Runs lmms-eval on visplice as a user would, on tasks made here, and compares every answer with our own code.

    python tests/lmms_eval_plugin.py
    python tests/lmms_eval_plugin.py --model runs/instruct --questions 200 --ranks 2

The tasks are local: questions about one scene, about two, about none, the same drawn instead of greedy, and choices.
Each runs through the chat and the simple interface, in batches of 1 and 8, and with --ranks in several processes on the
CPU. Exit status 1 where an answer, a loss or a score differs from what `VisionLlama.generate` and `forward` give one at
a time, or a foolish command does not end in one line. Needs lmms-eval, see docs/lmms-eval.md; no network.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from visplice.lm import VisionLlama
from visplice.lm.prompt import IGNORE
from visplice.train.scene_data import ANNOTATIONS_FILE, QUESTIONS_FILE, image_name, write_test

NUM_NEW = 12
ANSWERS = ("scenes_one", "scenes_two", "scenes_none", "scenes_drawn")  # tasks of generate_until
CHOICES = "scenes_choice"
# What lmms-eval reads beside the YAML files.
FUNCTIONS = """
from PIL import Image

def visual(doc):
    return [Image.open(path).convert("RGB") for path in doc["pictures"]]

def text(doc):
    return doc["text"]

def target(doc):
    return doc["answer"]

def choices(doc):
    return doc["choices"]

def right(doc):
    return doc["choices"].index(doc["answer"])

def match(doc, results):
    return {"match": float(results[0] == doc["answer"])}
"""
TASK = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_visual: !function functions.visual
doc_to_text: !function functions.text
"""
GENERATE = """
output_type: generate_until
doc_to_target: !function functions.target
process_results: !function functions.match
generation_kwargs:
  max_new_tokens: {num_new}
  temperature: {temperature}
  do_sample: {do_sample}
  until: ["."]
metric_list:
  - metric: match
    aggregation: mean
    higher_is_better: true
"""
# `python -m lmms_eval` where torchvision has no operators for this build of torch: lmms-eval alone dies of that.
START = """
import runpy
from visplice.vision._torchvision import declare_missing_operators

declare_missing_operators()
runpy.run_module("lmms_eval", run_name="__main__", alter_sys=True)
"""
CHOOSE = """
output_type: multiple_choice
doc_to_target: !function functions.right
doc_to_choice: !function functions.choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_tasks(folder: Path, count: int) -> dict[str, list[dict[str, Any]]]:
    """Writes data and YAML files; returns the documents of every task."""
    write_test(folder / "scenes", count=-(-count // 4), seed=11)
    asked = json.loads((folder / "scenes" / QUESTIONS_FILE).read_text())["questions"][:count]
    right = json.loads((folder / "scenes" / ANNOTATIONS_FILE).read_text())["annotations"][:count]
    words = json.loads((folder / "scenes" / "scenes.json").read_text())["scenes"]
    known = sorted({note["multiple_choice_answer"] for note in right})
    docs: dict[str, list[dict[str, Any]]] = {task: [] for task in (*ANSWERS, CHOICES)}
    for number, (item, note) in enumerate(zip(asked, right, strict=True)):
        own = str(folder / "scenes" / "images" / image_name(item["image_id"]))
        other = str(folder / "scenes" / "images" / image_name(asked[number - 1]["image_id"]))
        answer, question = note["multiple_choice_answer"], item["question"]
        wrong = [other for other in known if other != answer]
        choices = [*wrong[number % len(wrong) :], *wrong][:3]
        choices.insert(number % 4, answer)
        doc = {"pictures": [own], "text": question, "answer": answer, "choices": choices}
        docs["scenes_one"].append(doc)
        docs["scenes_drawn"].append(doc)
        docs[CHOICES].append(doc)
        # The second scene stands behind the mark, so the two keep their places, and some marks are left out.
        text = f"<image>\n{question}\n<image>" if number % 2 else question
        docs["scenes_two"].append(doc | {"pictures": [own, other], "text": text})
        said = words[str(item["image_id"])]["description"]
        docs["scenes_none"].append(doc | {"pictures": [], "text": f"{said} {question}"})
    (folder / "functions.py").write_text(FUNCTIONS)
    for task, listed in docs.items():
        data = folder / f"{task}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in listed))
        drawn = task == "scenes_drawn"
        kind = CHOOSE if task == CHOICES else GENERATE
        yaml = TASK + kind.format(num_new=NUM_NEW, temperature=0.8 if drawn else 0, do_sample=str(drawn).lower())
        (folder / f"{task}.yaml").write_text(yaml.replace("{task}", task).replace("{data}", str(data)))
    return docs


def expected_answer(model: VisionLlama, doc: dict[str, Any], *, drawn: bool) -> str:
    """What `generate` says to one question alone, up to the stop and without blanks around it."""
    pictures = [Image.open(path) for path in doc["pictures"]]
    sampling = {"temperature": 0.8, "seed": 0} if drawn else {}
    return model.generate([pictures], [doc["text"]], max_new_tokens=NUM_NEW, **sampling)[0].split(".")[0].strip()


@torch.inference_mode()
def expected_losses(model: VisionLlama, doc: dict[str, Any]) -> list[float]:
    """The training loss of each choice, alone, through `forward`."""
    losses = []
    for choice in doc["choices"]:
        content = [{"type": "image"}, {"type": "text", "text": doc["text"]}]
        prompt = model.prompts.build([{"role": "user", "content": content}, {"role": "assistant", "content": choice}])
        logits = model(torch.tensor([prompt.ids]), model.pixels(doc["pictures"]))[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(prompt.labels[1:]), ignore_index=IGNORE)
        losses.append(float(loss))
    return losses


def write_start(folder: Path) -> None:
    """Writes what stands for `-m lmms_eval` where torchvision cannot be imported as it is."""
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
        (folder / "start.py").write_text(START)


def run(folder: Path, name: str, words: list[str], *, launcher: list[str] | None = None) -> subprocess.CompletedProcess:
    """`python -m lmms_eval --model visplice` on the tasks of the folder."""
    start = [str(folder / "start.py")] if (folder / "start.py").exists() else ["-m", "lmms_eval"]
    command = [*(launcher or [sys.executable]), *start, "--model", "visplice", *words]
    command += ["--include_path", str(folder), "--output_path", str(folder / name), "--log_samples"]
    given = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(command, env=os.environ | given, capture_output=True, text=True, timeout=1200)


def samples(folder: Path, name: str, task: str) -> list[dict[str, Any]]:
    """What lmms-eval logged of a task, by document."""
    [file] = (folder / name).rglob(f"*_samples_{task}.jsonl")
    return sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: int(sample["doc_id"]))


def scores(folder: Path, name: str) -> dict[str, Any]:
    [file] = (folder / name).rglob("*_results.json")
    return json.loads(file.read_text())["results"]


def compare(folder: Path, name: str, expected: dict[str, list[Any]], docs: dict[str, list[dict[str, Any]]]) -> int:
    """Prints what lmms-eval has beside what we have; returns how many answers, losses and scores differ."""
    faults, told = 0, scores(folder, name)
    for task in sorted(set(told) & set(docs)):
        logged = samples(folder, name, task)
        answers = [doc["answer"] for doc in docs[task]]
        if task == CHOICES:
            theirs = [[float(loss) for loss, _ in sample["filtered_resps"]] for sample in logged]
            worst = max(
                abs(a - b) for x, y in zip(theirs, expected[task], strict=True) for a, b in zip(x, y, strict=True)
            )
            differ = int(worst > 1e-3)
            chosen = [
                doc["choices"][losses.index(min(losses))]
                for doc, losses in zip(docs[task], expected[task], strict=True)
            ]
            score, note = told[task]["acc,none"], f"largest difference of a loss {worst:.1e}"
        else:
            theirs = [sample["filtered_resps"].strip() for sample in logged]
            differ = sum(a != b for a, b in zip(theirs, expected[task], strict=True))
            chosen, score, note = expected[task], told[task]["match,none"], f"{differ} of {len(theirs)} answers differ"
        ours = sum(a == b for a, b in zip(chosen, answers, strict=True)) / len(answers)
        faults += differ + (abs(ours - score) > 1e-9)
        print(f"{name:16} {task:14} lmms-eval {score:.4f}, visplice {ours:.4f}; {note}")
    return faults


def refused(folder: Path, pretrained: str) -> int:
    """Foolish commands: each has to end in one line and status 2."""
    faults = 0
    for arguments, batch in (("pretrained=no/such/folder", "1"), (f"{pretrained},lora=3", "1"), (pretrained, "0")):
        words = ["--model_args", arguments, "--tasks", "scenes_one", "--batch_size", batch]
        result = run(folder, "foolish", words)
        lines = [line for line in result.stderr.splitlines() if line.startswith("visplice: ")]
        whole = result.returncode == 2 and len(lines) == 1 and "Traceback" not in result.stderr
        faults += not whole
        print(f"{'refused' if whole else 'NOT REFUSED'}: {lines[0] if lines else result.stderr[-2000:]}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="a folder, or 'embedded' (default)")
    parser.add_argument("--questions", type=int, default=40, help="of every task (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="also in that many processes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_start(folder)
        docs = write_tasks(folder, options.questions)
        model = VisionLlama.from_pretrained(options.model)
        expected: dict[str, list[Any]] = {CHOICES: [expected_losses(model, doc) for doc in tqdm(docs[CHOICES])]}
        for task in ANSWERS:
            drawn = task == "scenes_drawn"
            expected[task] = [expected_answer(model, doc, drawn=drawn) for doc in tqdm(docs[task], desc=task)]

        pretrained = f"pretrained={options.model},device=cpu"
        every = ",".join(docs)
        runs: list[tuple[str, str, list[str], list[str] | None]] = [
            ("chat 8", ",".join(ANSWERS), ["--batch_size", "8"], None),
            ("simple 8", every, ["--batch_size", "8", "--force_simple"], None),
            ("simple 1", every, ["--batch_size", "1", "--force_simple"], None),
        ]
        if options.ranks > 1:
            launch = [
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                "--cpu",
                "--num_processes",
                str(options.ranks),
            ]
            runs.append((f"{options.ranks} ranks", every, ["--batch_size", "4", "--force_simple"], launch))
        faults = 0
        for title, tasks, words, launcher in runs:
            result = run(folder, title, ["--model_args", pretrained, "--tasks", tasks, *words], launcher=launcher)
            if result.returncode or not list((folder / title).rglob("*_results.json")):
                print(f"{title}: status {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
                faults += 1
            else:
                faults += compare(folder, title, expected, docs)
        faults += refused(folder, pretrained)
    print("all as expected" if not faults else f"{faults} differences")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
