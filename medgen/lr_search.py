"""The search of a learning rate: a sweep over a model of its own, written into the run once. Called by train.py, and by find_lr.py without a run.

The model that is swept is thrown away and the training begins with another of the same seed: nothing of it is touched, so that it
equals, bit for bit, one whose configuration had the rate written in it. On several ranks each takes its share of every batch and
all see the mean loss, so that they try, stop and choose alike."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch.optim import Optimizer

from medgen import checkpoint, commits, dist, document, files, lr_curve, search_pictures
from medgen.dist import Ranks
from medgen.errors import InputError, Interrupted
from medgen.lr_curve import Curve, Smoothed
from medgen.models.settings import FamilyConfig, LrSearch
from medgen.rehearsal import prepare_phase
from medgen.resume import take_over
from medgen.rundir import RunDir
from medgen.task import Work
from medgen.training import Training


def swept(config: FamilyConfig) -> FamilyConfig:
    """The configuration of the model that is swept: no step is skipped, as the sweep is to see what happens, and nothing is compiled for so few."""
    return config.model_copy(update={"loop": config.loop.model_copy(update={"spike_factor": None, "compile": False})})


def found_once(work: Work, ranks: Ranks, settings: LrSearch, assemble: Callable[[], Training]) -> float:
    """The learning rate of a stage: the one in its record, or searched now with a training that is made for it alone. The same on every rank."""
    known = dist.on_main(lambda: _known(work), ranks)
    if known is not None:
        work.say(f"find_lr: lr {known:.2e}, as found before")
        return known
    work.say(f"find_lr: trying {settings.steps} learning rates from {lr_curve.LOWEST_RATE:g} to {lr_curve.HIGHEST_RATE:g}, on a model of its own")
    training = assemble()
    curve = search(training, settings)
    with_lr(training.config, curve.suggestion)  # what does not go together is not recorded: it would be read again and again
    dist.on_main(lambda: write(work.run.lr_search(work.stage.name), curve, {"task_hash": work.task.hash, "device": ranks.device_name}), ranks)
    work.say(f"find_lr: lr {curve.suggestion:.2e}, {curve.in_words}; {work.run.lr_search(work.stage.name).relative_to(work.run.root)}")
    return curve.suggestion


def with_lr(config: FamilyConfig, lr: float) -> Any:
    """The configuration as if `lr` had been written. Raises InputError if that contradicts what was."""
    try:
        return type(config).model_validate({**config.model_dump(mode="json"), "find_lr": None, "lr": lr})
    except ValidationError as error:
        raise InputError(f"find_lr found lr {lr:.2e}, which does not go with the rest of the configuration: {document.told(error)}") from None


def files_of(run: RunDir, stage: str) -> list[Path]:
    """What a search has left in the run; none where none was made."""
    record = run.lr_search(stage)
    return [path for path in (record, search_pictures.beside(record)) if path.is_file()]


def _known(work: Work) -> float | None:
    """Of this stage, or of the one that it repeats."""
    recorded = _recorded(work.run, work.stage.name, work.task.hash)
    repeated: str | None = work.stage.settings["repeat"]
    if recorded is None and repeated is not None:
        recorded = _recorded(work.run, repeated, work.plan.stage(repeated).tasks[0].hash)
    return recorded


def _recorded(run: RunDir, stage: str, task_hash: str) -> float | None:
    """From the record, or, where that is lost or damaged, from a checkpoint that was trained with it."""
    try:
        record = read(run.lr_search(stage))
        if record["task_hash"] == task_hash:
            return float(record["lr"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    for _, folder in commits.step_folders(run.checkpoints(stage)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if checkpoint.problem_with(folder) is None:
                return float(files.read_json(folder / commits.STATE)["config"]["lr"])
    return None


def search(training: Training, settings: LrSearch) -> Curve:
    """Train `training.model`, which is of no use afterwards, with a rate that grows at every step, until its loss blows up.

    The batches are those that the training begins with; warm-up and decay are off. Raises MedgenError if the loss is not finite
    from the start, or no rate lowers it, and Interrupted on a signal."""
    work, ranks, model, context = training.work, training.ranks, training.model, training.context
    if training.config.start_from is not None:
        take_over(training, training.config.start_from)
    training.clock.phase = next(number for number, phase in enumerate(training.phases) if phase.epochs > 0)
    context.phase, context.phase_progress = training.clock.phase, 0.0
    context.steps_per_epoch = len(training.rows) / training.phase.batch_size
    prepare_phase(training)
    rates, losses, smoothed = lr_curve.rates(settings.steps), list[float](), Smoothed()
    for number, rate in enumerate(rates):
        context.step = number
        work.activity.now("reading data")
        batch = training.batch_of_step(number)
        work.activity.now("computing a step")
        with _at_rate(list(model.optimizers().values()), rate):
            report = model.step(batch, context)
        work.activity.now("waiting for the others")
        shares = dist.gathered((float(report.scalars["loss"]), work.stop.is_set), ranks)
        losses.append(math.fsum(loss for loss, _ in shares) / len(shares))
        smoothed.add(losses[-1])
        work.progress(number + 1, len(rates), "learning rates", losses[-1])
        if any(stop for _, stop in shares):
            raise Interrupted(f"stopped by {work.stop.signal_name or 'another rank'} while it searched a learning rate; run again, it searches anew")
        if smoothed.has_blown_up:
            break
    return lr_curve.judged(rates[: len(losses)], losses, smoothed.values, len(rates))


@contextlib.contextmanager
def _at_rate(optimizers: list[Optimizer], rate: float) -> Iterator[None]:
    """Whatever schedule a family sets, this rate is what its optimizers step with."""

    def set_rate(optimizer: Optimizer, arguments: Any, options: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate

    hooks = [optimizer.register_step_pre_hook(set_rate) for optimizer in optimizers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def write(path: Path, curve: Curve, facts: dict[str, Any]) -> None:
    """The record with its own hash, and the picture beside it; the record last, as it is what counts."""
    search_pictures.draw_lr_curve(search_pictures.beside(path), curve)
    files.write_json(path, files.with_own_hash({**facts, **curve.record}))


def read(path: Path) -> dict[str, Any]:
    """Raises OSError if there is none, ValueError or KeyError if it is not what was written."""
    record: dict[str, Any] = files.read_json(path)
    if not files.own_hash_holds(record):
        raise ValueError(f"{path} has changed since it was written")
    return record

