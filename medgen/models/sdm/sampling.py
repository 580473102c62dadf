"""What is predicted from label maps and conditions at every step of a sampling, with guidance. Used by the family's model.py.

Everything that is the same at every step is worked out once here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medgen.models.diffusion.discrete import NETWORK_TIME_SCALE, Predict
from medgen.models.sdm.conditions import Conditions
from medgen.models.sdm.networks import SemanticUNet


@dataclass(frozen=True)
class Guidance:
    """How much more than in training what is told shows: 1 as trained, above 1 more. Each that is not 1 asks the network once more per step.

    labels, kind, size: scales of the label map, the kind of image and its sizes, each against the same without it.
    interval: times at which it guides, as shares of the way from clean (0) to noise (1)."""

    labels: float = 1.0
    kind: float = 1.0
    size: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"interval: times lie in 0 to 1 and rise, got [{low:g}, {high:g}]")

    def acts_at(self, time: Tensor) -> bool:
        """time: what the network is told, [N], one for all."""
        low, high = self.interval
        return low <= float(time[0]) / NETWORK_TIME_SCALE <= high


def predictor(network: SemanticUNet, labels: Tensor, conditions: Conditions | None, guidance: Guidance) -> Predict:
    """For LearnedVariance.sample. labels: maps [N, classes, H, W], or one for all images; the network in eval mode, its weights fixed.

    Raises ValueError where guidance is asked for by what the network is not told."""
    modulation = network.modulate(labels)
    without = []
    if guidance.labels != 1:
        of_nothing = network.modulate(torch.zeros_like(labels[:1]))  # the same for all images
        without.append((of_nothing, conditions, guidance.labels))
    for name, scale, is_told in (("kind", guidance.kind, network.shape.kinds > 0), ("size", guidance.size, network.shape.sizes)):
        if scale == 1:
            continue
        if conditions is None or not is_told:
            raise ValueError(f"{name}: a guidance of {scale:g} has no effect, since the network is not told the {name}; remove it")
        without.append((modulation, conditions.leaving_out(name == "kind", name == "size"), scale))

    def predict(images: Tensor, time: Tensor) -> Tensor:
        told: Tensor = network(images, time, modulation, conditions).float()
        if not without or not guidance.acts_at(time):
            return told
        others = [(network(images, time, *given).float(), scale) for *given, scale in without]
        return guided(told, others, network.shape.image_channels)

    return predict


def guided(told: Tensor, without: Sequence[tuple[Tensor, float]], image_channels: int) -> Tensor:
    """Classifier-free guidance of the prediction alone: the learned variance stays that of what is told.

    told, without: the network's outputs [N, C or 2 C, H, W], the latter each with its scale; Ho & Salimans 2022 (arXiv:2207.12598, eq. 6,
    where the scale is 1 + w), and with several conditions Brooks et al. 2023 (arXiv:2211.09800) in its symmetric form."""
    prediction = told[:, :image_channels]
    moved = sum(((scale - 1) * (prediction - other[:, :image_channels]) for other, scale in without), start=prediction)
    return torch.cat([moved, told[:, image_channels:]], dim=1)
