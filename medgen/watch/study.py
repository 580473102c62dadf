"""A sweep as a picture and a table: every score against every value that was varied, and the best point by validation. Called by `medgen study`.

What is chosen is chosen by the val split: scores of the test split are drawn where a spec asks for them, and choose nothing."""

from __future__ import annotations

import io
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgen import csv_files, files
from medgen.errors import InputError
from medgen.evaluate.scores import MEANINGS
from medgen.watch.sweep import Score, SweepPoint, points_of, short, shown, sortable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VALIDATION_LOSS = "val"  # train.py's name for it, with the phase's behind it where there are several
SPREAD = 0.5  # of the room of a value, over which its points lie side by side
MOST_LEVEL_LABELS, LONGEST_LEVEL_LABEL = 8, 5  # beyond these they are turned
PANEL_WIDTH, PANEL_HEIGHT, HEADER_HEIGHT, FOOTER_HEIGHT, SMALLEST_WIDTH = 3.3, 2.3, 0.85, 0.5, 8.0  # inches
SPACE_BETWEEN_ROWS = 0.08  # inches
LETTERS_PER_INCH = 15  # of the small text below the title
DOTS_PER_INCH = 110
INK, SOFT, LINE, POINT, BEST, FLOOR = "#1d2126", "#5d666f", "#e2dfd8", "#2f6f9f", "#c8552b", "#2c7a4b"
INTERVAL_OPACITY = 0.3
NOT_SET = "-"


@dataclass(frozen=True)
class Row:
    """One score under one protocol, of all points that have it; `best`: of the finished ones, None for what chooses nothing."""

    title: str
    score: Score  # for what all of the row share
    members: list[tuple[SweepPoint, Score]]
    best: SweepPoint | None


def study(name: str, out: Path) -> str:
    """Write study.png and points.csv to the new folder `out`; returns what to print. Raises InputError if nothing is finished yet."""
    files.require_new(out)
    points = points_of(name)
    finished = [point for point in points if _is_finished(point)]
    if not finished:
        raise InputError(f"no point of {name} is finished yet, so there is nothing to draw; how far they are: medgen ls --sweep {name}")
    rows = _rows(points)
    told = [f"{name}: {len(finished)} of {len(points)} points finished", *_best_points(points, rows), _what_chose(rows)]
    with files.folder_in_one_move(out) as folder:
        _write_table(folder / "points.csv", points)
        _save(_picture(points, rows, told), folder / "study.png")
    return "\n".join([*told, f"{out}: study.png, points.csv"])


# what is compared


def _is_finished(point: SweepPoint) -> bool:
    return point.verdict == "done"


def _rows(points: list[SweepPoint]) -> list[Row]:
    """What finished points are selected by, then what was evaluated; another protocol is another row."""
    finished = [point for point in points if _is_finished(point)]
    selecting = _selecting_columns(finished)
    stages = {column.partition(": ")[0] for column in selecting}
    made = [_row(column, points, {point.run_id: point.selection for point in points}, protocol, len(stages) > 1)
            for column in selecting for protocol in _protocols(column, [point.selection for point in finished])]  # fmt: skip
    evaluated = dict.fromkeys(column for point in finished for column in point.scores)
    made += [_row(column, points, {point.run_id: point.scores for point in points}, protocol, True)
             for column in evaluated for protocol in _protocols(column, [point.scores for point in finished])]  # fmt: skip
    return made


def _selecting_columns(points: list[SweepPoint]) -> list[str]:
    """Of every train stage its own selection metrics, or the validation loss of one that has none."""
    by_stage: dict[str, list[str]] = defaultdict(list)
    for column in dict.fromkeys(column for point in points for column in point.selection):
        by_stage[column.partition(": ")[0]].append(column)
    chosen = []
    for stage, columns in by_stage.items():
        own = [column for column in columns if column != f"{stage}: {VALIDATION_LOSS}" and not column.startswith(f"{stage}: {VALIDATION_LOSS}_")]
        chosen += own or columns
    return chosen


def _protocols(column: str, scores: list[dict[str, Score]]) -> list[str]:
    return list(dict.fromkeys(item[column].protocol for item in scores if column in item))


