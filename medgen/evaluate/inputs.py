"""The two sides of an evaluation: synthetic images, and the real ones that they are compared with.

Used by every metric and by the report's pictures. A run brings a collected dataset and its slice store; folders.py brings any two folders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from medgen import collected, rng
from medgen.collected import SHA_SUFFIX
from medgen.data import image_files
from medgen.data.image_looks import ROUNDING
from medgen.errors import InputError, MedgenError
from medgen.evaluate import masks
from medgen.plan import Plan
from medgen.rundir import RunDir
from medgen.spec_evaluate import Grouping, Measures

MASK = "seg"
COLOURS = ("red", "green", "blue")
SPACING = ("spacing_y_mm", "spacing_x_mm")  # columns: between rows, between columns
MASK_BLOCK = 512
MOST_IMAGES = 2048  # per side; more cost time and memory and no longer move the numbers


class RealImages(Protocol):
    """The real side, as data.store.SliceStore has it: `rows` has id, patient, split, slice, label, mask_pixels and spacing of each image."""

    @property
    def rows(self) -> pd.DataFrame: ...
    @property
    def channels(self) -> list[str]: ...
    @property
    def size(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def has_masks(self) -> bool: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def regions(self) -> tuple[str, ...]:
        """What the labels 1, 2, ... of the masks mean."""
        ...

    @property
    def aliases(self) -> np.ndarray: ...
    def select(self, split: str, positive_only: bool = False) -> np.ndarray: ...
    def images(self, channel: str, rows: np.ndarray) -> np.ndarray: ...
    def masks(self, rows: np.ndarray) -> np.ndarray: ...
    def contents(self, channel: str, rows: np.ndarray) -> list[str]: ...


class SyntheticImages(Protocol):
    """The synthetic side, as `Dataset` has it: `index` has id, label (of sets made by class), condition_kind and condition of each image."""

    @property
    def name(self) -> str: ...
    @property
    def index(self) -> pd.DataFrame: ...
    @property
    def files(self) -> list[str]: ...
    @property
    def outputs(self) -> list[str]: ...
    @property
    def tells_regions(self) -> bool:
        """True if its masks have the labels of the data, False if they say where something is, and nothing more."""
        ...

    @property
    def image_channels(self) -> list[str]: ...
    @property
    def fingerprint(self) -> str: ...
    def read(self, channel: str, rows: np.ndarray) -> np.ndarray: ...
    def contents(self, channel: str, rows: np.ndarray) -> list[str]: ...


@dataclass(frozen=True)
class Dataset:
    """A collected dataset. `outputs` are the channels that the model drew; a mask it was given is not among them."""

    name: str
    folder: Path
    index: pd.DataFrame  # every column as text, one row per sample
    files: list[str]  # channels with a file: images and perhaps the mask
    outputs: list[str]
    index_sha256: str
    data_fingerprint: str  # of the data that the model was trained on

    @property
    def image_channels(self) -> list[str]:
        return [channel for channel in self.outputs if channel != MASK]

    @property
    def tells_regions(self) -> bool:
        return True

    @property
    def fingerprint(self) -> str:
        return self.index_sha256

    def contents(self, channel: str, rows: np.ndarray) -> list[str]:
        """What tells the content of each image, for the cache of features."""
        return [str(digest) for digest in self.index[channel + SHA_SUFFIX].to_numpy()[rows]]

    def read(self, channel: str, rows: np.ndarray) -> np.ndarray:
        """[n,H,W]: float32 in [0,1], or uint8 for the mask: the number of each pixel's region, 0 and 1 where there is one region. Raises MedgenError naming a file that does not verify."""
        arrays = [self._read_one(channel, int(row)) for row in rows]
        if len({array.shape for array in arrays}) > 1:
            raise MedgenError(f"{self.folder}: the {channel} images differ in size; delete the dataset and collect again")
        return np.stack(arrays)

    def _read_one(self, channel: str, row: int) -> np.ndarray:
        record = self.index.iloc[row]
        path = collected.verified_file(self.folder, record, channel)
        array = image_files.read_slice(path).array
        if channel == MASK:
            return array if array.dtype == np.uint8 else (array > 0).astype(np.uint8)
        low, high = float(array.min()), float(array.max())
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):
            raise MedgenError(f"sample {record['id']}: {path} holds values from {low:g} to {high:g}; expected 0 to 1")
        return np.clip(array, 0, 1).astype(np.float32)


def read_dataset(run: RunDir, stage: str) -> Dataset:
    """The collected dataset of a generate stage. Raises MedgenError if it is not there, is not what was collected, or has no samples."""
    folder = run.dataset(stage)
    index, manifest = collected.read(folder)
    channels = collected.channels(index)
    if len(index) == 0 or not channels:
        raise MedgenError(f"{folder / collected.INDEX}: no samples in it; collect {stage} again")
    outputs = [name for name in channels if name != MASK or (index["condition_kind"] == "none").all()]
    return Dataset(stage, folder, index, channels, outputs, manifest["index_sha256"], manifest["data_fingerprint"])


