"""What a training will release about its records: how often, with which noise, at which rate. Used by model.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

from medgen.dp.accounting import epsilon
from medgen.dp.mechanism import History, Mechanism, steps_of
from medgen.dp.priced import clip_norms, delta_of, history_of, plural
from medgen.dp.profile import course
from medgen.errors import InputError
from medgen.models.dpwgan.config import Config


@dataclass(frozen=True)
class Spending:
    """A whole training on so many records. `steps`: generator updates."""

    config: Config
    records: int
    history: History
    delta: float
    steps: int

    def release(self, number: int) -> Mechanism:
        """What the update of the critic with this number does, counted from the beginning of the training."""
        return replace(self.history[0], noise_multiplier=self.history[0].noise_multiplier * self.config.noise_profile.share(number), steps=1)

    @property
    def words(self) -> list[str]:
        """For the log."""
        planned, unit = self.history, self.config.unit
        cut = f"{self.steps:,} of {self.config.steps:,} steps, after which the budget is spent" if self.steps < self.config.steps else f"{self.steps:,} steps"
        return [
            f"differential privacy of each {unit} of {self.records:,}: epsilon {epsilon(planned, self.delta):.4g} at delta {self.delta:.2g} after {cut}",
            f"{steps_of(planned):,} critic updates, each with {self.config.batch_size:,} {plural(unit)} on average, noise multiplier {course(planned[0].noise_multiplier, planned[-1].noise_multiplier)}, "
            f"clip norm {course(*clip_norms(self.config, steps_of(planned)))}",
        ]  # fmt: skip


def spending(config: Config, records: int) -> Spending:
    """Raises InputError if there are too few records, or no noise keeps the budget."""
    try:
        planned, delta = history_of(config, records), delta_of(config, records)
    except ValueError as error:
        raise InputError(f"dp: {error}") from None
    steps = steps_of(planned) // config.critic_steps
    if steps == 0:
        raise InputError(f"dp: epsilon {config.budget:g} is spent before the first step is over with noise_multiplier {config.noise_multiplier:g}; write a larger one, or leave it out")
    return Spending(config, records, planned, delta, steps)
