"""Puts the trials of a structure stage together: how well the masks are found again, beside the ceiling and the control. Called by collect.py.

Writes metrics.json (docs/utility.md says what is in it) and predictions.csv; loads no torch and reads no image."""

from __future__ import annotations

import csv
import io
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
from medgen.utility import regions, resampling, trials
from medgen.utility.regions import Region, column
from medgen.utility.resampling import Resampled
from medgen.utility.trials import Record

LOW_CEILING = 0.5
WITH_LESION = "mean over images whose mask has a lesion"
WITH_REGION = "mean over images whose mask shows the region"
QUICK_LOOK = "quick look, no segmenter"
OF_A_LESION = ("bin", "found_pixels", "dice", "iou", "hd95_mm", "dice_shuffled")
OF_A_REGION = ("pixels", *OF_A_LESION[1:])


Counted = dict[Region, np.ndarray]  # bool [n] of each region, the images whose answer about it is part of a score


def _any(counted: Counted) -> np.ndarray:
    return np.asarray(np.any(list(counted.values()), axis=0))


@dataclass(frozen=True)
class Side:
    """The answers of all seeds about the same images."""

    answers: list[dict[str, list[Any]]]
    weights: np.ndarray  # [replicates, groups]
    members: np.ndarray  # int [n], the group of each image

    @property
    def bins(self) -> np.ndarray:
        """Of data with one region."""
        return np.array(self.answers[0]["bin"])

    def shows(self, region: Region) -> np.ndarray:
        """bool [n], the images whose mask has the region, or a lesion."""
        return self.bins != masks.NO_LESION if region is None else np.array(self.answers[0][column("pixels", region)]) > 0

    def groups(self, counted: np.ndarray) -> np.ndarray:
        return np.array(self.answers[0]["group"])[counted]

    def mean(self, name: str, counted: Counted) -> Resampled:
        """Of the images that are counted and have a value; of several regions the mean over them."""
        statistics = []
        for answers in self.answers:
            parts = []
            for region, images in counted.items():
                values = np.array(answers[column(name, region)], dtype=float)
                parts.append(resampling.mean_where(np.nan_to_num(values), images & np.isfinite(values), self.members, self.weights.shape[1]))
            statistics.append(resampling.together(parts))
        return resampling.resampled(statistics, self.weights)

    def left_out(self, name: str, counted: Counted) -> int:
        """How many of the counted have no value, of all seeds and regions together."""
        return sum(int((images & ~np.isfinite(np.array(answers[column(name, region)], dtype=float))).sum()) for answers in self.answers for region, images in counted.items())


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
    channels, names = records[0]["sides"]["channels"], regions.of_sides(records[0]["sides"])
    words, warnings = _words(found, channels, names)
    drawn = {region: synthetic.shows(region) for region in names}
    record = {
        "schema": scores.METRICS_SCHEMA, "kind": "structure", "stage": source.name, "of": settings.of, "against": settings.against,
        "scores": scores.to_json(found), "skipped": skipped, "counts": _counts(real, synthetic, names),
        "details": {"words": words, "warnings": warnings, "spread": spread, "nothing_found": synthetic.left_out("hd95_mm", drawn), "seeds": _seeds(records, real, synthetic, names), "quick_look": _quick_look(real, synthetic) if names == regions.ONE else None},
        "inputs": records[0]["sides"],
    }  # fmt: skip
    for line in [words, *warnings]:
        work.say(f"{source.name}: {line}")
    files.write_json(work.run.metrics(source.name), record)
    files.write_text(work.run.predictions(source.name), _predictions(records))
    return [work.run.metrics(source.name), work.run.predictions(source.name)]


def _all_scores(settings: StructureStage, records: list[Record], real: Side, synthetic: Side, seed: int) -> tuple[list[Score], dict[str, str], dict[str, float | None]]:
    """Scores, the reason for what is left out, and the standard deviation over seeds of each score by its name."""
    channels, names = records[0]["sides"]["channels"], regions.of_sides(records[0]["sides"])
    found: list[Score] = []
    skipped: dict[str, str] = {}
    spread: dict[str, float | None] = {}

    def add(metric: str, region: Region, reached: Resampled, side: Side, counted: np.ndarray, floor: Resampled | None = None, group: str | None = None, what: str = "") -> None:
        if not np.isfinite(reached.by_seed).all():
            skipped.setdefault(" ".join(word for word in (metric, region, group) if word), "there is no such image, or nothing is found in any")
            return
        ceiling = floor.value if floor is not None and np.isfinite(floor.by_seed).all() else None
        protocol = _protocol(settings, records[0], side, counted, seed, what)
        found.append(score(metric, regions.channel(channels, region), reached.value, reached.interval, ceiling, int(counted.sum()), protocol, group))
        spread[found[-1].name] = reached.spread

    there = _in_both(real, synthetic, names)
    usual = WITH_LESION if names == regions.ONE else f"{WITH_REGION}, and of all the mean over {regions.listed(there)}"
    for region, members in [(None, there), *([(name, (name,)) for name in names] if len(names) > 1 else [])]:
        ours, theirs = ({name: side.shows(name) for name in members} for side in (synthetic, real))
        for metric, column_name in (("structure_dice", "dice"), ("structure_iou", "iou"), ("structure_hd95", "hd95_mm")):
            what = usual + (" and in which something is found" if column_name == "hd95_mm" else "")
            add(metric, region, synthetic.mean(column_name, ours), synthetic, _any(ours), real.mean(column_name, theirs), what=what)
        add("structure_dice_real", region, real.mean("dice", theirs), real, _any(theirs), what=usual)
        controlled = {name: ours[name] & np.array([value is not None for value in synthetic.answers[0][column("dice_shuffled", name)]]) for name in members}
        add("structure_dice_shuffled", region, synthetic.mean("dice_shuffled", controlled), synthetic, _any(controlled), what=usual + ", against masks of other patients, or of other images where they are nobody's")
        add("structure_dice_ratio", region, _ratio(synthetic.mean("dice", ours), real.mean("dice", theirs)), synthetic, _any(ours), what=usual + ", both sides resampled")
    empty, empty_real = (~_any({name: side.shows(name) for name in names}) for side in (synthetic, real))
    add("structure_false_positives", None, _found_something(synthetic, empty, names), synthetic, empty, _found_something(real, empty_real, names), what="share of images whose mask is empty")
    for name in masks.BINS if names == regions.ONE else ():
        of_bin = synthetic.bins == name
        if of_bin.any():
            add("structure_dice", None, synthetic.mean("dice", {None: of_bin}), synthetic, of_bin, real.mean("dice", {None: real.bins == name}), name, WITH_LESION + ", by the longest diameter of its largest lesion")
    return found, skipped, spread