def _row(column: str, points: list[SweepPoint], scores: dict[str, dict[str, Score]], protocol: str, name_stage: bool) -> Row:
    members = [(point, scores[point.run_id][column]) for point in points if column in scores[point.run_id] and scores[point.run_id][column].protocol == protocol]
    score = members[0][1]
    stage, _, metric = column.partition(": ")
    name, _, channel = metric.partition(" ")
    words = f"{MEANINGS[name].title}{f', {channel}' if channel else ''}" if name in MEANINGS else metric
    title = f"{f'{stage}: ' if name_stage else ''}{words}, {score.split} split ({score.better} is better)"
    best = None
    if column in members[0][0].selection:
        sign = -1 if score.better == "higher" else 1
        best = min((item for item in members if _is_finished(item[0])), key=lambda item: sign * item[1].value)[0]
    return Row(title, score, members, best)


def _best_points(points: list[SweepPoint], rows: list[Row]) -> list[str]:
    keys = _keys(points)
    lines = []
    for row in rows:
        if row.best is not None:
            value = next(score.value for point, score in row.members if point is row.best)
            equals = sum(score.value == value for point, score in row.members if _is_finished(point))
            settings = ", ".join(f"{word} {shown(row.best.values[key])}" for key, word in zip(keys, short(keys), strict=True) if key in row.best.values)
            lines.append(f"best in {row.title}: {settings}, with {value:.4g}{f', the first of {equals} equal ones' if equals > 1 else ''} [{row.best.run_id}]")
    return lines


def _what_chose(rows: list[Row]) -> str:
    chosen = any(row.best is not None for row in rows)
    sentence = ("The best point is named by its score on the validation split alone; nothing was selected on the test set." if chosen
                else "No training has a validation score, so no best point is named; nothing was selected on the test set.")  # fmt: skip
    return sentence + (" Scores of the test split are there to be read." if any(row.score.split == "test" for row in rows) else "")


def _keys(points: list[SweepPoint]) -> list[str]:
    return list(dict.fromkeys(key for point in points for key in point.values))


# the table


def _write_table(path: Path, points: list[SweepPoint]) -> None:
    """One row per point, with every digit; scores that a point does not have are empty."""
    keys = _keys(points)
    columns = list(dict.fromkeys([*(column for point in points for column in point.selection), *(column for point in points for column in point.scores)]))
    header = ["run", "state", "finished_share", "device_hours", *keys, *(name for column in columns for name in _cells(column, None))]
    rows = []
    for point in points:
        scores = {**point.selection, **point.scores}
        row = {"run": point.run_id, "state": point.verdict, "finished_share": f"{point.fraction:.4f}", "device_hours": f"{point.device_hours:.4f}"}
        row |= {key: shown(point.values[key]) if key in point.values else "" for key in keys}
        for column in columns:
            row |= _cells(column, scores.get(column))
        rows.append(row)
    csv_files.write_rows(path, header, rows)


def _cells(column: str, score: Score | None) -> dict[str, str]:
    low, high = (repr(end) for end in score.ci) if score is not None and score.ci is not None else ("", "")
    return {column: "" if score is None else repr(score.value), f"{column} low": low, f"{column} high": high,
            f"{column} split": "" if score is None else score.split, f"{column} protocol": "" if score is None else score.protocol}  # fmt: skip


# the picture


