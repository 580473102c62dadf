"""What a network learns and is asked: the class of an image, or where the lesion or each region is. Used by the utility stage, structure.py and fitting.py."""

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
from medgen.utility.regions import as_channels, column
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
        """float32 [n, classes], or [n, regions, H, W]: probabilities."""
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
        """Cross-entropy of every pixel, and one minus the Dice of the whole batch, the mean over the regions: slices without a lesion have none of their own."""
        chance = outputs.sigmoid()
        both = zip(chance.unbind(1), targets.unbind(1), strict=True)
        overlap = torch.stack([(2 * (found * truth).sum() + 1) / (found.sum() + truth.sum() + 1) for found, truth in both]).mean()
        return functional.binary_cross_entropy_with_logits(outputs, targets) + 1 - overlap

    def probabilities(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()

    def found(self, network: nn.Module, pool: Pool, device: torch.device) -> np.ndarray:
        """bool [n, regions, H, W]"""
        return self.ask(network, pool, device) > THRESHOLD

    def quality(self, network: nn.Module, device: torch.device) -> float:
        """Dice over all pixels of all validation slices together, the mean over the regions: what is found where nothing is counts as well."""
        truth = self.validation.targets(np.arange(len(self.validation))) > 0
        found = self.found(network, self.validation, device)
        both = [(found[:, place], truth[:, place]) for place in range(truth.shape[1])]
        return float(np.mean([2 * (ours & theirs).sum() / max(1, ours.sum() + theirs.sum()) for ours, theirs in both]))

    def answers(self, network: nn.Module, rows: np.ndarray, device: torch.device) -> dict[str, list[Any]]:
        found = self.found(network, RealMasks(self.sides.store, self.sides.channels, rows), device)
        truth = as_channels(self.sides.store.masks(rows), found.shape[1])
        answers: dict[str, list[Any]] = {}
        for place, region in enumerate(self.sides.regions):
            ours, theirs = found[:, place], truth[:, place]
            columns = {"lesion_pixels": theirs.sum(axis=(1, 2)).tolist(), "found_pixels": ours.sum(axis=(1, 2)).tolist(), "dice": masks.dice(ours, theirs).tolist()}
            answers |= {column(name, region): values for name, values in columns.items()}
        return answers


def of_task(settings: UtilityStage, sides: Sides, training_set: TrainingSet, validation_rows: np.ndarray, seed: int, augmented: bool) -> Learner:
    if settings.task == "segmentation":
        assert settings.channels is not None
        return segmenter(settings.channels, sides, training_set, validation_rows, seed, augmented)
    assert settings.network is not None
    network = networks.resnet(settings.network, len(sides.channels), len(sides.store.classes), seed)
    return Classifier(network, training_set, RealClasses(sides.store, sides.channels, validation_rows), sides, seed, augmented)


def segmenter(channels: list[int], sides: Sides, training_set: TrainingSet, validation_rows: np.ndarray, seed: int, augmented: bool) -> Segmenter:
    network = networks.unet(len(sides.channels), channels, seed, len(sides.regions))
    return Segmenter(network, training_set, RealMasks(sides.store, sides.channels, validation_rows), sides, seed, augmented)
