"""What a training will release about its records: how often, with which noise, at which rate. Used by model.py."""

from __future__ import annotations

from dataclasses import dataclass

from medgen.dp.accounting import epsilon
from medgen.dp.mechanism import Mechanism
from medgen.dp.priced import delta_of, mechanism_of, plural
from medgen.errors import InputError
from medgen.models.dpwgan.config import Config


@dataclass(frozen=True)
class Spending:
    """A whole training on so many records. `steps`: generator updates."""

    config: Config
    records: int
    mechanism: Mechanism
    delta: float
    steps: int

    @property
    def words(self) -> list[str]:
        """For the log."""
        planned, unit = self.mechanism, self.config.unit
        cut = f"{self.steps:,} of {self.config.steps:,} steps, after which the budget is spent" if self.steps < self.config.steps else f"{self.steps:,} steps"
        return [
            f"differential privacy of each {unit} of {self.records:,}: epsilon {epsilon((planned,), self.delta):.4g} at delta {self.delta:.2g} after {cut}",
            f"{planned.steps:,} critic updates, each with {self.config.batch_size:,} {plural(unit)} on average, noise multiplier {planned.noise_multiplier:.4g}, "
            f"clip norm {self.config.clip_norm:g}",
        ]  # fmt: skip


def spending(config: Config, records: int) -> Spending:
    """Raises InputError if there are too few records, or no noise keeps the budget."""
    try:
        planned, delta = mechanism_of(config, records), delta_of(config, records)
    except ValueError as error:
        raise InputError(f"dp: {error}") from None
    steps = planned.steps // config.critic_steps
    if steps == 0:
        raise InputError(f"dp: epsilon {config.budget:g} is spent before the first step is over with noise_multiplier {planned.noise_multiplier:g}; write a larger one, or leave it out")
    return Spending(config, records, planned, delta, steps)
