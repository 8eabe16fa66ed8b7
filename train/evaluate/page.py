"""The report as one HTML file: score, types, controls, and the worst and best examples with their pictures in it."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from visplice.train.evaluate.journal import ID, write_text
from visplice.vision.image import ImageError, open_image

_EXAMPLES = 12  # of a kind
_SIDE = 320  # pixels of a picture in the page, at most

_STYLE = """
:root { color-scheme: light dark; --line: #d4d4d8; --soft: #71717a; --bar: #2563eb; --blind: #a1a1aa; --back: #fafafa; }
@media (prefers-color-scheme: dark) { :root { --line: #3f3f46; --soft: #a1a1aa; --bar: #60a5fa; --back: #27272a; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
.soft { color: var(--soft); } .big { font-size: 2.6rem; font-weight: 650; line-height: 1.2; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .25rem .9rem .25rem 0; vertical-align: top; }
th { font-weight: 500; color: var(--soft); } td.n { text-align: right; font-variant-numeric: tabular-nums; }
tr + tr td, tr + tr th { border-top: 1px solid var(--line); } code { overflow-wrap: anywhere; white-space: pre-wrap; }
.bar { display: inline-block; height: .7rem; background: var(--bar); border-radius: 2px; vertical-align: middle; }
.bar.blind { background: var(--blind); }
.verdict { border-left: 4px solid var(--bar); padding: .4rem .9rem; background: var(--back); margin: 1rem 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
figure img { width: 100%; height: 11rem; object-fit: contain; background: var(--back); display: block; }
figcaption { padding: .5rem .7rem; overflow-wrap: anywhere; } figcaption b { font-weight: 600; }
"""


def write_page(
    file: Path,
    told: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    scores: Mapping[Any, float] | None,
    references: Mapping[Any, Sequence[str]],
    images: Path,
) -> None:
    """Writes the page.

    Args:
        told: what `report.json` says.
        rows: the predictions.
        scores: of each question, None without annotations.
        references: the right answers of each question, where there are any.
    """
    run = told["run"]
    title = f"{run['task']}: {run['name']}"
    parts = [f"<h1>{escape(title)}</h1>", f"<p class=soft>{escape(_counts(told))}</p>"]
    if "score" in told:
        parts += [_score(told["score"]), _controls(told), *_types(told)]
    else:
        parts.append("<p>No annotations were given, so nothing is scored; the submission file is ready.</p>")
    parts += _examples(rows, scores, references, images)
    parts.append(_made(told))
    write_text(
        file,
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style>\n<body>{''.join(parts)}</body></html>\n",
    )


def _counts(told: Mapping[str, Any]) -> str:
    text = f"{told['num_questions']:,} answers about {told['num_pictures']:,} pictures"
    for name, words in (
        ("num_cut_off", "cut off at the token limit"),
        ("num_empty", "empty"),
        ("num_without_picture", "to pictures that could not be used"),
    ):
        if told[name]:
            text += f", {told[name]:,} {words}"
    return text


def _score(told: Mapping[str, Any]) -> str:
    low, high = told["interval"]
    further = "".join(
        f"<br>{escape(name.replace('_', ' '))}: {_number(told[name], told)}"
        for name in ("exact_match", "bleu_4", "rouge_l")
        if name in told
    )
    notes = "".join(f"<br>note: {escape(note)}" for note in told["notes"])
    return (
        f"<h2>{escape(told['measure'])}</h2><div class=big>{_number(told['score'], told)}</div>"
        f"<p class=soft>95 % interval {_number(low, told)} to {_number(high, told)}, bootstrap over "
        f"{told['num_questions']:,}<br>rule: {escape(told['rule'])}, {escape(told['rule_source'])}{further}{notes}</p>"
    )


def _number(value: float, told: Mapping[str, Any]) -> str:
    return f"{value:.3f}" if told["measure"] == "CIDEr-D" else f"{100 * value:.2f} %"


def _controls(told: Mapping[str, Any]) -> str:
    if not told["controls"]:
        return (
            "<p class=soft>No control was run. <code>--blind shuffled</code> asks the same questions about other "
            "pictures, and says what the pictures are worth.</p>"
        )
    lines = []
    scores = {"the right picture": told["score"]} | {f"{name} pictures": one for name, one in told["controls"].items()}
    for name, score in scores.items():
        low, high = score["interval"]
        blind = "" if name == "the right picture" else " blind"
        width = max(0.0, min(1.0, score["score"])) * 16
        lines.append(
            f"<tr><th>{escape(name)}</th><td class=n>{_number(score['score'], score)}</td>"
            f"<td class=n>{_number(low, score)} to {_number(high, score)}</td>"
            f"<td><span class='bar{blind}' style='width:{width:.2f}rem'></span></td></tr>"
        )
    verdict = escape(told["vision"]["verdict"])
    head = "<tr><th>shown</th><th>score</th><th>95 % interval</th><th></th></tr>"
    return f"<h2>Is the picture used?</h2><table>{head}{''.join(lines)}</table><p class=verdict>{verdict}</p>"


def _types(told: Mapping[str, Any]) -> list[str]:
    parts, score = [], told["score"]
    for group in ("answer_type", "question_type"):
        by_name = score.get(f"by_{group}")
        if not by_name:
            continue
        controls = list(told["controls"].items())
        head = "".join(f"<th>{escape(name)}</th>" for name, _ in controls)
        lines = []
        for name, value in sorted(by_name.items()):
            blind = "".join(f"<td class=n>{_number(other[f'by_{group}'][name], score)}</td>" for _, other in controls)
            lines.append(
                f"<tr><th>{escape(name)}</th><td class=n>{score[f'num_by_{group}'][name]:,}</td>"
                f"<td class=n>{_number(value, score)}</td>{blind}"
                f"<td><span class=bar style='width:{value * 16:.2f}rem'></span></td></tr>"
            )
        parts.append(
            f"<h2>By {group.replace('_', ' ')}</h2><table><tr><th></th><th>questions</th><th>score</th>{head}<th></th>"
            f"</tr>{''.join(lines)}</table>"
        )
    return parts


def _examples(
    rows: Sequence[Mapping[str, Any]],
    scores: Mapping[Any, float] | None,
    references: Mapping[Any, Sequence[str]],
    images: Path,
) -> list[str]:
    if scores is None:
        return _grid("Examples", rows[:: -(-len(rows) // _EXAMPLES)], scores, references, images)
    drawn = list(rows)  # among equals chance decides, the same each time
    Random(0).shuffle(drawn)
    ordered = sorted(drawn, key=lambda row: scores[row[ID]])
    count = min(_EXAMPLES, len(ordered) // 2)
    worst, best = ordered[:count], ordered[len(ordered) - count :][::-1]
    return [
        *_grid("The worst", worst, scores, references, images),
        *_grid("The best", best, scores, references, images),
    ]


def _grid(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    scores: Mapping[Any, float] | None,
    references: Mapping[Any, Sequence[str]],
    images: Path,
) -> list[str]:
    figures = []
    for row in rows:
        lines = [escape(row["question"]), f"<b>{escape(row['answer']) or '<i>nothing</i>'}</b>"]
        counted = Counter(references.get(row[ID], ())).most_common(4)
        if counted:
            told = ", ".join(
                f"{answer} &times; {times}" if times > 1 else answer
                for answer, times in ((escape(answer), times) for answer, times in counted)
            )
            lines.append(f"<span class=soft>right: {told}</span>")
        score = "" if scores is None else f", score {scores[row[ID]]:.3f}"
        lines.append(f"<span class=soft>{escape(str(row[ID]))}{score}</span>")
        picture = _picture(images / row["image"])
        figures.append(
            f"<figure>{picture}<figcaption>{'<br>'.join(line for line in lines if line)}</figcaption></figure>"
        )
    return [f"<h2>{title}</h2><div class=grid>{''.join(figures)}</div>"]


def _picture(file: Path) -> str:
    try:
        image = open_image(file)
    except ImageError as error:
        return f"<p class=soft>{escape(str(error))}</p>"
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img src='data:image/jpeg;base64,{data}' alt='{escape(file.name)}'>"


def _made(told: Mapping[str, Any]) -> str:
    run, made = told["run"], told["made"]
    rows: list[tuple[str, str]] = [
        ("prompt", run["prompt"]),
        ("template", run["template"]),
        ("decoding", f"greedy, at most {run['decoding']['max_new_tokens']} tokens"),
        ("encoder", f"{run['model']['encoder']['model']}, {run['model']['encoder']['image_size']} pixels"),
        *((f"fingerprint of the {name}", digest) for name, digest in run["model"]["fingerprints"].items()),
        ("numbers", f"{run['dtype']}, {made['device']}"),
        ("questions", f"{run['questions']['name']}, sha256 {run['questions']['sha256']}"),
    ]
    if "score" in told:
        files = told["score"]["files"]
        rows += [(name, f"{files[name]['path']}, sha256 {files[name]['sha256']}") for name in ("annotations",)]
    rows += [
        (
            "made",
            f"{made['date']}, {', '.join(f'{shown} in {seconds} s' for shown, seconds in made['seconds'].items())}",
        ),
        ("versions", ", ".join(f"{name} {number}" for name, number in made["versions"].items())),
    ]
    lines = "".join(f"<tr><th>{escape(name)}</th><td><code>{escape(text)}</code></td></tr>" for name, text in rows)
    return f"<h2>How it was made</h2><table>{lines}</table>"
