"""What one differentially private update of the critic starts from and gives: records, and the sum of their clipped gradients.

Used by model.py and by the two ways to compute that sum, per_record.py (the reference) and two_pass.py (the fast one).

A record is what the guarantee protects: a patient with k slices. Its loss is the mean over its slices of
-D(real) + D(fake) + penalty * (|gradient of D at a mixed image| - 1)^2 (Gulrajani et al., NeurIPS 2017, equation 3), and its whole
gradient, with the part that comes of the penalty, is clipped once (Abadi et al., CCS 2016, algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NORM_EPSILON = 1e-12  # under the root of the norm of an image's gradient: a plain root has no derivative at 0


@dataclass(frozen=True)
class Records:
    """N records of k slices each, N may be 0. Fakes and shares must not depend on the real images, nor on how many records were drawn.

    real, fake: [N, k, C, H, W] in [-1, 1]; mix: [N, k] in [0, 1), the share of real in the image at which the penalty is taken."""

    real: Tensor
    fake: Tensor
    mix: Tensor

    def __post_init__(self) -> None:
        assert self.real.dim() == 5 and self.fake.shape == self.real.shape, (self.real.shape, self.fake.shape)
        assert self.mix.shape == self.real.shape[:2] and self.slices > 0, (self.mix.shape, self.real.shape)

    def __len__(self) -> int:
        return len(self.real)

    @property
    def slices(self) -> int:
        return self.real.shape[1]

    def mixed(self) -> Tensor:
        """[N, k, C, H, W]: the images at which the penalty is taken."""
        share = self.mix[:, :, None, None, None]
        return share * self.real + (1 - share) * self.fake

    def split(self, size: int) -> Iterator[Records]:
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Records(self.real[part], self.fake[part], self.mix[part])


@dataclass(frozen=True)
class RecordTerms:
    """Parts of each record's loss, [N] each, without graph, means over its slices. They are private: nothing hides one record in them.

    penalty: without its weight; loss: all three together, with it."""

    real_score: Tensor
    fake_score: Tensor
    penalty: Tensor
    loss: Tensor


def told_of(terms: RecordTerms) -> dict[str, Tensor]:
    """What is logged of an update, 0-dim means over its records. Never of one that promises privacy."""
    real, fake = terms.real_score.mean(), terms.fake_score.mean()
    return {"critic_real_score": real, "critic_fake_score": fake, "wasserstein": real - fake, "critic_penalty": terms.penalty.mean()}


@dataclass(frozen=True)
class ClippedSum:
    """gradients: name of a parameter that is trained (requires_grad) -> sum over records of their clipped gradients, of its shape, divided
    by nothing. 0 if there are no records. Frozen parameters have no part in norms either.

    norms: [N], of the whole gradients before clipping; private like the terms. Those that are not finite had no part in the sum."""

    gradients: dict[str, Tensor]
    norms: Tensor
    terms: RecordTerms


def clip_factors(norms: Tensor, clip_norm: float | None) -> Tensor:
    """What each record's gradient is multiplied by, [N]: min(1, clip_norm / norm), and 0 where the norm is not finite. None: no clipping."""
    factors = torch.ones_like(norms) if clip_norm is None else (clip_norm / norms).clamp(max=1)
    return torch.where(norms.isfinite(), factors, 0)


def empty_sum(critic: nn.Module, records: Records) -> ClippedSum:
    none = records.mix.new_zeros(0)
    gradients = {name: torch.zeros_like(parameter) for name, parameter in critic.named_parameters() if parameter.requires_grad}
    return ClippedSum(gradients, none, RecordTerms(none, none, none, none))


def joined_terms(parts: list[RecordTerms]) -> RecordTerms:
    return RecordTerms(
        torch.cat([part.real_score for part in parts]), torch.cat([part.fake_score for part in parts]),
        torch.cat([part.penalty for part in parts]), torch.cat([part.loss for part in parts]),
    )  # fmt: skip
