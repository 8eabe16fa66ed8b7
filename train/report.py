"""Figures and tables of a run: what a person looks at to believe it."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

_SEEING, _BLIND = "#2563eb", "#9ca3af"


def read_curve(file: Path, column: str) -> tuple[list[int], list[float]]:
    """Steps and values of one column of a Lightning `metrics.csv`."""
    steps, values = [], []
    with open(file, newline="") as stream:
        for row in csv.DictReader(stream):
            if row.get(column):
                steps.append(int(row["step"]))
                values.append(float(row[column]))
    return steps, values


def plot_losses(curves: Mapping[str, Path], file: Path) -> None:
    """Training loss of each stage; `curves` maps a title to its `metrics.csv`."""
    figure, axes = plt.subplots(1, len(curves), figsize=(5 * len(curves), 3.4), squeeze=False)
    for axis, (title, source) in zip(axes[0], curves.items(), strict=True):
        steps, values = read_curve(source, "train/loss")
        axis.plot(steps, values, color=_SEEING, linewidth=1.4)
        axis.set(title=title, xlabel="step", ylabel="loss")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    _save(figure, file)


def plot_by_type(seeing: Mapping[str, float], blind: Mapping[str, float], file: Path) -> None:
    """Accuracy by question type beside the best blind control of the type."""
    names = sorted(seeing)
    figure, axis = plt.subplots(figsize=(7.5, 3.6))
    for offset, values, color, label in (
        (-0.2, seeing, _SEEING, "sees the picture"),
        (0.2, blind, _BLIND, "blind control"),
    ):
        bars = axis.bar([i + offset for i in range(len(names))], [100 * values[n] for n in names], 0.38, color=color)
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
        bars.set_label(label)
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel="VQAv2 accuracy, %", ylim=(0, 118), yticks=range(0, 101, 20))
    axis.legend(loc="upper center", ncols=2, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, file)


def plot_examples(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """A grid of pictures; each row has `image` (path), `question`, `answer` and `truth`."""
    columns = 4
    figure, axes = plt.subplots(
        -(-len(rows) // columns), columns, figsize=(2.6 * columns, 3.2 * -(-len(rows) // columns))
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, row in zip(axes.flat, rows, strict=False):
        axis.imshow(Image.open(row["image"]))
        right = row["answer"] == row["truth"]
        verdict = row["answer"] if right else f"{row['answer']} (truth: {row['truth']})"
        axis.set_title(f"{row['question']}\n{verdict}", fontsize=8, color="#15803d" if right else "#b91c1c")
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
