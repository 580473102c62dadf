"""Real slices and a collected synthetic dataset, as trials train on them. Used by arms.py, structure.py and comparison.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medgen import collected, files
from medgen.data.store import SliceStore, open_store
from medgen.errors import InputError
from medgen.evaluate.inputs import MASK, Dataset, partner_rows, read_matching_dataset, spacing_mm
from medgen.plan import Plan, collect_name
from medgen.rundir import RunDir
from medgen.spec_data import DataSpec
from medgen.task import Work
from medgen.utility import regions
from medgen.utility.regions import Region

Learns = Literal["masks", "labels"]


@dataclass(frozen=True)
class Sides:
    """`channels`: what the networks see, all image channels that the model drew. `learns`: slices without it are left out."""

    run: RunDir
    seed: int  # of the run
    store: SliceStore
    dataset: Dataset
    seen: tuple[str, ...]  # splits that the model was trained on
    learns: Learns

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(self.dataset.image_channels)

    @property
    def regions(self) -> tuple[Region, ...]:
        """What is to be found in an image: None is the only one."""
        return regions.named(self.store.regions)

    @property
    def facts(self) -> dict[str, Any]:
        """What every result says of them."""
        several = {"regions": list(self.store.regions)} if len(self.regions) > 1 else {}
        return {"channels": list(self.channels), "size": self.store.size, "data_fingerprint": self.store.fingerprint, "dataset_index_sha256": self.dataset.index_sha256, "model_saw": list(self.seen), **several}

    @property
    def identity(self) -> str:
        """Changes with the data and with the dataset."""
        return files.sha256_json(self.facts)

    def rows(self, split: str) -> np.ndarray:
        """Store rows of a split that can be learned from, or asked about. Raises InputError if it has none."""
        return rows_of(self.store, split, self.learns)

    def patient_numbers(self, rows: np.ndarray) -> np.ndarray:
        """Whose slices they are, int [n]: by number, because names are not given away."""
        names = self.store.rows["patient"].to_numpy()
        return np.searchsorted(np.unique(names), names[rows])

    def spacing_mm(self, rows: np.ndarray) -> np.ndarray:
        """[n, 2] of real slices: between rows, between columns."""
        return spacing_mm(self.store.rows, rows)

    def synthetic_spacing_mm(self, numbers: np.ndarray) -> np.ndarray:
        return spacing_mm(self.dataset.index, numbers)

    def synthetic_images(self, numbers: np.ndarray) -> np.ndarray:
        """float32 [n, channels, H, W] in [0, 1] of rows of the index."""
        return np.stack([self._read(channel, numbers) for channel in self.channels], axis=1)

    def synthetic_masks(self, numbers: np.ndarray) -> np.ndarray:
        """uint8 [n, H, W], the number of each pixel's region: what each image was drawn on, or with."""
        return self._read(MASK, numbers)

    def _read(self, channel: str, numbers: np.ndarray) -> np.ndarray:
        with collected.made_again_if_damaged(self.run, self.dataset.name):
            return self.dataset.read(channel, numbers)

    def synthetic_labels(self, numbers: np.ndarray) -> np.ndarray:
        """int64 [n]: the number of the class that each image was drawn as."""
        classes = self.store.classes
        return np.array([classes.index(name) for name in self.dataset.index["label"].to_numpy()[numbers]], dtype=np.int64)

    def condition_groups(self, numbers: np.ndarray) -> np.ndarray:
        """Text [n]: the patient whose mask an image was drawn on, or the image itself where the mask was no patient's."""
        partners = partner_rows(self.dataset, numbers, self.store)
        if partners is not None:
            return np.array([f"patient {number}" for number in self.patient_numbers(partners)])
        return np.array([f"image {name}" for name in self.dataset.index["id"].to_numpy()[numbers]])


def rows_of(store: SliceStore, split: str, learns: Learns) -> np.ndarray:
    """Slices of a split whose masks are known, or that have a label. Raises InputError if there are none."""
    rows = store.select(split)
    usable = rows[store.mask_known(rows) if learns == "masks" else store.labelled(rows)]
    if not len(usable):
        raise InputError(f"none of {len(rows)} slices of the split {split} has {'a mask' if learns == 'masks' else 'a label'} to learn from, or to be asked about")
    return usable


def open_sides(work: Work, of: str, learns: Learns) -> Sides:
    """In a trial, of a dataset that must be collected."""
    work.require(collect_name(of))
    return read_sides(work.run, work.plan, of, work.run.cache, work.say, learns)


def read_sides(run: RunDir, plan: Plan, of: str, cache_root: Path, say: Callable[[str], None], learns: Learns) -> Sides:
    """Raises MedgenError if the dataset is not what was collected, InputError if the data have changed or no longer fit it."""
    store = open_store(DataSpec.model_validate(plan.data), plan.seed, cache_root, say)
    with collected.made_again_if_damaged(run, of):
        dataset = read_matching_dataset(run, of, store)
    if not dataset.image_channels:
        raise InputError(f"{of} holds masks only; name a generate stage of images")
    return Sides(run, plan.seed, store, dataset, plan.trained_on(of), learns)
