"""Training: one loop for every model family. It owns data order, clock, checkpoints, signals and logging.

Called by `medgen train` through task.perform. Everything random is a function of the sample's position in the run,
so a killed and resumed run gives the same weights as an uninterrupted one."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from medgen import checkpoint, commits, dist, fault, models, planning, rng, spec
from medgen.activity import Stragglers
from medgen.checkpoint import Checkpoint
from medgen.context import Context
from medgen.data.store import SliceStore, open_store
from medgen.dist import Ranks
from medgen.errors import InputError, Interrupted, MedgenError
from medgen.models.base import Batch, DataShape, Given, Model, Phase, SampleNoise
from medgen.models.settings import FamilyConfig
from medgen.plan import GRACE_SLACK_SECONDS, GRACE_SPARE_SECONDS, grace_needed_seconds
from medgen.task import Done, Work
from medgen.train_log import Averages, TrainingLog, last_logged_step

MIN_VALIDATE_STEPS = 50  # by default: a validation with its pictures costs as much as several steps
CONTINUE, SAVE, STOP = 0, 1, 2  # what ranks agree on after every step


@dataclass
class Clock:
    """Where training stands. Everything here is in the checkpoint's state.json.

    position: samples consumed since the phase began; epoch = position / samples in the training split."""

    step: int = 0
    phase: int = 0
    phase_start_step: int = 0
    best_loss: float = math.inf  # of the logged windows; for the divergence stop
    steps_above: int = 0


@dataclass
class Training:
    """The parts that the loop's helpers share."""

    work: Work
    ranks: Ranks
    config: FamilyConfig
    stores: dict[int, SliceStore]  # by size in pixels; the same slices in each
    rows: np.ndarray
    val_rows: np.ndarray
    model: Model
    phases: list[Phase]
    context: Context
    clock: Clock = field(default_factory=Clock)
    grace_looked_at: bool = False

    @property
    def folder(self) -> Path:
        return self.work.run.checkpoints(self.work.stage.name)

    @property
    def phase(self) -> Phase:
        return self.phases[self.clock.phase]

    @property
    def store(self) -> SliceStore:
        """The slices at full size."""
        return self.stores[max(self.stores)]

    def batch(self, rows: np.ndarray, positions: list[int], stream: str) -> Batch:
        """Slices by row number, of the phase's size, as one batch on the device; noise will be drawn by position and stream."""
        store, device = self.stores[self.phase.size], self.ranks.device
        channels = {name: load_channel(store, name, rows, device) for name in self.config.input_channels}
        labels = torch.from_numpy(store.labels(rows)).to(device) if self.config.uses_labels else None
        return Batch(channels, positions, self.work.plan.seed, f"{self.work.stage.name}/{stream}", labels)

    def given(self, rows: np.ndarray) -> Given:
        """What images like these slices are made from, of the phase's size."""
        batch = self.batch(rows, [], "preview")
        return Given({name: batch.channels[name] for name in self.config.condition_channels}, batch.labels)


