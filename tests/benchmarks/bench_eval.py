"""CPU seconds of `visplice eval` beside one-at-a-time generation through transformers on the exported model.

    python tests/benchmarks/bench_eval.py --pictures 1000 --rounds 3

Four questions a picture, greedy, at most 16 tokens, one thread. Both sides are whole processes, start included, and
alternate. Prints the medians, the median of the ratios round by round, and how many answers are the same.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from visplice.train.scene_data import ANNOTATIONS_FILE, QUESTIONS_FILE, image_name, write_test

MAX_NEW_TOKENS = 16


def peer(folder, data, out, dtype):
    """Answers with LlavaForConditionalGeneration, one question after the other."""
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    processor = AutoProcessor.from_pretrained(folder)
    answers = []
    for question in json.loads((data / QUESTIONS_FILE).read_text())["questions"]:
        talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question["question"]}]}]
        text = processor.apply_chat_template(talk, add_generation_prompt=True)
        image = Image.open(data / "images" / image_name(question["image_id"])).convert("RGB")
        inputs = processor(images=image, text=text, add_special_tokens=False, return_tensors="pt").to(model.dtype)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append({"question_id": question["question_id"], "answer": answer.strip()})
    out.write_text(json.dumps(answers))


def cpu_seconds(command):
    """User and system time of a process and its children, on one thread."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--peer", nargs=3, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        peer(*args.peer, args.dtype)
        return
    with tempfile.TemporaryDirectory() as folder:
        data, exported = Path(folder) / "data", Path(folder) / "hf"
        write_test(data, count=args.pictures, seed=5)
        visplice = [sys.executable, "-m", "visplice.app.cli"]
        cpu_seconds([*visplice, "export", "embedded", "--out", str(exported), "--no-check"])
        ours, theirs = [], []
        for round_ in range(args.rounds):
            out, answers = Path(folder) / f"ours-{round_}", Path(folder) / f"theirs-{round_}.json"
            command = [*visplice, "eval", "vqav2", "--model", "embedded", "--out", str(out)]
            command += ["--questions", str(data / QUESTIONS_FILE), "--images", str(data / "images")]
            command += ["--annotations", str(data / ANNOTATIONS_FILE), "--batch-size", str(args.batch_size)]
            command += ["--max-new-tokens", str(MAX_NEW_TOKENS), "--device", "cpu", "--dtype", args.dtype]
            ours.append(cpu_seconds(command))
            paths = [str(path) for path in (exported, data, answers)]
            theirs.append(cpu_seconds([sys.executable, __file__, "--dtype", args.dtype, "--peer", *paths]))
            found, expected = (json.loads(file.read_text()) for file in (out / "submission.json", answers))
            same = sum(one == other for one, other in zip(found, expected, strict=True))
            print(
                f"round {round_ + 1}: visplice {ours[-1]:.1f} s, transformers {theirs[-1]:.1f} s of CPU, "
                f"{same} of {len(expected)} answers the same",
                flush=True,
            )
        ratio = median(their / our for our, their in zip(ours, theirs, strict=True))
        medians = f"visplice {median(ours):.1f} s, transformers {median(theirs):.1f} s"
        print(f"{len(expected)} questions: {medians}, {ratio:.1f} x")


if __name__ == "__main__":
    main()
