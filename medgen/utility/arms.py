"""The arms of an experiment: which real and synthetic images a network is trained on. Called by the utility stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from medgen import rng
from medgen.data.store import SliceStore
from medgen.errors import InputError
from medgen.spec_utility import Arm, UtilityStage, synthetic_count
from medgen.utility.regions import as_channels
from medgen.utility.sides import Sides


class Pool(Protocol):
    """Images and what is to be learnt of each: float32 [n, channels, H, W] in [0, 1], and int64 [n] classes or float32 [n, regions, H, W] masks."""

    def __len__(self) -> int: ...

    def images(self, numbers: np.ndarray) -> np.ndarray: ...

    def targets(self, numbers: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class RealSlices:
    """Read from the memory map when they are needed."""

    store: SliceStore
    channels: tuple[str, ...]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, numbers: np.ndarray) -> np.ndarray:
        return np.stack([self.store.images(channel, self.rows[numbers]) for channel in self.channels], axis=1)


@dataclass(frozen=True)
class RealClasses(RealSlices):
    def targets(self, numbers: np.ndarray) -> np.ndarray:
        return self.store.labels(self.rows[numbers])


@dataclass(frozen=True)
class RealMasks(RealSlices):
    def targets(self, numbers: np.ndarray) -> np.ndarray:
        return as_channels(self.store.masks(self.rows[numbers]), len(self.store.regions)).astype(np.float32)


@dataclass(frozen=True)
class InMemory:
    """Images that were read and verified once."""

    all_images: np.ndarray
    all_targets: np.ndarray

    def __len__(self) -> int:
        return len(self.all_images)

    def images(self, numbers: np.ndarray) -> np.ndarray:
        return self.all_images[numbers]

    def targets(self, numbers: np.ndarray) -> np.ndarray:
        return self.all_targets[numbers]


@dataclass(frozen=True)
class TrainingSet:
    """One after the other: real slices by their place (some may come more than once), then synthetic images."""

    real_slices: Pool
    real_numbers: np.ndarray
    synthetic_images: Pool | None

    @property
    def real(self) -> int:
        return len(self.real_numbers)

    @property
    def synthetic(self) -> int:
        return 0 if self.synthetic_images is None else len(self.synthetic_images)

    def __len__(self) -> int:
        return self.real + self.synthetic

    def describe(self) -> str:
        again = self.real - len(np.unique(self.real_numbers))
        return f"{self.real} real{f' ({again} of them again)' if again else ''} and {self.synthetic} synthetic images"

    def pick(self, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images and targets of members 0 <= m < len, in their order."""
        parts = []
        is_real = members < self.real
        if is_real.any():
            numbers = self.real_numbers[members[is_real]]
            parts.append((self.real_slices.images(numbers), self.real_slices.targets(numbers)))
        if self.synthetic_images is not None and not is_real.all():
            numbers = members[~is_real] - self.real
            parts.append((self.synthetic_images.images(numbers), self.synthetic_images.targets(numbers)))
        back = np.argsort(np.concatenate([np.flatnonzero(is_real), np.flatnonzero(~is_real)]))
        return np.concatenate([images for images, _ in parts])[back], np.concatenate([targets for _, targets in parts])[back]


def training_set(sides: Sides, settings: UtilityStage, arm: Arm, seed_number: int) -> TrainingSet:
    """Raises InputError if there are fewer synthetic images than the largest ratio asks for: no arm is run that others lack."""
    kind = RealClasses if settings.task == "classification" else RealMasks
    real = kind(sides.store, sides.channels, sides.rows("train"))
    everyone = np.arange(len(real))
    most, shortage = synthetic_count(settings.most_ratio, len(real)), settings.shortage(len(real), len(sides.dataset.index))
    if shortage is not None:
        raise InputError(shortage)
    if arm.kind == "duplicated":
        again = rng.sample_order(range(most), len(real), sides.seed, f"utility/duplicates/{seed_number}")
        return TrainingSet(real, np.concatenate([everyone, again]), None)
    if arm.kind in ("real", "augmented"):
        return TrainingSet(real, everyone, None)
    # the same order for all ratios: a smaller set is part of a larger one
    order = rng.permutation(len(sides.dataset.index), sides.seed, "utility/synthetic", seed_number)
    numbers = np.sort(order[: most if arm.ratio is None else synthetic_count(arm.ratio, len(real))])
    targets = sides.synthetic_labels(numbers) if settings.task == "classification" else as_channels(sides.synthetic_masks(numbers), len(sides.store.regions)).astype(np.float32)
    drawn = InMemory(sides.synthetic_images(numbers), targets)
    return TrainingSet(real, everyone[:0] if arm.kind == "synthetic" else everyone, drawn)
