"""Puts the trials of a structure stage together: how well the masks are found again, beside the ceiling and the control. Called by collect.py.

Writes metrics.json (docs/utility.md says what is in it) and predictions.csv; loads no torch and reads no image."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medgen import files
from medgen.evaluate import intervals, masks, scores
from medgen.evaluate.scores import Score, score
from medgen.plan import PlannedStage
from medgen.spec_utility import StructureStage
from medgen.task import Work
from medgen.utility import resampling, trials
from medgen.utility.resampling import Resampled
from medgen.utility.trials import Record

LOW_CEILING = 0.5
WITH_LESION = "mean over images whose mask has a lesion"
QUICK_LOOK = "quick look, no segmenter"
COLUMNS = ("id", "group", "bin", "found_pixels", "dice", "iou", "hd95_mm", "dice_shuffled")


@dataclass(frozen=True)
class Side:
    """The answers of all seeds about the same images."""

    answers: list[dict[str, list[Any]]]
    weights: np.ndarray  # [replicates, groups]
    members: np.ndarray  # int [n], the group of each image

    @property
    def bins(self) -> np.ndarray:
        return np.array(self.answers[0]["bin"])

    def groups(self, counted: np.ndarray) -> np.ndarray:
        return np.array(self.answers[0]["group"])[counted]

    def mean(self, column: str, counted: np.ndarray) -> Resampled:
        """Of the images that are counted, bool [n], and have a value."""
        statistics = []
        for answers in self.answers:
            values = np.array(answers[column], dtype=float)
            usable = counted & np.isfinite(values)
            statistics.append(resampling.mean_where(np.nan_to_num(values), usable, self.members, self.weights.shape[1]))
        return resampling.resampled(statistics, self.weights)

    def left_out(self, column: str, counted: np.ndarray) -> int:
        """How many of the counted have no value, of all seeds together."""
        return sum(int((counted & ~np.isfinite(np.array(answers[column], dtype=float))).sum()) for answers in self.answers)


def _side(answers: list[dict[str, list[Any]]], seed: int, stream: str) -> Side:
    names, members = np.unique(answers[0]["group"], return_inverse=True)
    return Side(answers, intervals.draw_weights(len(names), intervals.REPLICATES, seed, stream), members)


def collect_structure(work: Work, source: PlannedStage) -> list[Path]:
    """Returns the files written. Raises MedgenError if trials are missing or damaged."""
    settings = StructureStage.model_validate(source.settings)
    records = trials.read_all(work, source)
    seed = work.plan.seed
    real, synthetic = _side([record["real"] for record in records], seed, "structure_real"), _side([record["synthetic"] for record in records], seed, "structure_synthetic")
    found, skipped, spread = _all_scores(settings, records, real, synthetic, seed)
    words, warnings = _words(found)
    record = {
        "schema": scores.METRICS_SCHEMA, "kind": "structure", "stage": source.name, "of": settings.of, "against": settings.against,
        "scores": scores.to_json(found), "skipped": skipped, "counts": _counts(real, synthetic),
        "details": {"words": words, "warnings": warnings, "spread": spread, "nothing_found": synthetic.left_out("hd95_mm", synthetic.bins != masks.NO_LESION), "seeds": _seeds(records, real, synthetic), "quick_look": _quick_look(real, synthetic)},
        "inputs": records[0]["sides"],
    }  # fmt: skip
    for line in [words, *warnings]:
        work.say(f"{source.name}: {line}")
    files.write_json(work.run.metrics(source.name), record)
    files.write_text(work.run.predictions(source.name), _predictions(records))
    return [work.run.metrics(source.name), work.run.predictions(source.name)]


def _all_scores(settings: StructureStage, records: list[Record], real: Side, synthetic: Side, seed: int) -> tuple[list[Score], dict[str, str], dict[str, float | None]]:
    """Scores, the reason for what is left out, and the standard deviation over seeds of each score by its name."""
    channel = ", ".join(records[0]["sides"]["channels"])
    found: list[Score] = []
    skipped: dict[str, str] = {}
    spread: dict[str, float | None] = {}

    def add(metric: str, reached: Resampled, side: Side, counted: np.ndarray, floor: Resampled | None = None, group: str | None = None, what: str = WITH_LESION) -> None:
        if not np.isfinite(reached.by_seed).all():
            skipped.setdefault(metric if group is None else f"{metric} {group}", "there is no such image, or nothing is found in any")
            return
        ceiling = floor.value if floor is not None and np.isfinite(floor.by_seed).all() else None
        found.append(score(metric, channel, reached.value, reached.interval, ceiling, int(counted.sum()), _protocol(settings, records[0], side, counted, seed, what), group))
        spread[found[-1].name] = reached.spread

    ours, theirs = synthetic.bins != masks.NO_LESION, real.bins != masks.NO_LESION
    for metric, column in (("structure_dice", "dice"), ("structure_iou", "iou"), ("structure_hd95", "hd95_mm")):
        add(metric, synthetic.mean(column, ours), synthetic, ours, real.mean(column, theirs), what=WITH_LESION + (" and in which something is found" if column == "hd95_mm" else ""))
    add("structure_dice_real", real.mean("dice", theirs), real, theirs)
    controlled = ours & np.array([value is not None for value in synthetic.answers[0]["dice_shuffled"]])
    add("structure_dice_shuffled", synthetic.mean("dice_shuffled", controlled), synthetic, controlled, what=WITH_LESION + ", against masks of other patients, or of other images where they are nobody's")
    add("structure_dice_ratio", _ratio(synthetic.mean("dice", ours), real.mean("dice", theirs)), synthetic, ours, what=WITH_LESION + ", both sides resampled")
    add("structure_false_positives", _found_something(synthetic, ~ours), synthetic, ~ours, _found_something(real, ~theirs), what="share of images whose mask is empty")
    for name in masks.BINS:
        of_bin = synthetic.bins == name
        if of_bin.any():
            add("structure_dice", synthetic.mean("dice", of_bin), synthetic, of_bin, real.mean("dice", real.bins == name), name, WITH_LESION + ", by the longest diameter of its largest lesion")
    return found, skipped, spread


def _ratio(first: Resampled, second: Resampled) -> Resampled:
    """Of two sides that were resampled each by itself."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return Resampled(first.by_seed / second.by_seed, first.replicates / second.replicates, min(first.patients, second.patients))


