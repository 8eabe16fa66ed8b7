"""Exports a model and puts the same test questions to it here and in transformers.

    python tests/benchmarks/export_parity.py --questions 500

Prints one table row: the largest difference of logits over all positions of all prompts and the first V ids, both in
float32 and from the pixels that each side makes itself, in units of the logits' spread where that is above 1; how many
answers are the same word for word; and the accuracy of both sides. Ends with status 1 if an answer differs or a logit
by more than 1e-4.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from visplice.lm.export import TOLERANCE, export_llava
from visplice.lm.extension import load_extension
from visplice.train import vqa_metric
from visplice.train.embedded_answers import SHORT, VqaSet, answer_with_images, encode_images
from visplice.train.scene_data import write_test

QUESTIONS_A_SCENE = 4


class Theirs:
    """An exported folder in transformers."""

    def __init__(self, folder):
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def inputs(self, questions, paths):
        """What the processor makes of questions with a picture each; prompts are padded on the left."""
        talks = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            for question in questions
        ]
        text = self.processor.apply_chat_template(talks, add_generation_prompt=True)
        images = [Image.open(path).convert("RGB") for path in paths]
        return self.processor(images=images, text=text, padding=True, add_special_tokens=False, return_tensors="pt")

    def answers(self, inputs):
        ids = self.model.generate(**inputs, max_new_tokens=SHORT.max_new_tokens, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(new, skip_special_tokens=True)


@torch.inference_mode()
def compare(model, folder, vqa, batch):
    """The largest difference of logits, and the answers of both sides by question id."""
    theirs, largest, answers = Theirs(folder), 0.0, {}
    size = model.lm.config.vocab_size
    by_length = defaultdict(list)  # of one length, prompts need no padding
    for question in vqa.questions:
        built = model.prompts.build([{"role": "user", "content": "<image>" + question["question"]}])
        by_length[len(built.ids)].append(question)
    with tqdm(total=len(vqa.questions), desc="asking transformers", unit="question", mininterval=1.0) as bar:
        for questions in by_length.values():
            for part in (questions[start : start + batch] for start in range(0, len(questions), batch)):
                paths = [vqa.image_path(question["image_id"]) for question in part]
                inputs = theirs.inputs([question["question"] for question in part], paths)
                found = theirs.model(**inputs).logits[..., :size]
                expected = model(inputs["input_ids"], model.pixels(paths))
                difference = (found - expected).abs().max() / expected.std().clamp(min=1)
                largest = max(largest, difference.item())
                texts = theirs.answers(inputs)
                answers |= {question["question_id"]: text for question, text in zip(part, texts, strict=True)}
                bar.update(len(part))
    features = encode_images(model, [vqa.image_path(image_id) for image_id in vqa.image_ids])
    return largest, answer_with_images(model, vqa, features), answers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="extension folder (default: the shipped small model)")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--seed", type=int, default=77, help="of the test scenes")
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        out, test = Path(place) / "out", Path(place) / "test"
        made = export_llava(args.model, out)
        write_test(test, count=-(-args.questions // QUESTIONS_A_SCENE), seed=args.seed, questions=QUESTIONS_A_SCENE)
        whole = VqaSet.read(test)
        vqa = VqaSet(test, whole.questions[: args.questions], whole.annotations[: args.questions], whole.notes)
        largest, ours, theirs = compare(load_extension(args.model), out, vqa, args.batch)
    same = sum(ours[question] == theirs[question] for question in ours)
    accuracy = [vqa_metric.evaluate(vqa.annotations, answers).accuracy for answers in (ours, theirs)]
    versions = made.parity["versions"]
    print(
        "| model | questions | largest difference of logits | same answers | accuracy here, there | transformers | s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print(
        f"| {args.model} | {len(ours)} | {largest:.2g} | {same} | {accuracy[0]:.1%}, {accuracy[1]:.1%} | "
        f"{versions['transformers']} | {time.perf_counter() - started:.0f} |"
    )
    return 0 if same == len(ours) == len(theirs) and largest <= TOLERANCE and made.parity["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
