"""What a network learns and is asked: the class of an image, or where the lesion is. Used by the utility stage, structure.py and fitting.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from medgen import rng
from medgen.evaluate import masks
from medgen.spec_utility import UtilityStage
from medgen.utility import augment, networks
from medgen.utility.arms import Pool, RealClasses, RealMasks, TrainingSet
from medgen.utility.sides import Sides

ASKED_AT_ONCE = 64
THRESHOLD = 0.5  # of the probability; fixed, so that nothing is tuned on what is tested


@dataclass
class Learner:
    """A network, what it is trained on, and by which real slices its best step is chosen (none: the last step is taken)."""

    network: nn.Module
    training_set: TrainingSet
    validation: Pool
    sides: Sides
    seed: int
    augmented: bool

    def batch(self, positions: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Images and targets at these positions of the training."""
        members = rng.sample_order(positions, len(self.training_set), self.seed, "order")
        images, targets = (torch.from_numpy(np.ascontiguousarray(array)) for array in self.training_set.pick(members))
        if self.augmented:
            images, moved = augment.classical(images, targets if targets.ndim == 4 else None, self.seed, "augment", positions)
            targets = targets if moved is None else moved
        return images.to(device), targets.to(device)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def probabilities(self, outputs: Tensor) -> Tensor:
        raise NotImplementedError

    def quality(self, network: nn.Module, device: torch.device) -> float:
        """What the best step is chosen by, higher is better."""
        raise NotImplementedError

    def answers(self, network: nn.Module, rows: np.ndarray, device: torch.device) -> dict[str, list[Any]]:
        """What it says of real slices, a column per kind of answer."""
        raise NotImplementedError

    def ask(self, network: nn.Module, pool: Pool, device: torch.device) -> np.ndarray:
        """float32 [n, classes], or [n, 1, H, W]: probabilities."""
        network.eval()
        parts = []
        with torch.no_grad():
            for first in range(0, len(pool), ASKED_AT_ONCE):
                images = torch.from_numpy(pool.images(np.arange(first, min(first + ASKED_AT_ONCE, len(pool)))))
                parts.append(self.probabilities(network(images.to(device))).float().cpu().numpy())
        return np.concatenate(parts)


@dataclass
class Classifier(Learner):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets)

    def probabilities(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(dim=1)

    def quality(self, network: nn.Module, device: torch.device) -> float:
        """Balanced accuracy, over the classes that the validation slices have."""
        labels = self.validation.targets(np.arange(len(self.validation)))
        right = self.ask(network, self.validation, device).argmax(axis=1) == labels
        return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))

    def answers(self, network: nn.Module, rows: np.ndarray, device: torch.device) -> dict[str, list[Any]]:
        pool = RealClasses(self.sides.store, self.sides.channels, rows)
        return {"label": pool.targets(np.arange(len(rows))).tolist(), "probabilities": self.ask(network, pool, device).tolist()}


@dataclass
class Segmenter(Learner):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of every pixel, and one minus the Dice of the whole batch: slices without a lesion have none of their own."""
        chance = outputs.sigmoid()
        overlap = (2 * (chance * targets).sum() + 1) / (chance.sum() + targets.sum() + 1)
        return functional.binary_cross_entropy_with_logits(outputs, targets) + 1 - overlap

    def probabilities(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()

    def found(self, network: nn.Module, pool: Pool, device: torch.device) -> np.ndarray:
        """bool [n, H, W]"""
        return self.ask(network, pool, device)[:, 0] > THRESHOLD

    def quality(self, network: nn.Module, device: torch.device) -> float:
        """Dice over all pixels of all validation slices together: what is found where nothing is counts as well."""
        truth = self.validation.targets(np.arange(len(self.validation)))[:, 0] > 0
        found = self.found(network, self.validation, device)
        return float(2 * (found & truth).sum() / max(1, found.sum() + truth.sum()))

    def answers(self, network: nn.Module, rows: np.ndarray, device: torch.device) -> dict[str, list[Any]]:
        found = self.found(network, RealMasks(self.sides.store, self.sides.channels, rows), device)
        truth = self.sides.store.masks(rows) > 0
        return {"lesion_pixels": truth.sum(axis=(1, 2)).tolist(), "found_pixels": found.sum(axis=(1, 2)).tolist(), "dice": masks.dice(found, truth).tolist()}


def of_task(settings: UtilityStage, sides: Sides, training_set: TrainingSet, validation_rows: np.ndarray, seed: int, augmented: bool) -> Learner:
    if settings.task == "segmentation":
        assert settings.channels is not None
        return segmenter(settings.channels, sides, training_set, validation_rows, seed, augmented)
    assert settings.network is not None
    network = networks.resnet(settings.network, len(sides.channels), len(sides.store.classes), seed)
    return Classifier(network, training_set, RealClasses(sides.store, sides.channels, validation_rows), sides, seed, augmented)


def segmenter(channels: list[int], sides: Sides, training_set: TrainingSet, validation_rows: np.ndarray, seed: int, augmented: bool) -> Segmenter:
    network = networks.unet(len(sides.channels), channels, seed)
    return Segmenter(network, training_set, RealMasks(sides.store, sides.channels, validation_rows), sides, seed, augmented)
