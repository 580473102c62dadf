"""Puts the trials of a utility stage together: each arm's scores, what it gains over others, and what could have been seen. Called by collect.py.

Writes metrics.json (docs/utility.md says what is in it) and predictions.csv; loads no torch and reads no image."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medgen import files
from medgen.errors import MedgenError
from medgen.evaluate import intervals, scores
from medgen.evaluate.scores import MEANINGS, Score, score
from medgen.plan import PlannedStage
from medgen.spec_utility import UtilityStage
from medgen.task import Work
from medgen.utility import regions, resampling, trials
from medgen.utility.regions import Region, column
from medgen.utility.resampling import Resampled, Statistic
from medgen.utility.trials import Record

COMPARED_WITH = ("real", "duplicated", "augmented")


@dataclass(frozen=True)
class Question:
    """What every arm is asked. `region`: one of several; None: their mean, or the only one, or what no region is part of."""

    metric: str
    region: Region = None

    @property
    def name(self) -> str:
        return self.metric if self.region is None else f"{self.metric} {self.region}"


Table = dict[Question, dict[str, Resampled]]  # by arm, what it reached


def collect_utility(work: Work, source: PlannedStage) -> list[Path]:
    """Returns the files written. Raises MedgenError if trials are missing, damaged or of different test sets."""
    settings = UtilityStage.model_validate(source.settings)
    records = trials.read_all(work, source)
    _require_one_test_set(records, source.name)
    table, skipped = _table(settings, records, work.plan.seed)
    found = [_score(question, arm, reached, settings, records[0], work.plan.seed) for question, arms in table.items() for arm, reached in arms.items()]
    comparisons = list(_comparisons(table))
    record = {
        "schema": scores.METRICS_SCHEMA, "kind": "utility", "stage": source.name, "of": settings.of, "against": "test", "task": settings.task,
        "scores": scores.to_json(found), "skipped": skipped, "counts": _counts(records[0]),
        "details": {"arms": _arms(settings, records, table), "comparisons": comparisons},
        "inputs": records[0]["sides"],
    }  # fmt: skip
    for item in comparisons:
        if item["to"] == "real":
            work.say(f"{item['metric']}, {_of(item)}{item['arm']}: {item['words']}")
    files.write_json(work.run.metrics(source.name), record)
    files.write_text(work.run.predictions(source.name), _predictions(settings, records))
    return [work.run.metrics(source.name), work.run.predictions(source.name)]


def _of(item: dict[str, Any]) -> str:
    return f"{item['region']}, " if "region" in item else ""


def _require_one_test_set(records: list[Record], stage: str) -> None:
    for record in records:
        if (record["sides"], record["test"]["id"]) != (records[0]["sides"], records[0]["test"]["id"]):
            raise MedgenError(f"{stage}: its trials were run on different data or images; remove outcome/{stage}.*.json and {stage}/ of the run, and submit again")


def _table(settings: UtilityStage, records: list[Record], seed: int) -> tuple[Table, dict[str, str]]:
    """Every metric of every arm, and why metrics are left out."""
    names, patients = np.unique(records[0]["test"]["patient"], return_inverse=True)
    weights = intervals.draw_weights(len(names), intervals.REPLICATES, seed, "utility")
    of_trials = [_statistics(settings, record, patients, len(names)) for record in records]
    table: Table = {}
    skipped: dict[str, str] = {}
    for question in of_trials[0]:
        arms = {
            arm.name: resampling.resampled([statistics[question] for statistics, record in zip(of_trials, records, strict=True) if record["arm"] == arm.name], weights)
            for arm in settings.all_arms
        }  # fmt: skip
        if all(np.isfinite(reached.by_seed).all() for reached in arms.values()):
            table[question] = arms
        else:
            skipped[question.name] = _why_left_out(question, records[0])
    return table, skipped


LEFT_OUT = {
    **dict.fromkeys(("utility_balanced_accuracy", "utility_macro_f1", "utility_auc"), "some class has no image in the test split"),
    "utility_dice": "no test slice has a lesion",
    "utility_false_positives": "every test slice has a lesion",
}


def _why_left_out(question: Question, record: Record) -> str:
    if question.region is not None:
        return f"no test slice shows {question.region}"
    several = len(regions.of_sides(record["sides"])) > 1
    return LEFT_OUT[question.metric].replace("has a lesion", "shows a region") if several else LEFT_OUT[question.metric]


def _statistics(settings: UtilityStage, record: Record, patients: np.ndarray, count: int) -> dict[Question, Statistic]:
    test = record["test"]
    if settings.task == "classification":
        labels, probabilities = np.array(test["label"]), np.array(test["probabilities"])
        return {
            Question("utility_balanced_accuracy"): resampling.balanced_accuracy(labels, probabilities, patients, count),
            Question("utility_macro_f1"): resampling.macro_f1(labels, probabilities, patients, count),
            Question("utility_auc"): resampling.area_under_curve(labels, probabilities, patients, count),
        }
    names = regions.of_sides(record["sides"])
    shown = {region: np.array(test[column("lesion_pixels", region)]) > 0 for region in names}
    dice = {region: resampling.mean_where(np.array(test[column("dice", region)]), shown[region], patients, count) for region in names}
    found = np.any([np.array(test[column("found_pixels", region)]) > 0 for region in names], axis=0)
    there = [region for region in names if shown[region].any()] or names
    return {
        Question("utility_dice"): resampling.together([dice[region] for region in there]),
        **({Question("utility_dice", region): dice[region] for region in names} if len(names) > 1 else {}),
        Question("utility_false_positives"): resampling.mean_where(found.astype(float), ~np.any(list(shown.values()), axis=0), patients, count),
    }


def _score(question: Question, arm: str, reached: Resampled, settings: UtilityStage, record: Record, seed: int) -> Score:
    network = settings.network if settings.task == "classification" else f"U-Net {settings.channels}"
    protocol = "; ".join([
        f"{network} from random weights, {settings.steps} steps of {settings.batch_size} for every arm, AdamW {settings.lr:g}",
        f"the best of {len(record['val'])} looks at the real val split is taken, in every arm" + (", and the model that drew the images saw that split" if "val" in record["sides"]["model_saw"] else ""),
        f"real test split, seen once; mean over {_seeds(settings.seeds)}", *_over_regions(question, record),
        intervals.describe(np.array(record["test"]["patient"]), "patient"), f"seed {seed}",
    ])  # fmt: skip
    images = len(record["test"]["id"])
    return score(question.metric, regions.channel(record["sides"]["channels"], question.region), reached.value, reached.interval, None, images, protocol, group=arm)


def _over_regions(question: Question, record: Record) -> list[str]:
    names = regions.of_sides(record["sides"])
    if len(names) == 1 or question.metric != "utility_dice":
        return []
    return [f"{regions.listed(names)} learnt together, one channel each; each over the slices that show it, of all regions the mean over those that some slice shows"]


def _seeds(count: int) -> str:
    return f"{count} seeds" if count > 1 else "one seed"


def _comparisons(table: Table) -> Iterator[dict[str, Any]]:
    """Every arm with real, duplicated and augmented, as far as they are there."""
    for question, arms in table.items():
        better = MEANINGS[question.metric].better
        asked = {"metric": question.metric, **({} if question.region is None else {"region": question.region})}
        assert better != "closer to floor"
        for other in COMPARED_WITH:
            for arm in arms if other in arms else ():
                if arm != other and (other == "real" or arm not in COMPARED_WITH):
                    yield {**asked, "arm": arm, "to": other, **asdict(resampling.difference(arms[arm], arms[other], other, better))}


def _arms(settings: UtilityStage, records: list[Record], table: Table) -> list[dict[str, Any]]:
    """What each arm was trained on, and how each of its seeds went."""
    described = []
    for arm in settings.all_arms:
        own = [record for record in records if record["arm"] == arm.name]
        seeds = [
            {"seed": record["seed"], "chosen_step": record["chosen_step"], "val": record["val"],
             **{question.name: float(arms[arm.name].by_seed[place]) for question, arms in table.items()}}
            for place, record in enumerate(own)
        ]  # fmt: skip
        described.append({"arm": arm.name, "kind": arm.kind, "ratio": arm.ratio, "images": own[0]["images"], "spread": {question.name: arms[arm.name].spread for question, arms in table.items()}, "seeds": seeds})
    return described


def _counts(record: Record) -> dict[str, int]:
    test = record["test"]
    counts = {"test": len(test["id"]), "test_patients": len(set(test["patient"]))}
    pixels = {region: column("lesion_pixels", region) for region in regions.of_sides(record["sides"])}
    return counts | {f"test_with_{region or 'lesion'}": sum(number > 0 for number in test[name]) for region, name in pixels.items() if name in test}


def _predictions(settings: UtilityStage, records: list[Record]) -> str:
    """A line for each test image of each trial."""
    classes = records[0]["classes"]
    segmented = [column(name, region) for region in regions.of_sides(records[0]["sides"]) for name in ("lesion_pixels", "found_pixels", "dice")]
    answers = ["label", "predicted", *(f"probability_{name}" for name in classes)] if settings.task == "classification" else segmented
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "patient", "arm", "seed", *answers])
    for record in records:
        test = record["test"]
        for number, name in enumerate(test["id"]):
            answer = _classified(test, number, classes) if settings.task == "classification" else [test[column][number] for column in answers]
            writer.writerow([name, test["patient"][number], record["arm"], record["seed"], *answer])
    return text.getvalue()


def _classified(test: dict[str, Any], number: int, classes: list[str]) -> list[Any]:
    probabilities = test["probabilities"][number]
    return [classes[test["label"][number]], classes[int(np.argmax(probabilities))], *(round(value, 6) if math.isfinite(value) else "" for value in probabilities)]
