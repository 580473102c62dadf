"""What a training has spent of its privacy budget, as part of its checkpoints. Used by model.py; read by whoever states the guarantee."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medgen.dp.mechanism import History, Mechanism

STRETCHES = 64  # of equal noise and rate; a training that goes on from a private one has its stretches before its own


class Ledger(nn.Module):
    """Every noised release counts: rows of noise multiplier, sampling rate and number of releases."""

    spent: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("spent", torch.zeros(STRETCHES, 3, dtype=torch.float64))

    @property
    def history(self) -> History:
        """In stretches that were alike, in order."""
        return tuple(Mechanism(rate, noise, int(count)) for noise, rate, count in self.spent.tolist() if count)

    def add(self, released: Mechanism) -> None:
        """One release."""
        used = len(self.history)
        last = max(used - 1, 0)
        row = torch.tensor([released.noise_multiplier, released.sampling_rate], dtype=torch.float64)
        place = last if used and torch.equal(self.spent[last, :2].cpu(), row) else used
        if place == STRETCHES:
            raise RuntimeError(f"more than {STRETCHES} stretches of noise; the ledger cannot hold them")
        self.spent[place, :2] = row.to(self.spent.device)
        self.spent[place, 2] += 1
