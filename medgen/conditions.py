"""What images are made from: slices of a split of the real data, collected masks, or captions alone; and of which class each is. Called by generate.py."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from medgen import collected
from medgen.cardiac.rasterise import Grid
from medgen.data.image_files import read_slice
from medgen.data.store import SliceStore
from medgen.errors import InputError
from medgen.models.settings import FamilyConfig
from medgen.spec_data import SPLITS, DataSpec
from medgen.spec_stages import GenerateStage
from medgen.task import Work
from medgen.training import load_channel

SPACING_TOLERANCE = 0.02  # beyond those that were trained on


@dataclass(frozen=True)
class Condition:
    """What an image is made from. channels: name -> float32 [H, W] as in a Batch; affine: 4 x 4, (row, column, 0) to millimetres, None of no slice.

    caption: what the model is told, None for nothing; label: the class of the slice, of models that are told captions instead of it.

    sizes_mm: float32 [2, 2], spacing and field of view, each of rows and columns; inside: first and last + 1 of the rows, then of the columns,
    that are no padding. Both of real slices only."""

    id: str
    kind: str  # "real", "synthetic" or, of captions alone, "none"
    channels: dict[str, np.ndarray]
    affine: np.ndarray | None
    sizes_mm: np.ndarray | None = None
    inside: tuple[int, int, int, int] | None = None
    caption: str | None = None
    label: str | None = None

    @property
    def mask(self) -> np.ndarray | None:
        """That the image is drawn on; None where there is none, or nobody has drawn it."""
        known = "seg" in self.channels and ("masked" not in self.channels or bool(self.channels["masked"].any()))
        return self.channels["seg"] if known else None


@dataclass(frozen=True)
class Classes:
    """Of which class each image is. `ends`: the number of the first image after each class; images are sorted by class."""

    names: tuple[str, ...]
    ends: tuple[int, ...]

    def of(self, index: int) -> int:
        return bisect_right(self.ends, index)

    def place(self, index: int) -> tuple[int, int]:
        """Which of the images of its class it is, and how many those are."""
        first = ([0, *self.ends])[self.of(index)]
        return index - first, self.ends[self.of(index)] - first


def classes_of(settings: GenerateStage, store: SliceStore, config: FamilyConfig) -> Classes | None:
    """Of models that are told it; of those that are told captions, where per_class chooses whose. Raises InputError if per_class does not count the classes of the data."""
    if not config.uses_labels and settings.per_class is None:
        return None
    names = store.classes
    counts = settings.per_class or [_share(number, settings.count, len(names)) for number in range(len(names))]
    if len(counts) != len(names):
        raise InputError(f"per_class: {counts} counts {len(counts)} classes, the data have {len(names)}: {', '.join(names)}")
    return Classes(names, tuple(accumulate(counts)))


def _share(number: int, count: int, shares: int) -> int:
    """Of `count` things in shares as equal as can be, the larger ones first."""
    return count // shares + (number < count % shares)


def require_possible(settings: GenerateStage, config: FamilyConfig, store: SliceStore) -> None:
    """Raises InputError for what these data, and a model trained on them, cannot give; no model is needed, so that it is known before any is trained."""
    classes = classes_of(settings, store, config)
    if settings.spacing is not None:
        _require_trained_spacing(settings.spacing, config, store)
    types = sorted(set(store.rows["label"])) if settings.export and classes is None else []
    if len(types) > 1:
        raise InputError(f"export: the data are {' and '.join(types)} and the model is not told which, so that an image has no unit; train with told: [kind], or with data.types: [{types[0]}]")
    if settings.condition in SPLITS:
        _usable(settings, config, store, store.select(settings.condition))
    if classes is not None:
        _require_trained_classes(classes, store)
    if settings.condition in SPLITS and classes is not None:
        own = set(store.rows["label"].to_numpy()[store.select(settings.condition)])
        for name, count in zip(classes.names, np.diff([0, *classes.ends]), strict=True):
            if count and name not in own:
                raise InputError(f"condition: {settings.condition}: that split has no image of the class {name} whose mask could be drawn on; write per_class with 0 for it, or another split")


def _require_trained_classes(classes: Classes, store: SliceStore) -> None:
    """A class that other splits alone have: images of it would be of another one, and bear its name."""
    seen = set(store.rows["label"].to_numpy()[store.select("train")])
    for name, count in zip(classes.names, np.diff([0, *classes.ends]), strict=True):
        if count and name not in seen:
            raise InputError(f"{count} images of the class {name} are asked for, and no training image is of it; write per_class with 0 for it, or splits that give it some")


def _require_trained_spacing(wanted_mm: tuple[float, float], config: FamilyConfig, store: SliceStore) -> None:
    """A spacing beyond all that the model has seen: it would draw what it knows, and say another size."""
    rows = store.select("train")
    own = store.rows[["spacing_y_mm", "spacing_x_mm"]].to_numpy(dtype=float)[rows]
    low, high = config.respaces.factors if config.respaces is not None else (1.0, 1.0)
    finest, coarsest = own.min() * min(1.0, low), own.max() * max(1.0, high)
    if not all(finest * (1 - SPACING_TOLERANCE) <= step <= coarsest * (1 + SPACING_TOLERANCE) for step in wanted_mm):
        raise InputError(f"spacing_mm: {wanted_mm[0]:g} x {wanted_mm[1]:g} mm is beyond {finest:.3g} to {coarsest:.3g} mm, which the model is trained on; write one of those, or train with wider respacing.factors")


def conditions_of(
    work: Work, settings: GenerateStage, data: DataSpec, config: FamilyConfig, store: SliceStore, indices: range, classes: Classes | None
) -> dict[int, Condition]:
    """What these images are made from: slices of a split of the real data, spread evenly, of each image's own class; collected masks, one each; captions."""
    if settings.condition is None:
        return {index: _of_caption(settings, config.condition_channels, store.size, index) for index in indices} if config.uses_captions else {}
    if settings.condition in SPLITS:
        rows = _usable(settings, config, store, store.select(settings.condition, data.positive_only))
        chosen = {index: _row_of(index, settings, store, rows, classes) for index in indices}
        found = {index: _real_condition(store, config.condition_channels, row, settings.spacing) for index, row in chosen.items()}
        return {index: _as_told(found[index], settings, store, row, index) for index, row in chosen.items()} if config.uses_captions else found
    with collected.made_again_if_damaged(work.run, settings.condition):
        dataset = work.run.dataset(settings.condition)
        table, _ = collected.read(dataset)
        return {number: _collected_mask(dataset, table.iloc[number]) for number in indices}


