"""What of a training is in its checkpoints: saving, going on from the newest, from another training, or from the best. Called by train.py."""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path
from typing import Any

from medgen import checkpoint, commits, dist, spec
from medgen.checkpoint import Checkpoint
from medgen.data.store import SliceStore
from medgen.errors import InputError
from medgen.models.settings import FamilyConfig
from medgen.plan import GRACE_SLACK_SECONDS, GRACE_SPARE_SECONDS, grace_needed_seconds
from medgen.train_log import Averages, last_logged_step
from medgen.training import Clock, Training, of_phase

# updates after this checkpoint may have been released with the other key already, in a later checkpoint, and the ledger would count them once
NOISE_IS_ANOTHER = "another key of its private noise, which a training removes when it ends: what was released since cannot be made again, and would have to be paid twice"


def resume(training: Training) -> None:
    """Load the newest checkpoint that verifies, if there is one. Raises InputError if it is of other data or settings."""
    found = dist.on_main(lambda: _newest_alone(training), training.ranks)
    if found is None:
        for line in training.model.describe(training.context.total_steps):
            training.work.say(line)
        if training.selects:
            training.work.say(f"each phase hands on its best checkpoint by {training.phase.select} on the val split")
        if training.config.start_from is not None:
            _start_from(training, training.config.start_from)
        return
    state = found.state()
    _load_weights(training, found)
    best_loss = state["clock"]["best_loss"]
    training.clock = Clock(**{**state["clock"], "best_loss": math.inf if best_loss is None else best_loss})
    if len(state["window"]) == training.ranks.world_size:  # on another number of ranks the window begins anew
        training.averages = Averages.restored(state["window"][training.ranks.rank], training.ranks.device)
    else:
        training.clock.window_steps = 0
    training.work.say(f"resuming from {found.folder} (step {found.step} of {training.context.total_steps})")


def _start_from(training: Training, folder: Path) -> None:
    """Take over the weights of another training, and save them here: from now on nothing depends on that folder."""
    found = take_over(training, folder)
    training.work.say(f"starting from {folder} (its step {found.step})" + ("" if _has_optimizers(found) else "; it has no optimizers, which begin anew"))
    save(training, {})


def take_over(training: Training, folder: Path) -> Checkpoint:
    """Load the weights of another training, and what its optimizers remember. Raises InputError if they do not fit, or are others than at submit."""
    found = dist.on_main(lambda: checkpoint.open_verified(folder), training.ranks)
    _check_that_it_counted(training, found)
    if found.sha256 != training.config.start_sha256:
        raise InputError(f"start_from: {folder} holds other weights than when this was submitted; submit it anew, as another run")
    for note in same_meaning(training.config, training.store, found.state(), folder):
        training.work.say(note)
    optimizers = training.model.optimizers().values()
    settings = [[{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups] for optimizer in optimizers]
    try:
        _load_weights(training, found)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"start_from: {folder} is of a network of another shape: {str(error).splitlines()[-1].strip()}; its config: {found.folder / commits.STATE}") from None
    for optimizer, groups in zip(optimizers, settings, strict=True):  # it remembers its moments; learning rate and betas are this training's
        for group, own in zip(optimizer.param_groups, groups, strict=True):
            group.update(own)
    training.model.check_start()
    return found


def same_meaning(config: FamilyConfig, store: SliceStore, state: dict[str, Any], folder: Path) -> list[str]:
    """Notes on what the weights of another training, whose state this is, knew by other names. Raises InputError where they know another number of things."""
    notes = []
    for name, used, ours in (("regions", config.takes_regions, store.regions), ("classes", config.uses_labels, store.classes if config.uses_labels else ())):
        theirs = tuple(state[name]) if name in state else ours  # checkpoints of earlier versions do not tell their regions
        if not used or theirs == ours:
            continue
        if len(theirs) != len(ours):
            raise InputError(f"start_from: {folder} knows the {name} {', '.join(theirs)}, and the data have {', '.join(ours)}; start from weights of as many, or without")
        notes.append(f"start_from: what {folder.name} knows as {', '.join(theirs)} becomes {', '.join(ours)}, in that order")
    return notes


