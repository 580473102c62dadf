"""Skipping optimizer steps whose gradient is a spike or not finite. For any family: made by its model, asked before its optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from medgen.models.base import StepContext
from medgen.models.settings import LoopSettings

MEAN_DECAY = 0.99  # per step


class SpikeGuard(nn.Module):
    """The running mean of gradient norms, and whether a step may be made. One of the family's `modules()`: it is in every checkpoint.

    The mean goes on adapting while steps are skipped, with the norm cut at the limit: if gradients have become longer for good, it
    doubles in 8 steps and lets them pass. A mean that stands still while it skips may never let another step pass.
    A norm that is not finite teaches it nothing."""

    mean: Tensor
    seen: Tensor

    def __init__(self, settings: LoopSettings):
        super().__init__()
        self.factor, self.after_steps = settings.spike_factor, settings.spike_after_steps
        self.register_buffer("mean", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("seen", torch.tensor(0))  # finite norms

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SpikeGuard:
        """Its numbers stay on the CPU in full precision wherever the networks go: the process decides with them."""
        return self

    def allows(self, norm: Tensor, context: StepContext) -> bool:
        """Whether the optimizer may step with gradients of this norm (0-dim, before clipping): alike on all ranks.

        Waits for the GPU. With `spike_factor: null` everything is allowed."""
        if self.factor is None:
            return True
        length = float(context.mean(norm))
        if not math.isfinite(length):
            return False
        mean, seen = float(self.mean), int(self.seen)
        limit = self.factor * mean if seen >= self.after_steps and mean > 0 else math.inf
        kept = min(length, limit)
        # as an average of all while there are few, so that the first steps count alike
        self.mean.fill_(mean + max(1 - MEAN_DECAY, 1 / (seen + 1)) * (kept - mean))
        self.seen += 1
        return length <= limit