def _usable(settings: GenerateStage, config: FamilyConfig, store: SliceStore, rows: np.ndarray) -> np.ndarray:
    """The slices of a split whose masks are known, where the model is told masks. Raises InputError if there are none."""
    if "masked" not in config.condition_channels or "mask" in settings.without:
        return rows
    known = rows[store.mask_known(rows)]
    if not len(known):
        raise InputError(f"condition: {settings.condition}: no image of that split has a mask to draw on; write without: [mask] for images by their captions alone, or another split")
    return known


def _of_caption(settings: GenerateStage, names: tuple[str, ...], size: int, index: int) -> Condition:
    assert settings.captions is not None, "the spec wants condition or captions"
    nothing = {name: np.zeros((size, size), np.float32) for name in names}
    return Condition("", "none", nothing, None, caption=settings.captions[index % len(settings.captions)])


def _as_told(of_slice: Condition, settings: GenerateStage, store: SliceStore, row: int, index: int) -> Condition:
    """A slice's caption and mask, or another caption, or without one of them."""
    caption = None if "caption" in settings.without else settings.captions[index % len(settings.captions)] if settings.captions else store.captions(np.array([row]))[0]
    label = store.rows["label"][row] if settings.captions is None else None  # another caption may say another class
    channels = of_slice.channels
    if "mask" in settings.without:
        channels = {name: np.zeros_like(channel) if name in ("seg", "masked") else channel for name, channel in channels.items()}
    return replace(of_slice, channels=channels, caption=caption, label=label)


def _row_of(index: int, settings: GenerateStage, store: SliceStore, rows: np.ndarray, classes: Classes | None) -> int:
    """Of the image's class; `require_possible` has seen that there are some."""
    if classes is None:
        return int(rows[_spread(index, settings.count, len(rows))])
    own = rows[store.rows["label"].to_numpy()[rows] == classes.names[classes.of(index)]]
    return int(own[_spread(*classes.place(index), len(own))])


def _real_condition(store: SliceStore, names: tuple[str, ...], row: int, spacing_mm: tuple[float, float] | None) -> Condition:
    """`spacing_mm`: None for that of the slice; of data that keep contours alone."""
    name = str(store.aliases[row])
    if store.maps is None or spacing_mm is None:
        channels = {name: load_channel(store, name, np.array([row]), torch.device("cpu"))[0, 0].numpy() for name in names}
        inside = (0, store.size, 0, store.size) if store.maps is None else store.maps.canvas(row).inside
        return Condition(name, "real", channels, store.affine(row), store.sizes_mm(np.array([row]))[0], inside)
    canvas, own = store.maps.canvas(row, spacing_mm), store.maps.canvas(row)
    drawn = {"seg": store.maps.labels(row, canvas), "valid": canvas.valid()}
    sizes_mm = np.array([canvas.grid.spacing_mm, canvas.field_mm], dtype=np.float32)
    return Condition(name, "real", {name: drawn[name].astype(np.float32) for name in names}, moved_affine(store.affine(row), own.grid, canvas.grid), sizes_mm, canvas.inside)


def moved_affine(affine: np.ndarray, own: Grid, wanted: Grid) -> np.ndarray:
    """That of another grid in the plane of an image, from the affine of its own grid."""
    first = [(new - old) / step for new, old, step in zip(wanted.origin_mm, own.origin_mm, own.spacing_mm, strict=True)]
    factors = [new / old for new, old in zip(wanted.spacing_mm, own.spacing_mm, strict=True)]
    moved = affine.copy()
    moved[:3, 3] = affine[:3, :2] @ first + affine[:3, 3]
    moved[:3, :2] = affine[:3, :2] * factors
    return moved


def _spread(index: int, count: int, available: int) -> int:
    """Which of `available` conditions image `index` of `count` takes: evenly spread, or in turn if there are too few."""
    return index * available // count if count <= available else index % available


def _collected_mask(dataset: Path, row: pd.Series) -> Condition:
    found = read_slice(collected.verified_file(dataset, row, "seg"))
    spacing = [float(row["spacing_y_mm"]), float(row["spacing_x_mm"]), float(row["thickness_mm"])]
    affine = found.affine if found.affine is not None else np.diag([*spacing, 1.0])
    return Condition(row["id"], "synthetic", {"seg": (found.array > 0.5).astype(np.float32)}, affine)
