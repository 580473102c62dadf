"""Training: one loop for every model family. It owns data order, clock, signals and logging.

Called by `medgen train` through task.perform. What its checkpoints hold: resume.py; what it is judged by: validation.py. Everything random is a function of the sample's position in the run,
so a killed and resumed run gives the same weights as an uninterrupted one."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch

from medgen import checkpoint, commits, dist, fault, health, lr_search, planning, spec
from medgen.acceleration import recompute_activations
from medgen.activity import Stragglers
from medgen.ahead import Batches
from medgen.ahead import batches as batches_of
from medgen.context import Context
from medgen.data.store import SliceStore, open_store
from medgen.device import capability_of, reads_ahead, set_tf32, uses_tf32
from medgen.dist import Ranks
from medgen.errors import InputError, Interrupted
from medgen.models.base import Model, Phase
from medgen.models.settings import FamilyConfig
from medgen.records import Records, secret_key, secret_seed
from medgen.rehearsal import prepare_phase
from medgen.resume import go_back_to_best, resume, save, without_loop
from medgen.spec_data import DataSpec
from medgen.task import Done, Work
from medgen.train_log import Averages, TrainingLog
from medgen.training import Training, build_model, of_size, shape_of, steps_in
from medgen.validation import best_epochs, evenly, show_what_was_left_out, steps_between, validate_and_show

CPU = torch.device("cpu")
CONTINUE, SAVE, STOP = 0, 1, 2  # what ranks agree on after every step


def train(work: Work) -> Done:
    """Train one stage to its end, or until a signal: then save and raise Interrupted."""
    if work.stop.signal_name == "SIGTERM":  # the others may have ended by it already
        raise Interrupted("stopped by SIGTERM before the ranks met")
    work.activity.now("meeting the others")
    with dist.joined_ranks(work.stage.threads, work.rank_has_ended) as ranks:
        work.is_main, work.device_name = ranks.is_main, ranks.device_name
        work.activity.now("reading data")
        training = _prepare(work, ranks)
        resume(training)
        log = _open_log(training) if ranks.is_main else None
        try:
            show_what_was_left_out(training, log)
            ahead = reads_ahead(training.config.loop.read_ahead, ranks.device.type)
            with batches_of(lambda step: training.batch_of_step(step - training.clock.phase_start_step, CPU), ranks.device, ahead) as batches:
                _run(training, batches, log)
        finally:
            if log:
                log.close()
        work.activity.now("ending")
        return _finish(training)


def _run(training: Training, batches: Batches, log: TrainingLog | None) -> None:
    """The training loop."""
    work, ranks, model, clock, context = training.work, training.ranks, training.model, training.clock, training.context
    loop = training.config.loop
    window_start, timed_steps, last_loss = time.monotonic(), 0, None  # a window may have begun before this attempt: its time has not
    last_save, saved_step = time.monotonic(), clock.step
    activity, stragglers = work.activity, Stragglers()
    context.take_own_seconds()  # of what came before

    for number, phase in enumerate(training.phases):
        if number < clock.phase:
            continue  # finished before this attempt
        clock.phase = number
        samples = training.samples
        context.steps_per_epoch = samples / phase.batch_size
        phase_end = clock.phase_start_step + steps_in(phase, samples)
        validate_steps = steps_between(training, phase)
        activity.now("working")
        prepare_phase(training)
        window_start = time.monotonic()

        while clock.step < phase_end:
            context.step, context.phase = clock.step, number
            context.phase_progress = (clock.step - clock.phase_start_step) * phase.batch_size / (phase.epochs * samples)
            activity.now("reading data")
            batch = batches.of(clock.step, clock.step + 1 if clock.step + 1 < phase_end else None)
            activity.now("computing a step")
            report = model.step(batch, context)
            batches.learn(batch)
            activity.now("computing a step")
            clock.step += 1
            if fault.ARMED and fault.at("step", step=clock.step) == "nan":
                report.scalars["loss"] = report.scalars["loss"] * math.nan
            training.averages.add(report)
            clock.window_steps += 1
            timed_steps += 1
            step_in_phase = clock.step - clock.phase_start_step
            epoch = step_in_phase / context.steps_per_epoch

            work.progress(clock.step, context.total_steps, "steps", last_loss)
            if step_in_phase % loop.log_steps == 0 or clock.step == phase_end:
                activity.now("waiting for the others")
                values, own_seconds = training.averages.means_and_all(ranks, lambda: context.take_own_seconds() / timed_steps)  # noqa: B023  called at once
                health.stop_if_hopeless(training, values, clock.window_steps)
                health.tell_of_skipped(training, values, clock.window_steps)
                values["seconds_per_step"] = (time.monotonic() - window_start) / timed_steps
                last_loss = values["loss"]
                if ranks.world_size > 1:
                    values["slowest_rank"] = _tell_stragglers(work, stragglers, own_seconds, values["seconds_per_step"])
                if log:
                    log.record(clock.step, epoch, values)
                training.averages, clock.window_steps = Averages(), 0
                window_start, timed_steps = time.monotonic(), 0

            step_ended = time.monotonic()
            validated = step_in_phase % validate_steps == 0 or clock.step == phase_end
            metrics = validate_and_show(training, epoch, log) if validated else {}

            due = validated or (loop.checkpoint_steps is not None and clock.step % loop.checkpoint_steps == 0)
            overdue = loop.checkpoint_minutes > 0 and time.monotonic() - last_save > loop.checkpoint_minutes * 60
            activity.now("waiting for the others")
            decision = dist.largest(STOP if work.stop.is_set else SAVE if due or overdue else CONTINUE, ranks)
            if decision != CONTINUE and saved_step != clock.step:
                activity.now("saving" if ranks.is_main else "waiting for the others")
                save(training, metrics)
                last_save, saved_step = time.monotonic(), clock.step
            if validated or decision != CONTINUE:
                window_start += time.monotonic() - step_ended  # the pace of steps, not of what stands between them
            if decision == STOP:
                raise Interrupted(f"stopped by {work.stop.signal_name or 'another rank'} after step {clock.step}; saved, run again to go on")
        go_back_to_best(training)
        clock.phase_start_step = phase_end


def _tell_stragglers(work: Work, stragglers: Stragglers, own_seconds: list[float], step_seconds: float) -> float:
    """Returns how many times the median the slowest rank takes for its own work."""
    work.slow, new = stragglers.window(own_seconds, step_seconds)
    for rank, factor in new if work.is_main else ():
        work.rank_is_slow(rank, factor)
    return max(own_seconds) / max(median(own_seconds), 1e-9)


@dataclass(frozen=True)
class Slices:
    """What is trained on: the store at full size, and the rows of it. `repeated`: the stage whose choice is trained again."""

    data: DataSpec
    store: SliceStore
    rows: np.ndarray
    val_rows: np.ndarray
    repeated: str | None


def _prepare(work: Work, ranks: Ranks) -> Training:
    """Data, model and context, the same on every rank; the learning rate is searched if that is asked for and was not done yet."""
    config: FamilyConfig = spec.family_config(work.stage.settings["config"])
    slices, found = _slices(work, config), None
    if config.find_lr is not None:
        found = lr_search.found_once(work, ranks, config.find_lr, lambda: _assemble(work, ranks, lr_search.swept(config), slices))
        config = lr_search.with_lr(config, found)
    training = _assemble(work, ranks, config, slices)
    training.found_lr = found
    work.say(f"{len(slices.rows):,} training and {len(slices.val_rows):,} validation slices of {slices.store.size} px, {ranks.world_size} x {ranks.device_name}, "
             f"{'bf16 autocast' if training.context.use_bf16 else 'float32'}{', TF32' if uses_tf32(config.loop.precision, capability_of(ranks.device)) else ''}")
    return training


def prepare_search(work: Work, ranks: Ranks) -> Training:
    """A training whose model is there to be spoilt by `lr_search.search`."""
    config: FamilyConfig = spec.family_config(work.stage.settings["config"])
    return _assemble(work, ranks, lr_search.swept(config), _slices(work, config))


def _slices(work: Work, config: FamilyConfig) -> Slices:
    data = DataSpec.model_validate(work.plan.data)
    store = open_store(data, work.plan.seed, work.run.cache, work.say)
    if any(stage.kind == "train" and not spec.family_config(stage.settings["config"]).looks_at_val for stage in work.plan.stages):
        work.run.hide_data()
    positive_only = config.trains_positive_only(data)
    rows, val_rows = store.select("train", positive_only), _select_or_empty(store, "val", positive_only)
    if not config.looks_at_val:
        val_rows = val_rows[:0]
    repeated: str | None = work.stage.settings["repeat"]
    if repeated is not None:
        rows, val_rows = np.sort(np.concatenate([rows, val_rows])), val_rows[:0]
    elif not config.looks_at_val:
        work.say("real images are looked at in training alone, where it is counted: there is no validation, and no best checkpoint")
    elif len(val_rows) == 0:
        work.say("no validation slices: best-val will not exist; give the data a val split to have it")
    return Slices(data, store, rows, evenly(val_rows, config.loop.validate_samples), repeated)


def _assemble(work: Work, ranks: Ranks, config: FamilyConfig, slices: Slices) -> Training:
    """A fresh model for these slices. Raises InputError if the ranks cannot share its batches."""
    data, store = slices.data, slices.store
    records = _records(work, ranks, config, slices)
    shape = shape_of(config, store, records)
    model = build_model(work.stage.settings["config"]["model"], config, shape, work.plan.seed, work.stage.name)
    phases = model.phases() if slices.repeated is None else _repeated_phases(work, slices.repeated, model)
    stores = {store.size: store, **{phase.size: of_size(work, data, phase.size, store) for phase in phases if phase.size != store.size}}
    for module in model.modules().values():
        module.to(ranks.device)
    relief = work.run.read_relief(work.stage.name, work.task.shard)
    if relief.micro_batch_divisor > 1:
        work.say(f"micro-batches {relief.micro_batch_divisor} times smaller than asked for: an earlier attempt had too little memory; the global batch is the same")
    asked = config.loop.micro_batch
    context = Context(ranks, config.loop.precision, asked if isinstance(asked, int) else None, relief.micro_batch_divisor, work.activity)
    set_tf32(uses_tf32(config.loop.precision, capability_of(ranks.device)))
    problem = planning.uneven_batch((phase.batch_size for phase in phases), ranks.world_size)
    if problem is not None:
        raise InputError(f"{work.stage.name}: a batch of {problem}")
    context.total_steps = sum(steps_in(phase, shape.records or len(slices.rows)) for phase in phases)
    if config.loop.checkpoint_activations:
        recompute_activations(model.blocks())
    return Training(work, ranks, config, stores, slices.rows, slices.val_rows, model, shape, phases, context, records=records)


def _records(work: Work, ranks: Ranks, config: FamilyConfig, slices: Slices) -> Records | None:
    """Raises InputError if there are too few. A secret key is made by one rank."""
    sampling = config.record_sampling
    if sampling is None:
        return None
    path, seed = work.run.noise_key(work.stage.name), work.plan.seed
    if sampling.secret:
        key = dist.on_main(lambda: secret_key(path), ranks)
        seed = secret_seed(key, slices.store.fingerprint, without_loop(work.stage.settings["config"]))
    return Records(sampling, slices.rows, slices.store.rows["patient"].to_numpy()[slices.rows], seed, work.stage.name)


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


def _select_or_empty(store: SliceStore, split: str, positive_only: bool) -> np.ndarray:
    try:
        return store.select(split, positive_only)
    except InputError:
        return np.array([], dtype=int)


def _open_log(training: Training) -> TrainingLog:
    work = training.work
    return TrainingLog(work.run, work.stage.name, training.clock.step, training.context.total_steps, work.say, bar=sys.stdout.isatty())


def _finish(training: Training) -> Done:
    """The files that make the stage DONE: the commits of every checkpoint kept, and the log."""
    run, stage = training.work.run, training.work.stage.name
    chosen = dist.on_main(lambda: checkpoint.selectable(training.folder, training.work.say), training.ranks)
    facts = {
        "steps": training.clock.step,
        "training_slices": len(training.rows),
        "data": run.data_mark(training.store.fingerprint),
        "checkpoints": {selector: found.sha256 for selector, found in chosen.items()},
        "best_epochs": best_epochs(training),
        **({"found_lr": training.found_lr} if training.found_lr is not None else {}),
        "accelerated": training.accelerated,
        **training.model.facts(),
    }
    if training.ranks.is_main:
        run.noise_key(stage).unlink(missing_ok=True)  # from now on nobody can take the noise away
    folders = {found.folder: found for found in chosen.values()}
    produced = [folder / name for folder, found in folders.items() for name in (*found.files, commits.COMMIT)]
    return Done([*produced, *lr_search.files_of(run, stage), run.training_log(stage)] if training.ranks.is_main else [], facts)