def _picture(points: list[SweepPoint], rows: list[Row], told: list[str]) -> Figure:
    """A row of panels per score, a column per varied value."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    keys = _keys(points)
    heights = [HEADER_HEIGHT, PANEL_HEIGHT * len(rows) + FOOTER_HEIGHT]
    size = (max(SMALLEST_WIDTH, PANEL_WIDTH * len(keys)), sum(heights))
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=SPACE_BETWEEN_ROWS), facecolor="white")
    (header,), (body,) = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)
    header.text(0.015, 0.93, told[0], va="top", fontsize=14, fontweight="bold", color=INK)
    header.text(0.015, 0.55, "\n".join(textwrap.fill(line, round(figure.get_figwidth() * LETTERS_PER_INCH)) for line in told[1:]), va="top", fontsize=8, color=SOFT)
    grid = body.subplots(len(rows), len(keys), squeeze=False, sharey="row", sharex="col")
    bests = [row.best for row in rows if row.best is not None]
    for line, row in zip(grid, rows, strict=True):
        line[0].set_title(row.title, loc="left", fontsize=9, fontweight="bold", color=INK, pad=10)
        line[0].set_ylabel(row.score.unit, fontsize=8, color=SOFT)
        for axes, key in zip(line, keys, strict=True):
            _panel(axes, row, key, _levels(points, key), bests if row.best is None else [row.best])
    for axes, word in zip(grid[-1], short(keys), strict=True):
        axes.set_xlabel(word, fontsize=9, color=INK)
    body.legend(handles=_legend(rows), loc="outside lower left", ncols=6, frameon=False, fontsize=8, labelcolor=SOFT, handletextpad=0.5, columnspacing=1.6)
    return figure


def _levels(points: list[SweepPoint], key: str) -> list[str]:
    """The values of a key as text, in their order; numbers by size."""
    known = {shown(point.values[key]): point.values[key] for point in points if key in point.values}
    return [*sorted(known, key=lambda text: sortable(known[text])), *([NOT_SET] if any(key not in point.values for point in points) else [])]


def _panel(axes: Axes, row: Row, key: str, levels: list[str], bests: list[SweepPoint]) -> None:
    """Every point at its value, side by side; those that are not finished hollow; the mean of the finished ones as a line."""
    means: list[tuple[int, float]] = []
    if row.score.floor is not None:
        axes.axhline(row.score.floor, color=FLOOR, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for place, level in enumerate(levels):
        members = [(point, score) for point, score in row.members if (shown(point.values[key]) if key in point.values else NOT_SET) == level]
        for number, (point, score) in enumerate(members):
            x = place + SPREAD * ((number + 0.5) / len(members) - 0.5)
            _point(axes, x, score, _is_finished(point), point in bests)
        finished = [score.value for point, score in members if _is_finished(point)]
        if finished:
            means.append((place, sum(finished) / len(finished)))
    axes.plot([place for place, _ in means], [mean for _, mean in means], color=INK, linewidth=1.6, marker="_", markersize=13, markeredgewidth=1.6, zorder=3)
    axes.set_xlim(-0.5, len(levels) - 0.5)
    axes.set_xticks(range(len(levels)), levels)
    turned = len(levels) > MOST_LEVEL_LABELS or max(len(level) for level in levels) > LONGEST_LEVEL_LABEL
    axes.tick_params(axis="x", labelsize=8, labelcolor=INK, length=0, rotation=45 if turned else 0)
    axes.tick_params(axis="y", labelsize=8, labelcolor=SOFT, length=0)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)


def _point(axes: Axes, x: float, score: Score, finished: bool, best: bool) -> None:
    colour = BEST if best else POINT
    if score.ci is not None:
        axes.plot([x, x], score.ci, color=colour, linewidth=1.0, alpha=INTERVAL_OPACITY, solid_capstyle="butt", zorder=2)
    axes.scatter([x], [score.value], s=62 if best else 24, color=colour if finished else "white", edgecolors="white" if finished else SOFT,
                 linewidths=0.6 if finished else 1.0, zorder=5 if best else 4)  # fmt: skip


def _legend(rows: list[Row]) -> list[Any]:
    """What the marks mean, of those that occur."""
    from matplotlib.lines import Line2D

    dot: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 6}
    members = [member for row in rows for member in row.members]
    marks = [
        (True, Line2D([], [], **dot, markerfacecolor=POINT, markeredgecolor="white", label="point")),
        (any(not _is_finished(point) for point, _ in members), Line2D([], [], **dot, markerfacecolor="white", markeredgecolor=SOFT, label="not finished")),
        (any(row.best is not None for row in rows), Line2D([], [], **{**dot, "markersize": 9}, markerfacecolor=BEST, markeredgecolor="white", label="best by validation")),
        (True, Line2D([], [], color=INK, linewidth=1.6, label="mean of finished points")),
        (any(score.ci is not None for _, score in members), Line2D([], [], color=POINT, alpha=INTERVAL_OPACITY, linewidth=1.6, label="95 % interval")),
        (any(row.score.floor is not None for row in rows), Line2D([], [], color=FLOOR, linewidth=1, linestyle=(0, (4, 3)), label="floor: real against real")),
    ]
    return [handle for occurs, handle in marks if occurs]


def _save(figure: Figure, path: Path) -> None:
    packed = io.BytesIO()
    figure.savefig(packed, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})  # no version in it: equal pictures are equal files
    files.write_bytes(path, packed.getvalue())