def load_channel(store: SliceStore, name: str, rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """[N, 1, H, W] float32 in [0, 1] on the device; "seg" is the mask."""
    array = store.masks(rows).astype(np.float32) if name == "seg" else store.images(name, rows)
    return torch.from_numpy(np.ascontiguousarray(array)).unsqueeze(1).to(device, non_blocking=True)


def train(work: Work) -> Done:
    """Train one stage to its end, or until a signal: then save and raise Interrupted."""
    if work.stop.signal_name == "SIGTERM":  # the others may have ended by it already
        raise Interrupted("stopped by SIGTERM before the ranks met")
    work.activity.now("meeting the others")
    with dist.joined_ranks(work.stage.threads, work.rank_has_ended) as ranks:
        work.is_main, work.device_name = ranks.is_main, ranks.device_name
        work.activity.now("reading data")
        training = _prepare(work, ranks)
        _resume(training)
        log = _open_log(training) if ranks.is_main else None
        try:
            _run(training, log)
        finally:
            if log:
                log.close()
        work.activity.now("ending")
        return _finish(training)


def _run(training: Training, log: TrainingLog | None) -> None:
    """The training loop."""
    work, ranks, model, clock, context = training.work, training.ranks, training.model, training.clock, training.context
    loop = training.config.loop
    averages, window_start, window_steps, last_loss = Averages(), time.monotonic(), 0, None
    last_save, saved_step = time.monotonic(), clock.step
    activity, stragglers = work.activity, Stragglers()
    context.take_own_seconds()  # of what came before

    for number, phase in enumerate(training.phases):
        if number < clock.phase:
            continue  # finished before this attempt
        clock.phase = number
        samples = len(training.rows)
        context.steps_per_epoch = samples / phase.batch_size
        phase_end = clock.phase_start_step + _steps_in(phase, samples)
        validate_steps = _validate_steps(loop.validate_epochs, phase, context.steps_per_epoch)

        while clock.step < phase_end:
            context.step, context.phase = clock.step, number
            context.phase_progress = (clock.step - clock.phase_start_step) * phase.batch_size / (phase.epochs * samples)
            positions = _my_positions(clock.step - clock.phase_start_step, phase.batch_size, ranks)
            rows = training.rows[_sample_order(positions, samples, work.plan.seed, f"{work.stage.name}/order/{clock.phase}")]
            activity.now("reading data")
            batch = training.batch(rows, positions, f"train/{clock.phase}")
            activity.now("computing a step")
            report = model.step(batch, context)
            activity.now("computing a step")
            clock.step += 1
            if fault.ARMED and fault.at("step", step=clock.step) == "nan":
                report.scalars["loss"] = report.scalars["loss"] * math.nan
            averages.add(report)
            window_steps += 1
            step_in_phase = clock.step - clock.phase_start_step
            epoch = step_in_phase / context.steps_per_epoch

            work.progress(clock.step, context.total_steps, "steps", last_loss)
            if step_in_phase % loop.log_steps == 0 or clock.step == phase_end:
                activity.now("waiting for the others")
                values, own_seconds = averages.means_and_all(ranks, lambda: context.take_own_seconds() / window_steps)  # noqa: B023  called at once
                _stop_if_diverged(training, values["loss"], window_steps)
                values["seconds_per_step"] = (time.monotonic() - window_start) / window_steps
                last_loss = values["loss"]
                if ranks.world_size > 1:
                    values["slowest_rank"] = _tell_stragglers(work, stragglers, own_seconds, values["seconds_per_step"])
                if log:
                    log.record(clock.step, epoch, values)
                averages, window_start, window_steps = Averages(), time.monotonic(), 0

            step_ended = time.monotonic()
            validated = step_in_phase % validate_steps == 0 or clock.step == phase_end
            metrics = _validate_and_show(training, epoch, log) if validated and len(training.val_rows) else {}

            due = validated or (loop.checkpoint_steps is not None and clock.step % loop.checkpoint_steps == 0)
            overdue = loop.checkpoint_minutes > 0 and time.monotonic() - last_save > loop.checkpoint_minutes * 60
            activity.now("waiting for the others")
            decision = dist.largest(STOP if work.stop.is_set else SAVE if due or overdue else CONTINUE, ranks)
            if decision != CONTINUE and saved_step != clock.step:
                activity.now("saving" if ranks.is_main else "waiting for the others")
                _save(training, metrics)
                last_save, saved_step = time.monotonic(), clock.step
            if validated or decision != CONTINUE:
                window_start += time.monotonic() - step_ended  # the pace of steps, not of what stands between them
            if decision == STOP:
                raise Interrupted(f"stopped by {work.stop.signal_name or 'another rank'} after step {clock.step}; saved, run again to go on")
        _go_back_to_best(training)
        clock.phase_start_step = phase_end


def _tell_stragglers(work: Work, stragglers: Stragglers, own_seconds: list[float], step_seconds: float) -> float:
    """Returns how many times the median the slowest rank takes for its own work."""
    work.slow, new = stragglers.window(own_seconds, step_seconds)
    for rank, factor in new if work.is_main else ():
        work.rank_is_slow(rank, factor)
    return max(own_seconds) / max(median(own_seconds), 1e-9)


def _prepare(work: Work, ranks: Ranks) -> Training:
    """Data, model and context, the same on every rank."""
    config: FamilyConfig = spec.family_config(work.stage.settings["config"])
    data = spec.DataSpec.model_validate(work.plan.data)
    store = open_store(data, work.plan.seed, work.run.cache, work.say)
    positive_only = config.trains_positive_only(data)
    rows, val_rows = store.select("train", positive_only), _select_or_empty(store, "val", positive_only)
    repeated: str | None = work.stage.settings["repeat"]
    if repeated is not None:
        rows, val_rows = np.sort(np.concatenate([rows, val_rows])), val_rows[:0]
    elif len(val_rows) == 0:
        work.say("no validation slices: best-val will not exist; give the data a val split to have it")
    val_rows = _evenly(val_rows, config.loop.validate_samples)
    model = build_model(work.stage.settings["config"]["model"], config, shape_of(config, store), work.plan.seed, work.stage.name)
    phases = model.phases() if repeated is None else _repeated_phases(work, repeated, model)
    stores = {store.size: store, **{phase.size: _of_size(work, data, phase.size, store) for phase in phases if phase.size != store.size}}
    for module in model.modules().values():
        module.to(ranks.device)
    relief = work.run.read_relief(work.stage.name, work.task.shard)
    if relief.micro_batch_divisor > 1:
        work.say(f"micro-batches {relief.micro_batch_divisor} times smaller than asked for: an earlier attempt had too little memory; the global batch is the same")
    context = Context(ranks, config.loop.precision, config.loop.micro_batch, relief.micro_batch_divisor, work.activity)
    problem = planning.uneven_batch((phase.batch_size for phase in phases), ranks.world_size)
    if problem is not None:
        raise InputError(f"{work.stage.name}: a batch of {problem}")
    context.total_steps = sum(_steps_in(phase, len(rows)) for phase in phases)
    work.say(f"{len(rows):,} training and {len(val_rows):,} validation slices of {store.size} px, {ranks.world_size} x {ranks.device_name}, "
             f"{'bf16 autocast' if context.use_bf16 else 'float32'}")
    return Training(work, ranks, config, stores, rows, val_rows, model, phases, context)


def _repeated_phases(work: Work, repeated: str, model: Model) -> list[Phase]:
    """Each for as many epochs as the best checkpoint of the other stage had then. Raises InputError if that stage chose nothing."""
    work.require(repeated)
    outcome = work.run.read_outcome(repeated, 0)
    best: dict[str, float] = outcome.facts["best_epochs"] if outcome is not None else {}
    chosen = [phase for phase in model.phases() if phase.epochs > 0]
    unknown = [phase.name for phase in chosen if phase.name not in best]
    if unknown:
        raise InputError(f"repeat: {repeated} has no best epoch of its phase {unknown[0]}: it had no val split to choose by; give the data one")
    for phase in chosen:
        work.say(f"{phase.name}: {best[phase.name]:g} epochs, as many as the best checkpoint of {repeated} had; on train and val together")
    return [replace(phase, epochs=best[phase.name] if phase.epochs > 0 else 0.0, select=None) for phase in model.phases()]


def _steps_in(phase: Phase, samples: int) -> int:
    return math.ceil(phase.epochs * samples / phase.batch_size)


def shape_of(config: FamilyConfig, store: SliceStore) -> DataShape:
    return DataShape(config.input_channels, store.size, store.classes if config.uses_labels else ())


def _of_size(work: Work, data: spec.DataSpec, size: int, full: SliceStore) -> SliceStore:
    """The same slices at another size. Raises InputError if other ones are left there."""
    store = open_store(data.model_copy(update={"size": size}), work.plan.seed, work.run.cache, work.say)
    if not store.rows["id"].equals(full.rows["id"]):
        raise InputError(f"data: at {size} px not the same slices are left as at {full.size} px, because small lesions vanish; write positive_only: false")
    return store


def build_model(family: str, config: FamilyConfig, shape: DataShape, seed: int, stream: str) -> Model:
    """A model with initial weights that depend on (seed, stream) alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.derive_seed(seed, f"{stream}/init"))
        model: Model = models.model_class(family)(config, shape)
    return model


def trained_model(found: Checkpoint, family: str, config: FamilyConfig, shape: DataShape, device: torch.device) -> Model:
    """A model with the weights of a checkpoint."""
    model = build_model(family, config, shape, 0, "loaded")
    for name, module in model.modules().items():
        module.load_state_dict(found.tensors(f"modules.{name}"))
        module.to(device)
    return model


def _select_or_empty(store: SliceStore, split: str, positive_only: bool) -> np.ndarray:
    try:
        return store.select(split, positive_only)
    except InputError:
        return np.array([], dtype=int)


def _evenly(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` rows, spread evenly over all patients and positions."""
    if len(rows) <= count:
        return rows
    return rows[np.arange(count) * len(rows) // count]


def _validate_steps(validate_epochs: float | None, phase: Phase, steps_per_epoch: float) -> int:
    if validate_epochs is not None:
        return max(1, round(validate_epochs * steps_per_epoch))
    return max(MIN_VALIDATE_STEPS, round(phase.epochs / 50 * steps_per_epoch))


def _my_positions(step: int, batch_size: int, ranks: Ranks) -> list[int]:
    """Positions in the run of this rank's share of the global batch at `step`."""
    share = batch_size // ranks.world_size
    first = step * batch_size + ranks.rank * share
    return list(range(first, first + share))


def _sample_order(positions: list[int], samples: int, seed: int, stream: str) -> np.ndarray:
    """Which sample stands at each position: a fresh permutation per epoch; a batch may reach into the next epoch."""
    return np.array([_epoch_order(samples, seed, stream, position // samples)[position % samples] for position in positions])


@lru_cache(maxsize=4)
def _epoch_order(samples: int, seed: int, stream: str, epoch: int) -> np.ndarray:
    return rng.permutation(samples, seed, stream, epoch)


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
    return {_of_phase(training, training.phase, name): {"value": values[f"val_{name}"], "better": better[name]} for name in better if f"val_{name}" in values}


def _of_phase(training: Training, phase: Phase, score: str) -> str:
    """The name of a metric in checkpoints: with the phase's if there are several, as what is good at one size says nothing of another."""
    name = "val" if score == "loss" else score
    return f"{name}_{phase.name}" if len(training.phases) > 1 else name


def _best_epochs(training: Training) -> dict[str, float]:
    """How many epochs each phase had behind it at its best checkpoint, by what it selects by, else by the validation loss."""
    known, found, start_step = commits.best(commits.committed(training.folder)), dict[str, float](), 0
    for phase in training.phases:
        name = _of_phase(training, phase, phase.select or "loss")
        if name in known:
            found[phase.name] = (known[name].step - start_step) * phase.batch_size / len(training.rows)
        start_step += _steps_in(phase, len(training.rows))
    return found


def _go_back_to_best(training: Training) -> None:
    """What a phase that selects hands on is its best checkpoint, not its last. Doing it twice changes nothing."""
    phase = training.phase
    if phase.select is None or not len(training.val_rows):
        return
    name = _of_phase(training, phase, phase.select)
    found = dist.on_main(lambda: _best_by(training, name), training.ranks)
    if found is None or found.step == training.clock.step:
        return
    training.work.say(f"{phase.name}: step {found.step} is the best-{name} of this phase; going on from there")
    _load_weights(training, found)
    if phase == training.phases[-1]:
        _save(training, {})


def _best_by(training: Training, name: str) -> Checkpoint | None:
    """Verified, it alone; None if no checkpoint has this metric."""
    known = commits.best(commits.committed(training.folder))
    return checkpoint.select(training.folder, f"best-{name}", training.work.say) if name in known else None


def _validate_and_show(training: Training, epoch: float, log: TrainingLog | None) -> dict[str, dict[str, Any]]:
    """On all ranks; rank 0 alone draws previews, for which the others wait longer than for a step. Returns what to select by."""
    clock, activity = training.clock, training.work.activity
    activity.now("validating")
    values = _validate(training)
    if log:
        log.record(clock.step, epoch, values)
        activity.now("validating")
    dist.on_main(lambda: _preview(training, log), training.ranks)
    return _metrics(training, values)


def _preview(training: Training, log: TrainingLog | None) -> None:
    """A few samples into TensorBoard, from the same noise and conditions each time; none if the training is to stop."""
    count = min(training.config.loop.preview_images, len(training.val_rows))
    if log is None or count == 0 or training.work.stop.is_set:
        return
    rows = _evenly(training.val_rows, count)
    given = training.given(rows)
    indices = [(number,) for number in range(count)]
    noise = SampleNoise(training.work.plan.seed, f"{training.work.stage.name}/preview", indices, training.ranks.device)
    images = training.model.sample(noise, given, training.config.preview_sampling())
    for name, channel in {**given.channels, **images}.items():
        log.images(name, channel, training.clock.step)


def _stop_if_diverged(training: Training, loss: float, steps: int) -> None:
    """Raise MedgenError if the loss is not finite, or has stayed far above its best for too long."""
    clock, loop = training.clock, training.config.loop
    advice = "lower lr, lengthen the warm-up or lower clip_norm; the last good checkpoint is kept"
    if not math.isfinite(loss):
        raise MedgenError(f"the loss became {loss} between steps {clock.step - steps + 1} and {clock.step}; {advice}")
    if not training.config.loss_falls:
        return
    clock.best_loss = min(clock.best_loss, loss)
    clock.steps_above = clock.steps_above + steps if loss > loop.divergence_factor * clock.best_loss else 0
    if clock.steps_above >= loop.divergence_steps:
        raise MedgenError(
            f"diverged: the loss ({loss:.4g}) has been more than {loop.divergence_factor:g} times its best ({clock.best_loss:.4g}) "
            f"for {clock.steps_above} steps, now step {clock.step}; {advice}"
        )


def _identity(training: Training) -> dict[str, Any]:
    """What must be equal for a checkpoint to continue this training."""
    work = training.work
    config = {key: value for key, value in work.stage.settings["config"].items() if key != "loop"}
    epochs = {phase.name: phase.epochs for phase in training.phases}  # a stage that repeats another one has that one's
    return {"config": config, "seed": work.plan.seed, "data": training.store.fingerprint, "size": training.store.size, "epochs": epochs}


def _save(training: Training, metrics: dict[str, dict[str, Any]]) -> None:
    """Write a checkpoint, all ranks together; `metrics`: what it may be selected by. What the retention policy does not keep goes first: its room may be needed."""
    clock, model, ranks = training.clock, training.model, training.ranks
    started, keep = time.monotonic(), training.config.loop.keep
    objects: dict[str, Any] = {f"modules.{name}": module.state_dict() for name, module in model.modules().items()}
    objects |= {f"optimizers.{name}": optimizer.state_dict() for name, optimizer in model.optimizers().items()}
    classes = shape_of(training.config, training.store).classes  # for whoever has this checkpoint and not the data
    state = {**_identity(training), "classes": classes, "clock": {**vars(clock), "best_loss": _finite_or_none(clock.best_loss)}}
    selects = training.phase.select is not None and len(training.val_rows) > 0  # then its best is kept, else its last
    if not selects and len(training.phases) > 1:
        metrics = {**metrics, f"{commits.LAST}{training.phase.name}": {"value": clock.step, "better": "higher"}}
    if ranks.is_main:
        checkpoint.prune(training.folder, keep)
    checkpoint.save(training.folder, clock.step, objects, state, metrics, ranks)
    if ranks.is_main:
        checkpoint.prune(training.folder, keep)
        _tell_of_short_grace(training, time.monotonic() - started)


def _tell_of_short_grace(training: Training, save_seconds: float) -> None:
    """Once, when a step and a save have been measured: whether both fit between the warning signal and the time limit."""
    work, grace_seconds = training.work, training.work.plan.place.grace_seconds
    step_seconds = work.run.slowest_step_seconds(work.stage.name)
    if training.grace_looked_at or work.plan.place.scheduler != "slurm" or step_seconds == 0.0:
        return
    training.grace_looked_at = True
    needed_seconds = grace_needed_seconds(step_seconds, save_seconds)
    if needed_seconds > grace_seconds:
        option = f"site.grace={needed_seconds + GRACE_SPARE_SECONDS}s"
        work.say(f"the grace of {grace_seconds} s is short for a step ({step_seconds:.1f} s), a checkpoint ({save_seconds:.1f} s) and {GRACE_SLACK_SECONDS} s of slack: "
                 f"at the time limit up to {training.config.loop.checkpoint_minutes:g} min of work may be lost; submit with -o {option}")
        work.run.event("grace_short", stage=work.stage.name, attempt=work.attempt, grace_seconds=grace_seconds, needed_seconds=needed_seconds,
                       step_seconds=round(step_seconds, 2), save_seconds=round(save_seconds, 2), option=option)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _resume(training: Training) -> None:
    """Load the newest checkpoint that verifies, if there is one. Raises InputError if it is of other data or settings."""
    found = dist.on_main(lambda: _newest_alone(training), training.ranks)
    if found is None:
        for line in training.model.describe(training.context.total_steps):
            training.work.say(line)
        if training.phases[-1].select is not None and len(training.val_rows):
            training.work.say(f"each phase hands on its best checkpoint by {training.phases[-1].select} on the val split")
        if training.config.start_from is not None:
            _start_from(training, training.config.start_from)
        return
    state = found.state()
    _load_weights(training, found)
    best_loss = state["clock"]["best_loss"]
    training.clock = Clock(**{**state["clock"], "best_loss": math.inf if best_loss is None else best_loss})
    training.work.say(f"resuming from {found.folder} (step {found.step} of {training.context.total_steps})")


def _start_from(training: Training, folder: Path) -> None:
    """Take over the weights of another training, and save them here: from now on nothing depends on that folder."""
    found = dist.on_main(lambda: checkpoint.open_verified(folder), training.ranks)
    there, here = found.state()["config"]["model"], training.work.stage.settings["config"]["model"]
    if there != here:
        raise InputError(f"start_from: {folder} is a checkpoint of the model {there}, not {here}")
    try:
        _load_weights(training, found)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"start_from: {folder} is of a network of another shape: {str(error).splitlines()[-1].strip()}; its config: {found.folder / commits.STATE}") from None
    training.model.check_start()
    training.work.say(f"starting from {folder} (its step {found.step})" + ("" if _has_optimizers(found) else "; it has no optimizers, which begin anew"))
    _save(training, {})


def _has_optimizers(found: Checkpoint) -> bool:
    """One that was converted from another system's weights may have none."""
    return any(name.startswith("optimizers.") for name in found.files)


def _load_weights(training: Training, found: Checkpoint) -> None:
    """And what the optimizers remember."""
    for name, module in training.model.modules().items():
        module.load_state_dict(found.tensors(f"modules.{name}", like=module.state_dict()))
    for name, optimizer in training.model.optimizers().items() if _has_optimizers(found) else ():
        optimizer.load_state_dict(found.tensors(f"optimizers.{name}", like=checkpoint.layout_of(optimizer)))


def _newest_alone(training: Training) -> Checkpoint | None:
    """On rank 0, for all: each file is verified once, and all ranks resume from the same step whatever their node sees yet."""
    skipped: list[str] = []
    found = checkpoint.newest(training.folder, skipped.append)
    for line in skipped:
        training.work.say(line)
        training.work.run.event("checkpoint_skipped", stage=training.work.stage.name, cause=line)
    if found is not None:
        check_identity(found, found.state(), _identity(training))
        checkpoint.set_aside_newer(training.folder, found)
    elif lost := last_logged_step(training.work.run.training_log(training.work.stage.name)):
        cause = f"it had come to step {lost}, but no checkpoint is left in {training.folder}: it starts from step 0"
        training.work.say(f"{training.work.stage.name}: {cause}")
        training.work.run.event("starts_over", stage=training.work.stage.name, cause=cause)
    return found


def check_identity(found: Checkpoint, state: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise InputError naming what differs between a checkpoint and what it is wanted for."""
    for key, meaning in (("config", "another model configuration"), ("data", "other data"), ("size", "another image size"), ("seed", "another seed"),
                         ("epochs", "other numbers of epochs")):
        if key in expected and state.get(key) != expected[key]:
            raise InputError(f"{found.folder}: this checkpoint is of {meaning}; use the run it belongs to, or another name for this one"
                             + _difference(state.get(key), expected[key]))


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        return f" (differs in: {', '.join(changed)})"
    return f" (checkpoint: {str(old)[:16]}, here: {str(new)[:16]})"


def _open_log(training: Training) -> TrainingLog:
    run, stage = training.work.run, training.work.stage.name
    return TrainingLog(
        run.training_log(stage), run.tensorboard(stage), training.clock.step, training.context.total_steps,
        training.work.say, bar=sys.stdout.isatty(),
    )


def _finish(training: Training) -> Done:
    """The files that make the stage DONE: the commits of every checkpoint kept, and the log."""
    run, stage = training.work.run, training.work.stage.name
    chosen = dist.on_main(lambda: checkpoint.selectable(training.folder, training.work.say), training.ranks)
    facts = {
        "steps": training.clock.step,
        "training_slices": len(training.rows),
        "data": training.store.fingerprint,
        "checkpoints": {selector: found.sha256 for selector, found in chosen.items()},
        "best_epochs": _best_epochs(training),
    }
    folders = {found.folder: found for found in chosen.values()}
    produced = [folder / name for folder, found in folders.items() for name in (*found.files, commits.COMMIT)]
    return Done([*produced, run.training_log(stage)] if training.ranks.is_main else [], facts)
