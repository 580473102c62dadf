"""What the report shows of a training: its loss, what its family plots beside it, samples on the way. Used by build.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from medgen import models, spec
from medgen.dp import card as privacy
from medgen.models.settings import FamilyConfig
from medgen.report import gather
from medgen.report.charts import Series, bar_chart, line_chart
from medgen.report.gallery import Panel
from medgen.report.gather import StageFacts, TrainingCurves
from medgen.report.pictures import grid_tile
from medgen.rundir import RunDir

SMOOTH_FROM_POINTS = 40
MOST_POINTS = 500  # of a line: a chart has no more pixels
SHOWN_GRIDS = 6
TONES = ("first", "second", "third")  # of lines in one chart

Say = Callable[[str], None]


@dataclass(frozen=True)
class Chart:
    """keys: words and tone of each line, where there are several."""

    title: str
    drawn: Markup
    keys: list[tuple[str, str]]
    reading: str = ""


@dataclass(frozen=True)
class TrainingSection:
    """One train stage on the page."""

    facts: StageFacts
    charts: list[Chart]
    samples: Panel | None
    loss_falls: bool
    last_loss: float | None
    last_val_loss: float | None
    best_val_loss: float | None
    guarantee: str  # of differential privacy, and what it does not cover; empty without


def training_section(run: RunDir, facts: StageFacts, say: Say) -> TrainingSection | None:
    """None if nothing was logged yet."""
    curves = gather.training_curves(run, facts.name)
    if curves is None or not curves.steps:
        return None
    config = _config(facts.settings["config"])
    loss_falls = config is None or config.loss_falls
    return TrainingSection(
        facts, [*_loss_charts(curves, loss_falls), *_family_charts(config, curves), *_bin_charts(curves)], _samples(run, facts.name, say),
        loss_falls, curves.loss[-1], curves.val_loss[-1] if curves.val_loss else None, min(curves.val_loss, default=None),
        "\n".join(privacy.from_record(facts.facts["privacy"]).words()) if "privacy" in facts.facts else "",
    )  # fmt: skip


def _config(settings: dict[str, Any]) -> FamilyConfig | None:
    """None if this medgen does not know it: a report of old results must still be possible."""
    if settings["model"] not in models.families():
        return None
    try:
        config: FamilyConfig = spec.family_config(settings)
    except ValueError:
        return None
    return config


def _loss_charts(curves: TrainingCurves, loss_falls: bool) -> list[Chart]:
    """One where training and validation have the same loss; players against each other are judged by another one."""
    lines, keys = _lines("training", curves.steps, curves.loss, "first"), [("training", "first"), ("validation", "second")]
    if not curves.val_steps:
        return [Chart("Loss", line_chart(lines, "step", "loss", allow_logarithmic=True), [])]
    validation = Series("validation", *_thinned(curves.val_steps, curves.val_loss), "second")
    if loss_falls:
        return [Chart("Loss", line_chart([*lines, validation], "step", "loss", allow_logarithmic=True), keys)]
    return [Chart("Loss", line_chart(lines, "step", "loss"), []), Chart("Loss on the val split", line_chart([validation], "step", "loss", allow_logarithmic=True), [])]


def _family_charts(config: FamilyConfig | None, curves: TrainingCurves) -> list[Chart]:
    """Those of which the log has something."""
    found = []
    for asked in config.curves if config is not None else ():
        lines, keys = [], []
        for (name, words), tone in zip(asked.lines.items(), TONES, strict=False):
            steps, values = curves.logged(name)
            if steps:
                lines += _lines(words, steps, values, tone)
                keys.append((words, tone))
        if lines:
            found.append(Chart(asked.title, line_chart(lines, "step", asked.y_label), keys, asked.reading))
    return found


def _bin_charts(curves: TrainingCurves) -> list[Chart]:
    if not curves.bins:
        return []
    tenths = [str(number) for number in range(len(curves.bins))]
    return [Chart("Loss by noise level, end of training", bar_chart(curves.bins, tenths, "tenth of the noise levels (0: least noise)", "loss"), [])]


def _lines(words: str, steps: list[float], values: list[float], tone: str) -> list[Series]:
    """A noisy line faint, with its running mean."""
    if len(values) < SMOOTH_FROM_POINTS:
        return [Series(words, steps, values, tone)]
    mean = gather.smoothed(values, max(2, len(values) // 25))
    return [Series(words, *_thinned(steps, values), tone, faint=True), Series(f"{words}, running mean", *_thinned(steps, mean), tone)]


def _thinned(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS of them, evenly, the last one too."""
    if len(steps) <= MOST_POINTS:
        return steps, values
    kept = _evenly(len(steps), MOST_POINTS)
    return [steps[place] for place in kept], [values[place] for place in kept]


def _evenly(count: int, most: int) -> list[int]:
    """Places of the first, the last and what lies evenly between."""
    return [int(place) for place in np.unique(np.linspace(0, count - 1, min(count, most)).round())]


def _samples(run: RunDir, stage: str, say: Say) -> Panel | None:
    drawn = run.drawn_previews(stage)
    steps, groups = list(drawn), []
    for step in (steps[place] for place in _evenly(len(steps), SHOWN_GRIDS)):
        path = drawn[step].relative_to(run.root)
        try:
            groups.append([grid_tile(drawn[step], f"step {step:,}", str(path))])
        except (OSError, ValueError, SyntaxError) as error:
            say(f"{path}: left out of the report: {error}")
    if not groups:
        return None
    folder = run.previews(stage).relative_to(run.root)
    told = f"all {len(steps)}" if len(groups) == len(steps) else f"{len(groups)} of {len(steps)}"
    return Panel("Samples through training", f"the same noise every time; {told} grids of {folder}", groups)
