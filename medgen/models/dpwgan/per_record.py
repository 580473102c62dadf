"""The clipped sum by the definition: torch.func makes the gradient of every record, second derivatives and all. The reference for two_pass.py.

Used by tests and benchmarks: model.py takes two_pass.py. Takes the memory of a whole gradient for each record of a chunk."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from medgen.models.dpwgan.records import (
    NORM_EPSILON,
    ClippedSum,
    Records,
    RecordTerms,
    clip_factors,
    empty_sum,
    joined_terms,
)

Named = dict[str, Tensor]


def clipped_sum(critic: nn.Module, records: Records, penalty: float, clip_norm: float | None, chunk: int) -> ClippedSum:
    """The sum of the records' clipped gradients. The same bit for bit for the same inputs and `chunk`, the number of records at a time.

    critic: images [N, C, H, W] to scores [N], each for itself (cross_record.py tells); penalty: its weight; clip_norm: None does not clip."""
    assert chunk > 0, chunk
    total = empty_sum(critic, records)
    if not len(records):
        return total
    weights = {name: parameter.detach() for name, parameter in critic.named_parameters() if parameter.requires_grad}  # functional_call keeps the others
    norms, terms = [], []
    for part in records.split(chunk):
        gradients, found = _gradients(critic, weights, part, penalty)
        norms.append(_norms(gradients))
        factors = clip_factors(norms[-1], clip_norm)
        for name, gradient in gradients.items():
            rows = gradient.flatten(1)
            rows[factors == 0] = 0  # what is not finite stays so when it is multiplied by 0
            total.gradients[name].view(-1).add_(factors @ rows)
        terms.append(found)
    return ClippedSum(total.gradients, torch.cat(norms), joined_terms(terms))


def _gradients(critic: nn.Module, weights: Named, records: Records, penalty: float) -> tuple[Named, RecordTerms]:
    """Name -> gradients [N, *shape], and the terms."""

    def score(weights: Named, image: Tensor) -> Tensor:
        scores: Tensor = functional_call(critic, weights, (image[None],))
        return scores.squeeze(0)

    def slice_terms(weights: Named, real: Tensor, fake: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slope = grad(score, argnums=1)(weights, mixed)
        excess = ((slope.square().sum() + NORM_EPSILON).sqrt() - 1).square()
        return score(weights, real), score(weights, fake), excess

    def record_loss(weights: Named, real: Tensor, fake: Tensor, mixed: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        of_real, of_fake, excess = (values.mean() for values in vmap(slice_terms, in_dims=(None, 0, 0, 0))(weights, real, fake, mixed))
        loss = of_fake - of_real + penalty * excess
        return loss, (of_real, of_fake, excess)

    per_record = vmap(grad_and_value(record_loss, has_aux=True), in_dims=(None, 0, 0, 0))
    gradients, (loss, (of_real, of_fake, excess)) = per_record(weights, records.real, records.fake, records.mixed())
    return gradients, RecordTerms(of_real, of_fake, excess, loss)


def _norms(gradients: Named) -> Tensor:
    """[N], each over all parameters."""
    return torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients.values()]).norm(dim=0)
