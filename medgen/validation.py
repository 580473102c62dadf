"""What a training measures on held-out slices, and which of its checkpoints are best by that. Called by train.py's loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from medgen import commits, dist, fault
from medgen.models.base import Given, Phase, SampleNoise
from medgen.train_log import Averages, TrainingLog
from medgen.training import Training, of_phase, steps_in

MIN_STEPS_BETWEEN = 50  # by default: a validation with its pictures costs as much as several steps
MOST_GRIDS = 100  # of a training on disk, and one more of each phase


def evenly(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` rows, spread evenly over all patients and positions."""
    if len(rows) <= count:
        return rows
    return rows[np.arange(count) * len(rows) // count]


def steps_between(training: Training, phase: Phase) -> int:
    """From one validation of a phase to the next; its last step has one too."""
    validate_epochs = training.config.loop.validate_epochs
    if validate_epochs is None and phase.select is not None:
        validate_epochs = 1.0  # the best can only be found among those that are looked at
    if validate_epochs is not None:
        return max(1, round(validate_epochs * training.samples / phase.batch_size))
    return max(MIN_STEPS_BETWEEN, round(steps_in(phase, training.samples) / 50))


def validate_and_show(training: Training, epoch: float, log: TrainingLog | None) -> dict[str, dict[str, Any]]:
    """On all ranks; rank 0 alone draws previews, for which the others wait longer than for a step. Returns what to select by."""
    clock, activity = training.clock, training.work.activity
    activity.now("validating")
    values = _validate(training) if len(training.val_rows) else {}
    if log and values:
        log.record(clock.step, epoch, values)
        activity.now("validating")
    dist.on_main(lambda: _preview(training, log), training.ranks)
    return _metrics(training, values)


@torch.no_grad()
def _validate(training: Training) -> dict[str, float]:
    """Means over the validation slices, shared by all ranks; the same noise every time, so curves compare."""
    if fault.ARMED:
        fault.at("validate", step=training.clock.step)
    averages, ranks, samples = Averages(), training.ranks, dict[int, dict[str, torch.Tensor]]()
    size = training.phase.batch_size // ranks.world_size
    everyone = np.arange(len(training.val_rows))
    mine = everyone[ranks.rank :: ranks.world_size] if len(everyone) >= ranks.world_size else everyone
    for start in range(0, len(mine), size):
        places = mine[start : start + size]
        batch = training.batch(training.val_rows[places], [int(place) for place in places], "val")
        report = training.model.validate(batch, training.context)
        averages.add(report, weight=len(places))
        samples |= {int(place): {name: values[row].cpu() for name, values in report.samples.items()} for row, place in enumerate(places)}
    training.work.activity.now("waiting for the others")
    return {f"val_{name}": value for name, value in {**averages.means(ranks), **_scores(training, samples)}.items()}


def _scores(training: Training, mine: dict[int, dict[str, torch.Tensor]]) -> dict[str, float]:
    """The selection metrics, from what all ranks have kept of the samples, by place in the split."""
    if not training.model.selection_metrics:
        return {}
    every = {place: kept for part in dist.gathered(mine, training.ranks) for place, kept in part.items()}
    kept = [every[place] for place in sorted(every)]
    return training.model.scores({name: torch.stack([item[name] for item in kept]) for name in kept[0]})


def _metrics(training: Training, values: dict[str, float]) -> dict[str, dict[str, Any]]:
    """What checkpoints may be selected by: the validation loss, and the model's own scores late enough in a phase."""
    better = {"loss": "lower", **(training.model.selection_metrics if training.context.phase_progress >= training.phase.select_from else {})}
    return {of_phase(training, training.phase, name): {"value": values[f"val_{name}"], "better": better[name]} for name in better if f"val_{name}" in values}


def best_epochs(training: Training) -> dict[str, float]:
    """How many epochs each phase had behind it at its best checkpoint, by what it selects by, else by the validation loss."""
    known, found, start_step = commits.best(commits.committed(training.folder)), dict[str, float](), 0
    for phase in training.phases:
        name = of_phase(training, phase, phase.select or "loss")
        if name in known:
            found[phase.name] = (known[name].step - start_step) * phase.batch_size / training.samples
        start_step += steps_in(phase, training.samples)
    return found


def show_what_was_left_out(training: Training, log: TrainingLog | None) -> None:
    """The preview of the step that it goes on from, for which the attempt before had no time: all ranks call it, rank 0 draws."""
    clock, steps = training.clock, steps_in(training.phase, training.samples)
    done = clock.step - clock.phase_start_step
    if done and (done % steps_between(training, training.phase) == 0 or done == steps) and _is_kept(training):
        dist.on_main(lambda: _preview(training, log) if log is not None and not log.has_grid(clock.step) else None, training.ranks)


def _is_kept(training: Training) -> bool:
    """True of the first validation, of every n-th after it, and of the last of each phase.

    A function of the step alone: no interruption changes which grids there are."""
    clock, phase, samples = training.clock, training.phase, training.samples
    validations = [math.ceil(steps_in(each, samples) / steps_between(training, each)) for each in training.phases]
    done = clock.step - clock.phase_start_step
    number = sum(validations[: clock.phase]) + math.ceil(done / steps_between(training, phase))
    return (number - 1) % math.ceil(sum(validations) / MOST_GRIDS) == 0 or done == steps_in(phase, samples)


def _preview(training: Training, log: TrainingLog | None) -> None:
    """A few samples for TensorBoard and the folder of grids, from the same noise and conditions each time; none if the training is to stop.

    Conditions are of validation slices, or of training slices where nothing is held out; of neither where each look at real images counts."""
    config = training.config
    needs_rows = bool(config.condition_channels) or config.uses_labels or config.uses_captions
    rows = training.rows if config.looks_at_val and not len(training.val_rows) else training.val_rows
    count = min(config.loop.preview_images, len(rows)) if needs_rows else config.loop.preview_images
    if log is None or count == 0 or training.work.stop.is_set:
        return
    given = training.given(evenly(rows, count)) if needs_rows else Given({})
    indices = [(number,) for number in range(count)]
    noise = SampleNoise(training.work.plan.seed, f"{training.work.stage.name}/preview", indices, training.ranks.device)
    images = training.model.sample(noise, given, config.preview_sampling())
    # labels become grey levels; padding shows by itself, and no mask as an empty one
    conditions = {name: channel / len(training.store.regions) if name == "seg" else channel for name, channel in given.channels.items() if name not in ("valid", "masked")}
    shown = {**conditions, **images}
    for name, channel in shown.items():
        log.images(name, channel, training.clock.step)
    if _is_kept(training):
        log.grid(shown, training.clock.step)
