"""The structure stage: does a segmenter that has seen real images only find the masks in the synthetic ones? Called by task.py.

One task is one seed of the segmenter; utility/consistency.py puts them together. Parts of the training: utility/."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from medgen import rng
from medgen.evaluate import masks
from medgen.evaluate.inputs import partner_rows, some_rows
from medgen.spec_utility import StructureStage
from medgen.task import Done, Work
from medgen.utility import fitting, learners, trials
from medgen.utility.arms import InMemory, Pool, RealMasks, TrainingSet
from medgen.utility.learners import Segmenter
from medgen.utility.regions import Region, as_channels, column
from medgen.utility.sides import Sides, open_sides

Column = list[Any]
QUICK_LOOK_DEVIATIONS = 2.0  # above the mean of what is not background: bright, by a rule that is tuned on nothing


def structure(work: Work) -> Done:
    """One trial: train the segmenter on real pairs, under augmentation because a judge should be as good as it gets, then ask it about held-out real slices and about the synthetic images."""
    settings = StructureStage.model_validate(work.stage.settings)
    kept = trials.finished(work)
    if kept is not None:
        return kept
    with trials.on_its_device(work) as device:
        sides = open_sides(work, settings.of, "masks")
        train = RealMasks(sides.store, sides.channels, sides.rows("train"))
        work.say(f"{work.stage.name}: seed {work.task.shard}: {len(train)} real pairs; {settings.steps} steps of {settings.batch_size}")
        seed = rng.derive_seed(work.plan.seed, work.stage.name, work.task.shard)
        learner = learners.segmenter(settings.channels, sides, TrainingSet(train, np.arange(len(train)), None), _validation_rows(sides, settings), seed, augmented=True)
        fitted = fitting.fit(work, learner, fitting.Recipe(settings.steps, settings.batch_size, settings.lr), sides.identity, device)
        record = {
            "sides": sides.facts, "drawn_on": _drawn_on(sides),
            "seed": work.task.shard, "images": {"real": len(train)}, "chosen_step": fitted.chosen_step, "val": fitted.looks,
            "real": _real_answers(sides, settings, learner, fitted.network, device),
            "synthetic": _synthetic_answers(sides, learner, fitted.network, device),
        }  # fmt: skip
    return trials.finish(work, record, settings.steps)


def _drawn_on(sides: Sides) -> str:
    """Whose masks the images were drawn on, for the protocol."""
    rows = partner_rows(sides.dataset, np.arange(len(sides.dataset.index)), sides.store)
    if rows is None:
        return "generated masks"
    splits = np.unique(sides.store.rows["split"].to_numpy()[rows])
    return f"real masks of the {' and '.join(splits)} split" + (", which the segmenter was trained on" if "train" in splits else "")


def _validation_rows(sides: Sides, settings: StructureStage) -> np.ndarray:
    """What the best step is chosen by; nothing where that would be the ceiling's own split, or there is none: then the last step is taken."""
    has_val = (sides.store.rows["split"] == "val").any() and settings.against != "val"
    return sides.rows("val") if has_val else np.array([], dtype=int)


def _real_answers(sides: Sides, settings: StructureStage, learner: Segmenter, network: torch.nn.Module, device: torch.device) -> dict[str, Column]:
    """Of real held-out slices: the ceiling."""
    rows = some_rows(sides.rows(settings.against), sides.seed, "structure_real")
    pool = RealMasks(sides.store, sides.channels, rows)
    truth, found = as_channels(sides.store.masks(rows), len(sides.regions)), learner.found(network, pool, device)
    return {
        "id": sides.store.aliases[rows].tolist(), "group": [f"patient {number}" for number in sides.patient_numbers(rows)],
        **_agreement(found, truth, sides.spacing_mm(rows), sides.regions), **_quick_look(pool, truth),
    }  # fmt: skip


def _synthetic_answers(sides: Sides, learner: Segmenter, network: torch.nn.Module, device: torch.device) -> dict[str, Column]:
    """Of each synthetic image and the mask that it was drawn on; and of the same images and masks of others."""
    numbers = some_rows(np.arange(len(sides.dataset.index)), sides.seed, "structure_synthetic")
    truth = as_channels(sides.synthetic_masks(numbers), len(sides.regions))
    pool = InMemory(sides.synthetic_images(numbers), truth)
    found, groups = learner.found(network, pool, device), sides.condition_groups(numbers)
    partners = _partners(np.any(truth, axis=1), groups, sides.seed)
    return {
        "id": sides.dataset.index["id"].to_numpy()[numbers].tolist(), "group": groups.tolist(),
        **_agreement(found, truth, sides.synthetic_spacing_mm(numbers), sides.regions), **_quick_look(pool, truth, partners),
        **{column("dice_shuffled", region): _dice_with_others(found[:, place], truth[:, place], partners) for place, region in enumerate(sides.regions)},
    }  # fmt: skip


def _partners(truth: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Whose mask each image is held against as a control, int [n]; -1 for images on empty masks, and where nobody else has another."""
    with_lesion = np.flatnonzero(truth.any(axis=(1, 2)))
    chosen = masks.strangers(groups[with_lesion], seed, "structure_control")
    partners = np.full(len(truth), -1)
    partners[with_lesion] = np.where(chosen >= 0, with_lesion[chosen], -1) if len(with_lesion) else chosen
    return partners


def _dice_with_others(found: np.ndarray, truth: np.ndarray, partners: np.ndarray) -> Column:
    """None where there is no other mask, or the other does not show the region."""
    there = (partners >= 0) & truth[partners].any(axis=(1, 2))
    return [float(value) if is_there else None for is_there, value in zip(there, masks.dice(found, truth[partners]), strict=True)]


def _agreement(found: np.ndarray, truth: np.ndarray, spacing_mm: np.ndarray, regions: tuple[Region, ...]) -> dict[str, Column]:
    """Of masks [n, regions, H, W]. Sizes are sorted into bins where the only region is a lesion; of several, pixels are counted."""
    answers: dict[str, Column] = {}
    for place, region in enumerate(regions):
        ours, theirs = found[:, place], truth[:, place]
        distances = masks.hd95_mm(ours, theirs, spacing_mm)
        size = {"bin": masks.lesion_bins(theirs, spacing_mm).tolist()} if region is None else {"pixels": theirs.sum(axis=(1, 2)).tolist()}
        columns = {
            **size, "found_pixels": ours.sum(axis=(1, 2)).tolist(), "dice": masks.dice(ours, theirs).tolist(), "iou": masks.iou(ours, theirs).tolist(),
            "hd95_mm": [float(value) if np.isfinite(value) else None for value in distances],
        }  # fmt: skip
        answers |= {column(name, region): values for name, values in columns.items()}
    return answers


def _quick_look(pool: Pool, truth: np.ndarray, partners: np.ndarray | None = None) -> dict[str, Column]:
    """Dice of what is bright, without any segmenter, in the mean over the channels. Of several regions nobody would say that the bright one is it."""
    if truth.shape[1] > 1:
        return {}
    truth = truth[:, 0]
    images = pool.images(np.arange(len(pool))).mean(axis=1)
    bright = np.stack([image > _brightness_limit(image) for image in images])
    columns = {"quick_dice": masks.dice(bright, truth).tolist()}
    return columns if partners is None else columns | {"quick_dice_shuffled": _dice_with_others(bright, truth, partners)}


def _brightness_limit(image: np.ndarray) -> float:
    inside = image[image > 0]
    return float(inside.mean() + QUICK_LOOK_DEVIATIONS * inside.std()) if len(inside) else np.inf