def _in_both(real: Side, synthetic: Side, names: tuple[Region, ...]) -> tuple[Region, ...]:
    """The regions that both sides show: a mean over others would compare unlike things."""
    return tuple(name for name in names if real.shows(name).any() and synthetic.shows(name).any()) or names


def _ratio(first: Resampled, second: Resampled) -> Resampled:
    """Of two sides that were resampled each by itself."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return Resampled(first.by_seed / second.by_seed, first.replicates / second.replicates, min(first.patients, second.patients))


def _found_something(side: Side, counted: np.ndarray, names: tuple[Region, ...]) -> Resampled:
    found = [np.any([np.array(answers[column("found_pixels", region)]) > 0 for region in names], axis=0) for answers in side.answers]
    return resampling.resampled([resampling.mean_where(anything, counted, side.members, side.weights.shape[1]) for anything in found], side.weights)


def _protocol(settings: StructureStage, first: Record, side: Side, counted: np.ndarray, seed: int, what: str) -> str:
    chosen = f"the best of {len(first['val'])} looks at the real val split" if first["val"] else "the last step"
    return "; ".join([
        f"U-Net {settings.channels} trained on {first['images']['real']} real slices under classical augmentation, {settings.steps} steps of {settings.batch_size}, {chosen}; threshold 0.5",
        f"images drawn on {first['drawn_on']}; the ceiling is the real {settings.against} split", what, f"mean over {settings.seeds} seed{'s' if settings.seeds > 1 else ''}",
        intervals.describe(side.groups(counted), "patient" if str(side.answers[0]["group"][0]).startswith("patient") else "image"), f"seed {seed}",
    ])  # fmt: skip


def _words(found: list[Score], channels: list[str], names: tuple[Region, ...]) -> tuple[str, list[str]]:
    """The result in a line, and what stands against reading it."""
    values = {(item.metric, item.channel): item.value for item in found if item.group is None}
    whole = regions.channel(channels, None)
    if ("structure_dice", whole) not in values or ("structure_dice_real", whole) not in values:
        return f"nothing can be said: no image, or no real slice, {'has a lesion' if names == regions.ONE else 'shows a region'}", []
    told = f"the segmenter reaches {_reached(values, whole)}"
    parts = {region: regions.channel(channels, region) for region in names if region is not None}
    told += "".join(f"; {region}: {_reached(values, channel)}" for region, channel in parts.items() if {("structure_dice", channel), ("structure_dice_real", channel)} <= set(values))
    ceiling = values["structure_dice_real", whole]
    low = f"the segmenter itself reaches only {ceiling:.3f} on real images: train it for more steps before the rest is read"
    return told, [low] if ceiling < LOW_CEILING else []


def _reached(values: dict[tuple[str, str], float], channel: str) -> str:
    ratio = f", {values['structure_dice_ratio', channel]:.0%} of it" if ("structure_dice_ratio", channel) in values else ""
    control = f"; {values['structure_dice_shuffled', channel]:.3f} against the masks of others" if ("structure_dice_shuffled", channel) in values else ""
    return f"Dice {values['structure_dice_real', channel]:.3f} on real images and {values['structure_dice', channel]:.3f} on synthetic ones{ratio}{control}"


def _seeds(records: list[Record], real: Side, synthetic: Side, names: tuple[Region, ...]) -> list[dict[str, Any]]:
    there = _in_both(real, synthetic, names)
    of_ours, of_theirs = (side.mean("dice", {name: side.shows(name) for name in there}).by_seed for side in (synthetic, real))
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


def _counts(real: Side, synthetic: Side, names: tuple[Region, ...]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, side in (("synthetic", synthetic), ("real", real)):
        counts |= {name: len(side.members), **{f"{name}_with_{region or 'lesion'}": int(side.shows(region).sum()) for region in names}}
    return counts | {"real_patients": real.weights.shape[1]}


def _predictions(records: list[Record]) -> str:
    """A line for each image of each side and seed."""
    names = regions.of_sides(records[0]["sides"])
    wanted = ["id", "group", *(column(name, region) for region in names for name in (OF_A_LESION if region is None else OF_A_REGION))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["side", "seed", *wanted])
    for record in records:
        for side in ("real", "synthetic"):
            answers = record[side]
            columns = [answers[name] if name in answers else [None] * len(answers["id"]) for name in wanted]
            for line in zip(*columns, strict=True):
                writer.writerow([side, record["seed"], *("" if value is None else value for value in line)])
    return text.getvalue()
