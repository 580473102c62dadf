"""What a training will release about its records: how often, with which noise, at which rate. Used by model.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

from medgen.dp.accounting import epsilon
from medgen.dp.mechanism import History, Mechanism, steps_of
from medgen.dp.priced import clip_norms, delta_of, history_of, plural
from medgen.dp.profile import course
from medgen.errors import InputError
from medgen.models.dpwgan.config import Config
from medgen.models.dpwgan.ledger import STRETCHES, Ledger


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
        if not planned:
            return ["no steps: the images are of start_from's weights as they are, and cost nothing more"]
        before = "; what start_from has spent comes on top" if self.config.start_from is not None else ""
        cut = f"{self.steps:,} of {self.config.steps:,} steps, after which the budget is spent" if self.steps < self.config.steps else f"{self.steps:,} steps"
        return [
            f"differential privacy of each {unit} of {self.records:,}: epsilon {epsilon(planned, self.delta):.4g} at delta {self.delta:.2g} after {cut}{before}",
            f"{steps_of(planned):,} critic updates, each with {self.config.batch_size:,} {plural(unit)} on average, noise multiplier {course(planned[0].noise_multiplier, planned[-1].noise_multiplier)}, "
            f"clip norm {course(*clip_norms(self.config, steps_of(planned)))}",
        ]  # fmt: skip


def spending(config: Config, records: int) -> Spending:
    """Raises InputError if there are too few records, or no noise keeps the budget."""
    try:
        planned, delta = history_of(config, records), delta_of(config, records)
    except ValueError as error:
        raise InputError(str(error)) from None
    steps = steps_of(planned) // config.critic_steps
    if steps == 0 < config.steps:
        raise InputError(f"dp.epsilon: {config.budget:g} is spent before the first step is over with dp.noise_multiplier {config.noise_multiplier:g}; write a larger one, or leave it out")
    return Spending(config, records, planned, delta, steps)


def check_past(planned: Spending, ledger: Ledger) -> None:
    """What weights that are gone on from have cost is part of this training's cost. Raises InputError if both cannot be told in one number, or
    are more than the budget."""
    config, past = planned.config, ledger.history
    other = ledger.units - {config.unit}
    if other:
        raise InputError(f"start_from: it has spent its privacy on {plural(other.pop())}, this training protects {plural(config.unit)}: no number tells both; write dp.unit as there, or start from other weights")
    if len(past) + len(planned.history) > STRETCHES:
        raise InputError(f"start_from: with this training its weights have had {len(past) + len(planned.history)} stretches of noise, and {STRETCHES} can be counted; start from other weights, or leave noise_decay out")
    together = epsilon((*past, *planned.history), planned.delta)
    if past and config.budget is not None and together > config.budget:
        raise InputError(f"dp.epsilon: {config.budget:g} is less than start_from has spent and this training will, {together:.4g} together at delta {planned.delta:.2g}; "
                         "write that, or a noise_multiplier with fewer steps and an epsilon for both")  # fmt: skip