def _check_that_it_counted(training: Training, found: Checkpoint) -> None:
    """Raise InputError if this training counts its looks at images that the other one has looked at without counting."""
    if training.config.looks_at_val:
        return
    state, fingerprint = found.state(), training.store.fingerprint
    counted = not spec.family_config(state["config"]).looks_at_val
    if not counted and state["data"] in (fingerprint, training.work.run.data_mark(fingerprint)):
        raise InputError(f"start_from: {found.folder} was trained on the same images without differential privacy, which nothing can make good; start from weights of other, public images")


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
        expected = identity(training)
        if found.step >= training.context.total_steps:
            expected.pop("noise", None)  # nothing more is drawn, and the key may be gone already
        check_identity(found, found.state(), expected)
        checkpoint.set_aside_newer(training.folder, found)
    elif lost := last_logged_step(training.work.run.training_log(training.work.stage.name)):
        cause = f"it had come to step {lost}, but no checkpoint is left in {training.folder}: it starts from step 0"
        training.work.say(f"{training.work.stage.name}: {cause}")
        training.work.run.event("starts_over", stage=training.work.stage.name, cause=cause)
    return found


def check_identity(found: Checkpoint, state: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise InputError naming what differs between a checkpoint and what it is wanted for."""
    for key, meaning in (("config", "another model configuration"), ("data", "other data"), ("size", "another image size"), ("seed", "another seed"),
                         ("epochs", "other numbers of epochs"), ("noise", NOISE_IS_ANOTHER)):
        if key in expected and state.get(key) != expected[key]:
            raise InputError(f"{found.folder}: this checkpoint is of {meaning}; use the run it belongs to, or another name for this one"
                             + _difference(state.get(key), expected[key]))


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        return f" (differs in: {', '.join(changed)})"
    return f" (checkpoint: {str(old)[:16]}, here: {str(new)[:16]})"


def identity(training: Training) -> dict[str, Any]:
    """What must be equal for a checkpoint to continue this training."""
    work = training.work
    config = without_loop(work.stage.settings["config"])
    if training.found_lr is not None:  # as if it had been written
        config |= {"find_lr": None, "lr": training.found_lr}
    epochs = {phase.name: phase.epochs for phase in training.phases}  # a stage that repeats another one has that one's
    found = {"config": config, "seed": work.plan.seed, "data": work.run.data_mark(training.store.fingerprint), "size": training.store.size, "epochs": epochs}
    if training.records is not None and training.records.sampling.secret:
        found["noise"] = hashlib.sha256(str(training.records.seed).encode()).hexdigest()
    return found


def without_loop(config: dict[str, Any]) -> dict[str, Any]:
    """What of a stage's configuration decides its weights."""
    return {key: value for key, value in config.items() if key != "loop"}


def save(training: Training, metrics: dict[str, dict[str, Any]]) -> None:
    """Write a checkpoint, all ranks together; `metrics`: what it may be selected by. What the retention policy does not keep goes first: its room may be needed."""
    clock, model, ranks = training.clock, training.model, training.ranks
    started, keep = time.monotonic(), training.config.loop.keep
    objects: dict[str, Any] = {f"modules.{name}": module.state_dict() for name, module in model.modules().items()}
    objects |= {f"optimizers.{name}": optimizer.state_dict() for name, optimizer in model.optimizers().items()}
    shape = training.shape
    known = {"classes": shape.classes, "regions": shape.regions, "vocabulary": shape.vocabulary}  # for whoever has this checkpoint and not the data
    state = {**identity(training), **known, "clock": {**vars(clock), "best_loss": _finite_or_none(clock.best_loss)},
             "window": dist.gathered(training.averages.state(), ranks)}
    if not training.selects and len(training.phases) > 1 and clock.step > clock.phase_start_step:
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


def go_back_to_best(training: Training) -> None:
    """What a phase that selects hands on is its best checkpoint, not its last. Doing it twice changes nothing."""
    phase = training.phase
    if not training.selects:
        return
    assert phase.select is not None, "it selects"
    name = of_phase(training, phase, phase.select)
    found = dist.on_main(lambda: _best_by(training, name), training.ranks)
    if found is None or found.step == training.clock.step:
        return
    training.work.say(f"{phase.name}: step {found.step} is the best-{name} of this phase; going on from there")
    _load_weights(training, found)
    if phase == training.phases[-1]:
        save(training, {})


def _best_by(training: Training, name: str) -> Checkpoint | None:
    """Verified, it alone; None if no checkpoint has this metric."""
    known = commits.best(commits.committed(training.folder))
    return checkpoint.select(training.folder, f"best-{name}", training.work.say) if name in known else None
