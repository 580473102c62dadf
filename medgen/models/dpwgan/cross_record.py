"""Whether a critic judges each record for itself: without that, no clipping bounds what one record can change. Used by model.py before training.

Layers that are known to couple records are named; what is written by hand is found by measuring: other records change, one's gradient must not."""

from __future__ import annotations

import copy
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

RECORDS = 3
STILL = 1e-9  # relative change of a gradient that is rounding, in float64


@runtime_checkable
class OfImages(Protocol):
    image_shape: tuple[int, int, int]  # C, H, W


def cross_record_problem(critic: nn.Module) -> str | None:
    """Which layer of the critic couples records, keeps statistics of them or draws random numbers, in words; None if none does.

    critic: has `image_shape`; is not changed. Costs six passes forward and back of three random images in float64."""
    for name, layer in critic.named_modules():
        if isinstance(layer, _BatchNorm):
            return f"{name} ({type(layer).__name__}) normalises each record by the others; use GroupNorm or no normalisation"
        if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
            return f"{name} ({type(layer).__name__}) keeps statistics of all records; set track_running_stats to False"
        if isinstance(layer, _DropoutNd):
            return f"{name} ({type(layer).__name__}) draws random numbers, which would have to be each record's own; leave it out"
    return _measured_problem(critic)


def _measured_problem(critic: nn.Module) -> str | None:
    assert isinstance(critic, OfImages), f"{type(critic).__name__} does not say its image_shape"
    generator = torch.Generator().manual_seed(0)
    probe = with_random_weights(critic, generator).train()
    kept = {name: buffer.clone() for name, buffer in probe.named_buffers()}
    images = torch.randn((RECORDS, *critic.image_shape), generator=generator, dtype=torch.float64)
    for changed in (0, RECORDS - 1):
        others = images.clone()
        others[changed] = 3 * torch.randn(critic.image_shape, generator=generator, dtype=torch.float64)
        shares = torch.randn(RECORDS, generator=generator, dtype=torch.float64)
        shares[changed] = 0
        before = _gradient(probe, images, shares)
        for name, buffer in probe.named_buffers():
            if not torch.equal(buffer, kept[name]):
                return f"a pass of images changes the buffer {name}, which may keep something of the records"
        if not _change(_gradient(probe, images, shares), before) <= STILL:
            return f"{type(critic).__name__} gives another gradient for the same images: it draws random numbers or keeps something of the records"
        moved = _change(_gradient(probe, others, shares), before)
        if not moved <= STILL:
            return f"the gradient of records moves by {moved:.1%} when another record changes: {_first_coupled(probe, images, others, changed)}"
    return None


def with_random_weights(critic: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy in float64 on the CPU to measure with. Not the critic's own weights: where these are 0, nothing could be seen."""
    probe = copy.deepcopy(critic).to("cpu", torch.float64)
    for parameter in probe.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = drawn / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 1 + drawn / 4
        parameter.requires_grad_(True)
    return probe


def _gradient(probe: nn.Module, images: Tensor, shares: Tensor) -> Tensor:
    """The records' scores times their shares, added up, and the gradient of that over all parameters, [1 + parameters]."""
    score = probe(images) @ shares
    parts = torch.autograd.grad(score, list(probe.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([score.detach().view(1), *(part.flatten() for part in parts)])


def _change(found: Tensor, before: Tensor) -> float:
    return float((found - before).norm() / before.norm())


def _first_coupled(probe: nn.Module, images: Tensor, others: Tensor, changed: int) -> str:
    """Where the values of a record that did not change first differ."""
    kept = torch.arange(RECORDS) != changed
    for (name, seen, made), (_, seen_then, made_then) in zip(_passed(probe, images), _passed(probe, others), strict=True):
        if not torch.equal(seen[kept], seen_then[kept]):
            return f"what goes into {name} depends on the other records of the batch"
        if not torch.equal(made[kept], made_then[kept]):
            return f"what comes out of {name or type(probe).__name__} depends on the other records of the batch"
    return f"{type(probe).__name__} couples the records of a batch"


def _passed(probe: nn.Module, images: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """Name, input and output of each module that maps a row per record to a row per record, inner ones first."""
    found: list[tuple[str, Tensor, Tensor]] = []

    def note(name: str, given: tuple[object, ...], made: object) -> None:
        if isinstance(made, Tensor) and len(given) == 1 and isinstance(given[0], Tensor) and len(given[0]) == len(made) == RECORDS:
            found.append((name, given[0].detach(), made.detach()))

    handles = [module.register_forward_hook(lambda _, given, made, name=name: note(name, given, made)) for name, module in probe.named_modules()]
    with torch.no_grad():
        probe(images)
    for handle in handles:
        handle.remove()
    return found
