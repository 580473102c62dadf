"""The evaluate stage: read both sides, compute every metric that applies beside its floor, write metrics.json. Called by cli.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medgen import collected, files, rng
from medgen import plan as plans
from medgen.csv_files import write_rows
from medgen.data.store import open_store
from medgen.evaluate import (
    auc,
    by_class,
    curves,
    distributions,
    feature_scores,
    mask_scores,
    paired,
    perceptual,
    privacy,
    regions,
    registration,
    scores,
)
from medgen.evaluate.features import Bench, Progress, Say
from medgen.evaluate.inputs import MASK, Sides, choose_sides, read_matching_dataset
from medgen.evaluate.privacy import Origin
from medgen.evaluate.scores import Score, ScoresOrReason
from medgen.plan import Plan
from medgen.rundir import RunDir
from medgen.spec_data import DataSpec
from medgen.spec_evaluate import FEATURE_METRICS, MASK_METRICS, PERCEPTUAL_METRICS, EvaluateStage, Measures

PAIRED = ("mae", "mse", "psnr", "ssim", "ms_ssim")
SHOWN = 48  # samples whose ids are kept for the report's gallery
SHOWN_PAIRS = 12


def evaluate_run(run: RunDir, stage_name: str, cache_root: Path, say: Say, progress: Progress) -> list[Path]:
    """Score one generated dataset and write `metrics.json` and `suspects.csv`; returns the files written. `progress` gets step, total, unit.

    Raises MedgenError if the dataset is missing or does not verify, InputError if the real data are wrong."""
    plan = plans.read(run)
    stage = EvaluateStage.model_validate(plan.only_stage("evaluate", stage_name).settings)
    progress(0, len(stage.metrics), "metrics")
    with collected.made_again_if_damaged(run, stage.of):
        sides = sides_of_stage(run, plan, stage, cache_root, say)
        computed = {"auc": auc.auc_scores(run, plan, sides)} if "auc" in stage.metrics else {}
        evaluated = evaluate_sides(sides, stage, computed, Origin(run, plan), Bench(cache_root, say, progress))
    record = evaluated.record | {
        "stage": stage_name,
        "generation": generation_facts(run, plan, sides.dataset.name),
        "inputs": {
            "dataset": str((run.dataset(stage.of) / collected.INDEX).relative_to(run.root)),
            "dataset_index_sha256": sides.dataset.fingerprint,
            "data_fingerprint": run.data_mark(sides.store.fingerprint),
        },
    }
    write_rows(run.suspects(stage_name), privacy.SUSPECT_COLUMNS, evaluated.suspects)
    files.write_json(run.metrics(stage_name), record)
    return [run.metrics(stage_name), run.suspects(stage_name)]


def sides_of_stage(run: RunDir, plan: Plan, stage: EvaluateStage, cache_root: Path, say: Say) -> Sides:
    """What an evaluate stage compares. Raises InputError if the data are not those that the images were made from."""
    store = open_store(DataSpec.model_validate(plan.data), plan.seed, cache_root, say)
    return choose_sides(read_matching_dataset(run, stage.of, store), plan, stage.against, store, stage)


@dataclass(frozen=True)
class Evaluated:
    """`record`: what metrics.json holds, but for where the images come from. `suspects`: the lines of suspects.csv."""

    record: dict[str, Any]
    suspects: list[dict[str, Any]]


def evaluate_sides(sides: Sides, measures: Measures, computed: dict[str, ScoresOrReason], origin: Origin | None, bench: Bench) -> Evaluated:
    """Everything that is asked for. `computed`: scores that were computed elsewhere, by metric; `origin`: the run that drew the images, where there is one."""
    bench.say(f"{len(sides.chosen)} synthetic samples of {sides.dataset.name} against {len(sides.reference)} real slices "
              f"({sides.against}{', with a lesion' if sides.positive_only else ''})")  # fmt: skip
    images = {channel: sides.dataset.read(channel, sides.chosen) for channel in sides.dataset.outputs}
    of_features = [name for name in FEATURE_METRICS if name in measures.metrics]
    if of_features:
        computed = computed | feature_scores.feature_scores(sides, of_features, measures, bench)
    of_lpips = [name for name in PERCEPTUAL_METRICS if name in measures.metrics]
    if of_lpips:
        computed = computed | perceptual.perceptual_scores(sides, of_lpips, measures)
    of_masks = [name for name in MASK_METRICS if name in measures.metrics]
    if of_masks:
        computed = computed | mask_scores.mask_scores(sides, of_masks)
    found, skipped, details = _all_scores(sides, images, measures.metrics, computed, bench)
    examined = privacy.examine(sides, measures, origin, bench)
    record = {
        "schema": scores.METRICS_SCHEMA,
        "of": sides.dataset.name,
        "against": sides.against,
        "positive_only": sides.positive_only,
        "scores": scores.to_json(found + examined.scores),
        "skipped": skipped | examined.skipped,
        "counts": _counts(sides),
        "details": details | {"copies": examined.nearest},
        "privacy": examined.record,
        "samples": _samples_to_show(sides),
    }
    return Evaluated(record, examined.suspects)


def _all_scores(
    sides: Sides, images: dict[str, np.ndarray], names: list[str], computed: dict[str, ScoresOrReason], bench: Bench
) -> tuple[list[Score], dict[str, str], dict[str, Any]]:
    """Scores, the reason for every metric that was asked for and does not apply, and what the charts need."""
    found: list[Score] = []
    skipped: dict[str, str] = {}
    details: dict[str, Any] = {"swd_levels": {}, "curves": {}, "regions": []}
    of_images: dict[str, Callable[[], ScoresOrReason]] = {
        **{name: partial(paired.scores_of, name, sides, images) for name in PAIRED},
        "swd": partial(distributions.sliced_scores, sides, images, details["swd_levels"]),
        "psd": partial(distributions.spectrum_scores, sides, images),
        "ssim_pairs": partial(by_class.pair_scores, sides, images),
        "registration": partial(registration.registration_scores, sides, images),
        "regions": partial(regions.region_scores, sides, images, details["regions"]),
        "ms_ssim_diversity": partial(distributions.diversity_scores, sides, images),
    }
    for number, name in enumerate(names):
        new, reason = computed[name] if name in computed else of_images[name]()
        found += new
        if reason is not None:
            skipped[name] = reason
        for item in new:
            bench.say(f"{item.name}: {item.value:.4g}" + ("" if item.floor is None else f" (floor {item.floor:.4g})"))
        bench.progress(number + 1, len(names), "metrics")
    for item in details["regions"]:
        bench.say(f"regions: {item['words']}")
    details["curves"] = _curves(sides, images)
    return found, skipped, details


def _curves(sides: Sides, images: dict[str, np.ndarray]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for channel, synthetic in images.items():
        if channel == MASK:
            result[channel] = {"mask_area": curves.mask_area(sides.store.masks(sides.reference), synthetic)}
            continue
        real = sides.store.images(channel, sides.reference)
        result[channel] = {"intensity": curves.intensity(real, synthetic), "spectrum": curves.power_spectrum(real, synthetic)}
    return result


def _counts(sides: Sides) -> dict[str, int]:
    return {
        "synthetic": len(sides.dataset.index),
        "synthetic_used": len(sides.chosen),
        "real": len(sides.reference),
        "real_patients": len(np.unique(sides.patients(sides.reference))),
        "train": len(sides.train),
        "train_patients": len(np.unique(sides.patients(sides.train))),
        "pairs": 0 if sides.partners is None else len(sides.partners),
    }


def generation_facts(run: RunDir, plan: Plan, stage_name: str) -> dict[str, float]:
    """Numeric facts of the generate stage's outcomes, added up over its shards (accepted, rejected_empty, ...)."""
    total: dict[str, float] = {}
    for task in plan.stage(stage_name).tasks:
        outcome = run.read_outcome(task.stage, task.shard)
        for name, value in outcome.facts.items() if outcome is not None else ():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                total[name] = total[name] + value if name in total else value
    return total


def _samples_to_show(sides: Sides) -> dict[str, Any]:
    """Ids for the report's pictures, drawn at random from the run's seed: nobody picks the good ones."""
    order = rng.permutation(len(sides.chosen), sides.seed, "report_gallery")
    real = rng.permutation(len(sides.reference), sides.seed, "report_real")[:SHOWN]
    identifiers = sides.dataset.index["id"].to_numpy()[sides.chosen]
    store_ids = sides.store.aliases
    pairs = []
    if sides.partners is not None:
        pairs = [{"synthetic": str(identifiers[i]), "real": str(store_ids[sides.partners[i]])} for i in order[:SHOWN_PAIRS]]
    return {
        "synthetic": [str(identifiers[i]) for i in order[:SHOWN]],
        "real": [str(store_ids[sides.reference[i]]) for i in real],
        "pairs": pairs,
    }
