"""A trained model as a classifier, and how well it tells images apart: AUC, accuracy, confusion, calibration. Used by classify.py and run.py.

Intervals resample whole subjects. Labels are int64 [n], probabilities float [n, classes] whose rows sum to 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from medgen import spec
from medgen.checkpoint import Checkpoint
from medgen.errors import InputError
from medgen.evaluate import intervals
from medgen.evaluate.intervals import COVERAGE_PERCENTILES, FEWEST_GROUPS, REPLICATES
from medgen.models.base import DataShape, Model
from medgen.roc import area_under_curve
from medgen.training import trained_model

BATCH = 64
BINS = 10  # of confidences
STREAM = "classification"


@dataclass(frozen=True)
class Classifier:
    """A model with the weights of a checkpoint. `channels`: what its images hold."""

    found: Checkpoint
    model: Model
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    device: torch.device

    def predict(self, images: Mapping[str, np.ndarray]) -> np.ndarray:
        """Probabilities of the classes, float64 [n, classes]; images by channel, float32 [n, h, w] in [0, 1]."""
        count, parts = len(images[self.channels[0]]), []
        for start in range(0, count, BATCH):
            block = {name: torch.from_numpy(images[name][start : start + BATCH])[:, None].to(self.device) for name in self.channels}
            parts.append(self.model.classify(block).double().cpu().numpy())
        return np.concatenate(parts)


def load(found: Checkpoint) -> Classifier:
    """Raises InputError if its model tells no classes apart."""
    state = found.state()
    config = spec.family_config(state["config"])
    if not config.classifies:
        raise InputError(f"{found.folder}: its model ({state['config']['model']}) does not tell classes apart")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = DataShape(config.input_channels, state["size"], tuple(state["classes"]))
    return Classifier(found, trained_model(found, state["config"]["model"], config, shape, device), shape.channels, shape.classes, device)


@dataclass(frozen=True)
class Estimate:
    """A number over all images and its 95% interval; either is None where it cannot be had (a class is missing, too few subjects)."""

    value: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Performance:
    """`confusion[i][j]`: images of class i that were taken for class j. `calibration_error`: expected, of the class that was taken.

    `brier`: mean over images of the squared distance between the probabilities and the truth, 0 to 2."""

    images: int
    subjects: int
    auc: Estimate
    balanced_accuracy: Estimate
    accuracy: float
    confusion: list[list[int]]
    calibration_error: float
    brier: float


def performance(labels: np.ndarray, probabilities: np.ndarray, subjects: np.ndarray, seed: int) -> Performance:
    """subjects [n]: who each image shows."""
    predicted = probabilities.argmax(axis=1)
    classes = probabilities.shape[1]
    confusion = np.zeros((classes, classes), dtype=int)
    np.add.at(confusion, (labels, predicted), 1)
    truth = np.eye(classes)[labels]
    return Performance(
        len(labels), len(np.unique(subjects)),
        auc_estimate(labels, probabilities, subjects, seed),
        estimate(lambda weights: _balanced_accuracy(labels, predicted, classes, weights), subjects, seed),
        float((predicted == labels).mean()), confusion.tolist(), expected_calibration_error(labels, probabilities),
        float(((probabilities - truth) ** 2).sum(axis=1).mean()),
    )  # fmt: skip


def auc_estimate(labels: np.ndarray, probabilities: np.ndarray, subjects: np.ndarray, seed: int) -> Estimate:
    """One class against the rest, averaged over classes, with its interval over subjects."""
    return estimate(lambda weights: area_under_curve(labels, probabilities, weights), subjects, seed)


def estimate(statistic: Callable[[np.ndarray], float | None], subjects: np.ndarray, seed: int) -> Estimate:
    """`statistic` of a weight per image; drawn again with subjects [n] as often as a bootstrap draws them. A draw without some class says nothing."""
    value = statistic(np.ones(len(subjects)))
    names, member = np.unique(subjects, return_inverse=True)
    if value is None or len(names) < FEWEST_GROUPS:
        return Estimate(value, None)
    draws = [statistic(weights[member].astype(float)) for weights in intervals.draw_weights(len(names), REPLICATES, seed, STREAM)]
    low, high = np.percentile([draw for draw in draws if draw is not None], COVERAGE_PERCENTILES)
    return Estimate(value, (float(low), float(high)))


def _balanced_accuracy(labels: np.ndarray, predicted: np.ndarray, classes: int, weights: np.ndarray) -> float | None:
    """Mean over classes of the share that is right; None unless every class is there."""
    total = np.bincount(labels, weights, classes)
    if (total == 0).any():
        return None
    return float((np.bincount(labels, weights * (predicted == labels), classes) / total).mean())


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean gap between how sure the prediction is and how often it is right, in bins of equal width (Guo et al., ICML 2017)."""
    sureness, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    own_bin = np.minimum((sureness * BINS).astype(int), BINS - 1)
    gaps = [abs(sureness[own_bin == number].sum() - right[own_bin == number].sum()) for number in range(BINS)]
    return float(sum(gaps) / len(labels))