def _found_something(side: Side, counted: np.ndarray) -> Resampled:
    statistics = [resampling.mean_where(np.array(answers["found_pixels"]) > 0, counted, side.members, side.weights.shape[1]) for answers in side.answers]
    return resampling.resampled(statistics, side.weights)


def _protocol(settings: StructureStage, first: Record, side: Side, counted: np.ndarray, seed: int, what: str) -> str:
    chosen = f"the best of {len(first['val'])} looks at the real val split" if first["val"] else "the last step"
    return "; ".join([
        f"U-Net {settings.channels} trained on {first['images']['real']} real slices under classical augmentation, {settings.steps} steps of {settings.batch_size}, {chosen}; threshold 0.5",
        f"images drawn on {first['drawn_on']}; the ceiling is the real {settings.against} split", what, f"mean over {settings.seeds} seed{'s' if settings.seeds > 1 else ''}",
        intervals.describe(side.groups(counted), "patient" if str(side.answers[0]["group"][0]).startswith("patient") else "image"), f"seed {seed}",
    ])  # fmt: skip


def _words(found: list[Score]) -> tuple[str, list[str]]:
    """The result in a line, and what stands against reading it."""
    values = {item.metric: item.value for item in found if item.group is None}
    if "structure_dice" not in values or "structure_dice_real" not in values:
        return "nothing can be said: no image, or no real slice, has a lesion", []
    ratio = f", {values['structure_dice_ratio']:.0%} of it" if "structure_dice_ratio" in values else ""
    control = f"; {values['structure_dice_shuffled']:.3f} against the masks of others" if "structure_dice_shuffled" in values else ""
    words = f"the segmenter reaches Dice {values['structure_dice_real']:.3f} on real images and {values['structure_dice']:.3f} on synthetic ones{ratio}{control}"
    low = f"the segmenter itself reaches only {values['structure_dice_real']:.3f} on real images: train it for more steps before the rest is read"
    return words, [low] if values["structure_dice_real"] < LOW_CEILING else []


def _seeds(records: list[Record], real: Side, synthetic: Side) -> list[dict[str, Any]]:
    ours, theirs = synthetic.bins != masks.NO_LESION, real.bins != masks.NO_LESION
    of_ours, of_theirs = synthetic.mean("dice", ours).by_seed, real.mean("dice", theirs).by_seed
    return [
        {"seed": record["seed"], "chosen_step": record["chosen_step"], "val": record["val"], "dice": _number(of_ours[place]), "dice_real": _number(of_theirs[place])}
        for place, record in enumerate(records)
    ]  # fmt: skip


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _quick_look(real: Side, synthetic: Side) -> dict[str, Any]:
    """What is bright, held against the mask: a glance for people without a segmenter, never a result."""
    def mean(side: Side, column: str) -> float | None:
        values = np.array(side.answers[0][column], dtype=float)[side.bins != masks.NO_LESION]
        return _number(float(np.nanmean(values))) if np.isfinite(values).any() else None

    return {
        "label": QUICK_LOOK, "rule": "pixels brighter than the mean and two standard deviations of what is not background",
        "dice": mean(synthetic, "quick_dice"), "dice_shuffled": mean(synthetic, "quick_dice_shuffled"), "dice_real": mean(real, "quick_dice"),
    }  # fmt: skip


def _counts(real: Side, synthetic: Side) -> dict[str, int]:
    counted: Callable[[Side], int] = lambda side: int((side.bins != masks.NO_LESION).sum())  # noqa: E731
    return {
        "synthetic": len(synthetic.bins), "synthetic_with_lesion": counted(synthetic), "real": len(real.bins), "real_with_lesion": counted(real),
        "real_patients": real.weights.shape[1],
    }  # fmt: skip


def _predictions(records: list[Record]) -> str:
    """A line for each image of each side and seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["side", "seed", *COLUMNS])
    for record in records:
        for side in ("real", "synthetic"):
            answers = record[side]
            columns = [answers[name] if name in answers else [None] * len(answers["id"]) for name in COLUMNS]
            for line in zip(*columns, strict=True):
                writer.writerow([side, record["seed"], *("" if value is None else value for value in line)])
    return text.getvalue()
