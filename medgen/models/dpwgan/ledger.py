"""What a training has spent of its privacy budget, as part of its checkpoints. Used by model.py; read by whoever states the guarantee."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medgen.dp.mechanism import History, Mechanism
from medgen.dp.priced import Unit

STRETCHES = 64  # of equal noise and rate; a training that goes on from a private one has its stretches before its own
UNITS: tuple[Unit, ...] = ("patient", "slice")


class Ledger(nn.Module):
    """Every noised release counts: rows of noise multiplier, sampling rate, number of releases, unit (its place in UNITS), and 1 if whoever
    knows the spec's seed can draw the noise again."""

    spent: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("spent", torch.zeros(STRETCHES, 5, dtype=torch.float64))

    @property
    def history(self) -> History:
        """In stretches that were alike, in order."""
        return tuple(Mechanism(rate, noise, int(count)) for noise, rate, count, _, _ in self._used)

    @property
    def units(self) -> set[Unit]:
        """Of all releases."""
        return {UNITS[int(unit)] for *_, unit, _ in self._used}

    @property
    def reproducible(self) -> bool:
        """True if the noise of any release can be drawn again."""
        return any(reproducible for *_, reproducible in self._used)

    @property
    def _used(self) -> list[list[float]]:
        return [row for row in self.spent.tolist() if row[2]]

    def add(self, released: Mechanism, unit: Unit, reproducible: bool) -> None:
        """One release."""
        used = len(self._used)
        last = max(used - 1, 0)
        row = torch.tensor([released.noise_multiplier, released.sampling_rate, 0, UNITS.index(unit), reproducible], dtype=torch.float64)
        alike = [0, 1, 3, 4]
        place = last if used and torch.equal(self.spent[last, alike].cpu(), row[alike]) else used
        if place == STRETCHES:
            raise RuntimeError(f"more than {STRETCHES} stretches of noise; the ledger cannot hold them")
        self.spent[place, alike] = row[alike].to(self.spent.device)
        self.spent[place, 2] += 1