def read_matching_dataset(run: RunDir, stage: str, store: RealImages) -> Dataset:
    """The collected dataset of a generate stage. Raises InputError if the data are not those that it was made from, MedgenError if it does not fit them."""
    dataset = read_dataset(run, stage)
    now = run.data_mark(store.fingerprint)
    if dataset.data_fingerprint != now:
        raise InputError(
            f"the data have changed since {stage} was made from them (then {dataset.data_fingerprint[:12]}, now {now[:12]}): "
            "what was trained on may now be called test; bring the data back, or give the job another name to start anew"
        )
    height, width = dataset.read(dataset.outputs[0], np.array([0])).shape[1:]
    if (height, width) != (store.size, store.size):
        raise MedgenError(f"{stage}: images of {height}x{width}, but the data have {store.size}x{store.size} pixels")
    return dataset


@dataclass(frozen=True)
class Pairing:
    """What the partner of a synthetic image is, and why there may be none, in words."""

    partner: str
    missing: str


RUN_PAIRING = Pairing(
    "real slice whose mask it was given",
    "the conditions were not real slices, so no real partner exists; condition the generate stage on a real split for pairs",
)


@dataclass(frozen=True)
class Sides:
    """What is compared: rows of the dataset with rows of the slice store. `partners` only where every condition was real."""

    dataset: SyntheticImages
    store: RealImages
    seed: int
    against: str
    positive_only: bool
    chosen: np.ndarray  # rows of the dataset index, at most 2048, in order
    partners: np.ndarray | None  # store row whose mask each chosen sample was given
    reference: np.ndarray  # store rows of the `against` split, at most 2048
    train: np.ndarray  # store rows of what the model was trained on, all of them
    seen: tuple[str, ...] = ("train",)  # the splits that those are
    pairing: Pairing = RUN_PAIRING
    by: Grouping | None = None  # None: by class where the images were made by class

    def patients(self, rows: np.ndarray) -> np.ndarray:
        return self.store.rows["patient"].to_numpy()[rows]

    def held_out(self) -> np.ndarray:
        """Store rows of the patients that the model has not seen, with a lesion only where the comparison is; may be empty."""
        rows = self.store.rows
        wanted = ~rows["split"].isin(self.seen).to_numpy()
        if self.positive_only:
            wanted = wanted & (rows["mask_pixels"] > 0).to_numpy()
        return np.flatnonzero(wanted)

    def widened(self, most: int) -> Sides:
        """The same with up to `most` rows a side: features of many more images than pictures fit into memory."""
        everything = np.arange(len(self.dataset.index))
        if self.positive_only and len(everything) > len(self.chosen):
            shown = synthetic_masks(self.dataset, everything, self.store)
            everything = everything if shown is None else everything[shown.any(axis=(1, 2))]
        chosen = some_rows(everything, self.seed, "evaluate_synthetic", most)
        reference = some_rows(self.store.select(self.against, self.positive_only), self.seed, "evaluate_real", most)
        return replace(self, chosen=chosen, partners=partner_rows(self.dataset, chosen, self.store), reference=reference)

    @property
    def positions(self) -> np.ndarray:
        """0 to n-1: of everything in `chosen`."""
        return np.arange(len(self.chosen))

    @property
    def pictures(self) -> dict[str, tuple[str, ...]]:
        """What a network for pictures sees, by name: each image channel alone, red, green and blue together."""
        channels = tuple(self.dataset.image_channels)
        return {"colour": COLOURS} if set(channels) == set(COLOURS) else {channel: (channel,) for channel in channels}

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The groups that are also compared alone, in their order: classes, or sizes of lesions; empty if there are none."""
        if self.by == "lesion_size":
            return masks.BINS
        return self.store.classes if "label" in self.dataset.index.columns else ()

    def synthetic_labels(self) -> np.ndarray:
        """The group of each of `chosen`."""
        return self._synthetic_bins if self.by == "lesion_size" else self.dataset.index["label"].to_numpy()[self.chosen]

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """The groups of real slices."""
        return self._real_bins[rows] if self.by == "lesion_size" else self.store.rows["label"].to_numpy()[rows]

    @cached_property
    def _real_bins(self) -> np.ndarray:
        """Of every slice of the store, those without a lesion in none."""
        found = np.full(len(self.store.rows), masks.NO_LESION, dtype=object)
        positive = np.flatnonzero(self.store.rows["mask_pixels"].to_numpy() > 0)
        for start in range(0, len(positive), MASK_BLOCK):
            rows = positive[start : start + MASK_BLOCK]
            found[rows] = masks.lesion_bins(self.store.masks(rows).astype(bool), spacing_mm(self.store.rows, rows))
        return found

    @cached_property
    def _synthetic_bins(self) -> np.ndarray:
        if self.partners is not None and MASK not in self.dataset.files:
            return self._real_bins[self.partners]
        shown = synthetic_masks(self.dataset, self.chosen, self.store)
        assert shown is not None  # sides_of refuses lesions without masks
        return masks.lesion_bins(shown.astype(bool), spacing_mm(self.dataset.index, self.chosen))

    def synthetic_groups(self) -> np.ndarray:
        """Names [n] of what varies independently: patients of the conditions, else single images."""
        if self.partners is not None:
            return self.patients(self.partners)
        # by number, so that names decide nothing; a patient may be called like one of our numbers
        return np.array([f"synthetic {row:09d}" for row in self.chosen])


def choose_sides(dataset: Dataset, plan: Plan, against: str, store: RealImages, measures: Measures) -> Sides:
    """The sides of an evaluate stage."""
    return sides_of(dataset, store, plan.seed, against, plan.trained_on(dataset.name), measures)


def sides_of(
    dataset: SyntheticImages, store: RealImages, seed: int, against: str, seen: tuple[str, ...], measures: Measures, pairing: Pairing = RUN_PAIRING
) -> Sides:
    """Match the synthetic set with real slices: the same size of set, and slices with a lesion only where that is asked for, or every synthetic one has one.

    Raises InputError if lesions are asked for and there are no masks to see them by, or none is left, or the masks hold regions; or classes, and there are none."""
    if len(store.regions) > 1 and measures.problem_of_regions is not None:
        raise InputError(measures.problem_of_regions)
    if measures.by == "class" and "label" not in dataset.index.columns:
        raise InputError(f"by: class: the images of {dataset.name} are of no class; remove it")
    chosen = some_rows(np.arange(len(dataset.index)), seed, "evaluate_synthetic")
    shown = synthetic_masks(dataset, chosen, store)
    positive_only = measures.positive_only
    if len(store.regions) > 1:
        positive_only = False  # every image has its regions, and none is a lesion
    elif positive_only is None and measures.by != "lesion_size":
        positive_only = shown is not None and bool(shown.any(axis=(1, 2)).all())
    elif positive_only is None or positive_only:
        chosen, positive_only = chosen[_with_lesion(dataset, shown)], True
    sides = Sides(
        dataset=dataset, store=store, seed=seed, against=against, positive_only=positive_only, chosen=chosen,
        partners=partner_rows(dataset, chosen, store),
        reference=some_rows(store.select(against, positive_only), seed, "evaluate_real"),
        train=_rows_of(store, seen, positive_only), seen=seen, pairing=pairing, by=measures.by,
    )
    if measures.by == "lesion_size" and not all({*SPACING} <= set(table.columns) for table in (store.rows, dataset.index)):
        raise InputError("by: lesion_size: pictures do not say how large a pixel is; NIfTI files do")
    return sides


def spacing_mm(table: pd.DataFrame, rows: np.ndarray) -> np.ndarray:
    """Between rows and between columns, [n, 2]."""
    return table[list(SPACING)].to_numpy(dtype=float)[rows]


def _with_lesion(dataset: SyntheticImages, shown: np.ndarray | None) -> np.ndarray:
    if shown is None:
        raise InputError(f"positive_only: {dataset.name} has no masks that would tell which images show a lesion; remove it")
    found = np.asarray(shown.any(axis=(1, 2)))
    if not found.any():
        raise InputError(f"positive_only: no mask of {dataset.name} shows a lesion; remove it")
    return found


def _rows_of(store: RealImages, splits: tuple[str, ...], positive_only: bool) -> np.ndarray:
    """Of all these splits together; of none, no rows."""
    found: list[np.ndarray] = [store.select(split, positive_only) for split in splits]
    return np.sort(np.concatenate(found)) if found else np.array([], dtype=np.int64)


def some_rows(rows: np.ndarray, seed: int, stream: str, most: int = MOST_IMAGES) -> np.ndarray:
    """At most `most` of `rows`, drawn without preference, in their order."""
    if len(rows) <= most:
        return rows
    return np.sort(rows[rng.permutation(len(rows), seed, stream)[:most]])


def partner_rows(dataset: SyntheticImages, chosen: np.ndarray, store: RealImages) -> np.ndarray | None:
    """The store row of each sample's real condition, or None if the conditions were not real slices."""
    records = dataset.index.iloc[chosen]
    if not (records["condition_kind"] == "real").all():
        return None
    row_of = {str(name): number for number, name in enumerate(store.aliases)}
    unknown = [name for name in records["condition"] if name not in row_of]
    if unknown:
        raise MedgenError(f"{dataset.name}: the condition {unknown[0]} is no slice of the data; the data have changed since it was generated")
    return np.array([row_of[name] for name in records["condition"]], dtype=np.int64)


def synthetic_masks(dataset: SyntheticImages, chosen: np.ndarray, store: RealImages) -> np.ndarray | None:
    """The mask that each sample shows or was given, uint8 [n,H,W]; None for models without masks."""
    if MASK in dataset.files:
        return dataset.read(MASK, chosen)
    partners = partner_rows(dataset, chosen, store)
    return store.masks(partners) if partners is not None and store.has_masks else None
