"""What the two players of PACGAN minimise: Wasserstein scores, gradient penalty, drift and classification. Used by model.py.

Gulrajani et al., NeurIPS 2017 (penalty); Karras et al., ICLR 2018 (drift); Odena et al., ICML 2017 (classes)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from medgen.models.pacgan.networks import Judged

Judge = Callable[[Tensor], Judged]


@dataclass(frozen=True)
class Weights:
    """Of the terms. `aimed`: classification of what a player is to get right (the critic real images, the generator its own);
    `other`: of the other kind, which teaches the critic alone."""

    penalty: float
    aimed: float
    other: float
    drift: float


def critic_loss(real: Judged, fake: Judged, labels: Tensor, penalty: Tensor, weights: Weights) -> dict[str, Tensor]:
    """Every term by name, and "loss", their weighted sum; all 0-dim. labels: int64 [N], of the real and of the fake images alike."""
    terms = {
        "real_score": real.scores.mean(),
        "fake_score": fake.scores.mean(),
        "real_class": functional.cross_entropy(real.logits, labels),
        "fake_class": functional.cross_entropy(fake.logits, labels),
        "penalty": penalty,
        "drift": real.scores.square().mean(),
    }
    loss = (
        terms["fake_score"] - terms["real_score"] + weights.aimed * terms["real_class"] + weights.other * terms["fake_class"]
        + weights.penalty * terms["penalty"] + weights.drift * terms["drift"]
    )  # fmt: skip
    return {"loss": loss, **terms}


def gradient_penalty(judge: Judge, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """Mean of (|gradient of the score at a mixed image| - 1)^2; real, fake [N, C, H, W] in [-1, 1], mix [N] in [0, 1): the share of real.

    `judge` without mixed precision: this term's own gradient is a second derivative."""
    share = mix.view(-1, 1, 1, 1)
    mixed = (share * real + (1 - share) * fake).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(judge(mixed).scores.sum(), mixed, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def generator_loss(fake: Judged, labels: Tensor, weights: Weights) -> dict[str, Tensor]:
    """The same for the generator. The classification of real images, which the paper adds, has no gradient here and is left out."""
    score, error = fake.scores.mean(), functional.cross_entropy(fake.logits, labels)
    return {"loss": weights.aimed * error - score, "score": score, "class": error}
