"""The pictures of find-lr and find-steps: one panel each, PNG. Used by lr_search.py and find_steps.py."""

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

    from medgen.step_measure import Measured

WIDTH, HEIGHT = 7.2, 3.8  # inches
DOTS_PER_INCH = 110
TICK_FACTOR = 1.12
SAMPLER_COLOURS = ("#2f6f9f", "#2c7a4b", "#7a5a9e", "#9a7b1f")
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


def draw_steps(path: Path, measured: list[Measured], best: Measured, chosen: Measured, words: str) -> None:
    """How much higher the KID is than the best one, with the interval of the paired difference, against evaluations of the network; a line per sampler."""
    figure, axes = _panel(f"{chosen.sampler}, {chosen.steps} steps", words)
    axes.axhline(0, color=INK, linewidth=1, zorder=1)
    for number, sampler in enumerate(dict.fromkeys(item.sampler for item in measured)):
        items = sorted((item for item in measured if item.sampler == sampler), key=lambda item: item.evaluations)
        colour, places = SAMPLER_COLOURS[number % len(SAMPLER_COLOURS)], [item.evaluations for item in items]
        above = [item.above(best) for item in items]
        axes.vlines(places, [ends[0] for _, ends in above], [ends[1] for _, ends in above], color=colour, linewidth=1.4, alpha=0.55)
        axes.plot(places, [value for value, _ in above], color=colour, marker="o", markersize=4, linewidth=1.6, label=f"{sampler}, 95 % of the difference")
    axes.scatter([best.evaluations], [0], s=110, facecolors="none", edgecolors=INK, linewidths=1.4, zorder=4, label=f"best, KID {best.kid:.4g}")
    axes.scatter([chosen.evaluations], [chosen.above(best)[0]], s=60, color=CHOSEN, zorder=5, label="fewest not told apart from it")
    axes.set_xscale("log")
    ticks = sorted({item.evaluations for item in measured})
    axes.set_xticks(_apart(ticks), [str(tick) for tick in _apart(ticks)])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("evaluations of the network per image", fontsize=9, color=INK)
    axes.set_ylabel("KID above the best", fontsize=9, color=INK)
    _save(figure, axes, path)


def _apart(ticks: list[int]) -> list[int]:
    """Those that leave room for each other's numbers on a logarithmic axis."""
    kept: list[int] = []
    for tick in ticks:
        if not kept or tick / kept[-1] >= TICK_FACTOR:
            kept.append(tick)
    return kept
