"""Whether a training is worth going on with: losses that are not finite, diverge or stay at a constant's, steps that are skipped. Called by train.py at each logging."""

from __future__ import annotations

import math

from medgen.errors import MedgenError
from medgen.training import Training

ADVICE = "lower lr, lengthen the warm-up or lower clip_norm; the last good checkpoint is kept"
ALARM_STEPS, ALARM_SHARE = 1000, 0.01  # more than this share of so many steps skipped is told
CONSTANT_SHARE = 0.98  # of a constant's loss: what predicts no better knows nothing of its input


def stop_if_hopeless(training: Training, values: dict[str, float], steps: int) -> None:
    """Raise MedgenError with what to do. `values`: means over the last `steps` steps on all ranks."""
    clock, loss = training.clock, values["loss"]
    if not math.isfinite(loss):
        raise MedgenError(f"the loss became {loss} between steps {clock.step - steps + 1} and {clock.step}; {ADVICE}")
    if training.config.loss_falls:
        _stop_if_diverged(training, loss, steps)
    if "constant_loss" in values:
        _stop_if_collapsed(training, loss, values["constant_loss"], steps)


def tell_of_skipped(training: Training, values: dict[str, float], steps: int) -> None:
    """Once per window of steps, as soon as too many of it were skipped; `work.skipped` says it until a window goes by without."""
    clock, work = training.clock, training.work
    if "skipped" not in values:
        return
    before, clock.skipped, clock.skip_steps = clock.skipped, clock.skipped + round(values["skipped"] * steps), clock.skip_steps + steps
    limit = ALARM_SHARE * ALARM_STEPS
    if before <= limit < clock.skipped and work.is_main:
        work.skipped = {"steps": clock.skipped, "of": clock.skip_steps}
        words = f"{clock.skipped} of the last {clock.skip_steps} steps were skipped, because their gradients were not finite or far longer than usual; {ADVICE}"
        work.say(words)
        work.run.event("steps_skipped", stage=work.stage.name, shard=work.task.shard, attempt=work.attempt, step=clock.step, cause=words)
    if clock.skip_steps >= ALARM_STEPS:
        work.skipped = work.skipped if clock.skipped > limit else None
        clock.skipped = clock.skip_steps = 0


def _stop_if_diverged(training: Training, loss: float, steps: int) -> None:
    """If the loss has stayed far above its best for too long."""
    clock, loop = training.clock, training.config.loop
    clock.best_loss = min(clock.best_loss, loss)
    clock.steps_above = clock.steps_above + steps if loss > loop.divergence_factor * clock.best_loss else 0
    if clock.steps_above >= loop.divergence_steps:
        raise MedgenError(
            f"diverged: the loss ({loss:.4g}) has been more than {loop.divergence_factor:g} times its best ({clock.best_loss:.4g}) "
            f"for {clock.steps_above} steps, now step {clock.step}; {ADVICE}"
        )


def _stop_if_collapsed(training: Training, loss: float, constant_loss: float, steps: int) -> None:
    """If the network has predicted nothing but a mean for too long."""
    clock, limit = training.clock, training.config.loop.collapse_steps
    clock.steps_constant = clock.steps_constant + steps if loss > CONSTANT_SHARE * constant_loss else 0
    if limit is not None and clock.steps_constant >= limit:
        raise MedgenError(
            f"collapsed: for {clock.steps_constant} steps, now step {clock.step}, the loss ({loss:.4g}) has been that of predicting one number for every pixel "
            f"({constant_loss:.4g}): the network says nothing of its input. Look whether the data are what they should be (the grids in the stage's folder previews), "
            "raise lr or take a wider network; loop.collapse_steps: null goes on regardless"
        )
