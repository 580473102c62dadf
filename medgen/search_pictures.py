"""The picture of find-lr: one panel, PNG. Used by lr_search.py."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from medgen import files
from medgen.lr_curve import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 7.2, 3.8  # inches
DOTS_PER_INCH = 110
INK, SOFT, LINE, POINT, CHOSEN = "#1d2126", "#5d666f", "#e2dfd8", "#2f6f9f", "#c8552b"


def beside(record: Path) -> Path:
    """The picture of a record."""
    return record.with_suffix(".png")


def draw_lr_curve(path: Path, curve: Curve) -> None:
    """The losses faint, the smoothed ones above them, and the suggestion."""
    figure, axes = _panel(f"Learning rate {curve.suggestion:.2e}", curve.in_words)
    axes.plot(curve.rates, curve.losses, color=POINT, alpha=0.3, linewidth=1, label="loss of a step")
    axes.plot(curve.rates, curve.smoothed, color=POINT, linewidth=2, label="smoothed")
    axes.axvline(curve.suggestion, color=CHOSEN, linewidth=1.6, label="suggestion")
    low, high = min(loss for loss in curve.losses if math.isfinite(loss)), max(curve.losses[: curve.lowest + 1])
    axes.set_ylim(low - 0.1 * (high - low), high + 0.2 * (high - low))  # what blows up is cut off
    axes.set_xscale("log")
    axes.set_xlabel("learning rate", fontsize=9, color=INK)
    axes.set_ylabel("training loss", fontsize=9, color=INK)
    _save(figure, axes, path)


def _panel(title: str, words: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained", facecolor="white")
    axes = figure.subplots()
    figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold", color=INK)
    axes.set_title(words, loc="left", fontsize=8.5, color=SOFT)
    return figure, axes


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, labelcolor=SOFT, length=0, which="both")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.legend(frameon=False, fontsize=8, labelcolor=SOFT)
    packed = io.BytesIO()
    figure.savefig(packed, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})  # no version in it: equal pictures are equal files
    files.write_bytes(path, packed.getvalue())
