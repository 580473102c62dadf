"""The training of one trial: a fixed number of steps, the best of them chosen by real validation slices; it saves and goes on bit for bit.

Called by the utility and structure stages. AdamW; the learning rate rises over the first twentieth and falls to 0 as a cosine."""

from __future__ import annotations

import copy
import math
import shutil
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from medgen import checkpoint, fault
from medgen.errors import Interrupted, MedgenError
from medgen.task import Work
from medgen.utility.learners import Learner

LOOKS = 20  # at the validation slices, evenly over the steps, the last one included
WARM_UP = 0.05  # of the steps
SAVE_MINUTES = 5.0
LOG_STEPS = 10
KEEP = 2  # checkpoints: one may be damaged


@dataclass(frozen=True)
class Recipe:
    steps: int
    batch_size: int
    lr: float

    def rate(self, step: int) -> float:
        warm_up = max(1.0, WARM_UP * self.steps)
        return self.lr * min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / self.steps))

    @property
    def look_steps(self) -> int:
        return math.ceil(self.steps / LOOKS)


@dataclass
class Progress:
    """Where a trial stands. `looks`: step and quality of each look; `best`: the weights of the best so far."""

    step: int = 0
    looks: list[tuple[int, float]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)

    @property
    def chosen_step(self) -> int:
        """The earliest of the best looks; the last step where there were none."""
        return max(self.looks, key=lambda look: (look[1], -look[0]))[0] if self.looks else self.step


@dataclass(frozen=True)
class Fitted:
    network: nn.Module
    chosen_step: int
    looks: list[tuple[int, float]]


def fit(work: Work, learner: Learner, recipe: Recipe, identity: str, device: torch.device) -> Fitted:
    """Train, or go on where an earlier attempt saved. Raises Interrupted, with everything saved, if the task is asked to stop.

    `identity`: of the data; what was saved from other data is begun anew."""
    network = learner.network.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr)
    progress = _resumed(work, network, optimizer, recipe, identity)
    last_save = time.monotonic()
    told: float | None = None
    while progress.step < recipe.steps:
        work.activity.now("computing a step")
        loss = _step(learner, network, optimizer, recipe, progress.step, device)
        progress.step += 1
        at_end = progress.step == recipe.steps
        if progress.step % LOG_STEPS == 0 or at_end:
            told = _finite(float(loss), progress.step, recipe)
        work.progress(progress.step, recipe.steps, "steps", told)
        if fault.ARMED:
            fault.at("step", step=progress.step)
        if len(learner.validation) and (progress.step % recipe.look_steps == 0 or at_end):
            work.activity.now("validating")
            _look(learner, network, progress, device)
        stopping = work.stop.is_set and not at_end
        if stopping or time.monotonic() - last_save > SAVE_MINUTES * 60:
            work.activity.now("saving")
            _save(work, network, optimizer, progress, identity)
            last_save = time.monotonic()
        if stopping:
            raise Interrupted(f"stopped by {work.stop.signal_name} after step {progress.step}; saved, run again to go on")
    if progress.best:
        network.load_state_dict(progress.best)
    work.say(f"step {progress.chosen_step} of {recipe.steps} is taken" + (f", the best of {len(progress.looks)} by the val split" if progress.looks else ", the last"))
    return Fitted(network, progress.chosen_step, progress.looks)


def _step(learner: Learner, network: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, step: int, device: torch.device) -> torch.Tensor:
    network.train()
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate(step)
    images, targets = learner.batch(range(step * recipe.batch_size, (step + 1) * recipe.batch_size), device)
    loss = learner.loss(network(images), targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _finite(loss: float, step: int, recipe: Recipe) -> float:
    if not math.isfinite(loss):
        raise MedgenError(f"the loss became {loss} before step {step}; write a smaller lr than {recipe.lr:g}")
    return loss


def _look(learner: Learner, network: nn.Module, progress: Progress, device: torch.device) -> None:
    progress.looks.append((progress.step, learner.quality(network, device)))
    if progress.chosen_step == progress.step:
        progress.best = copy.deepcopy(network.state_dict())


def _save(work: Work, network: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, identity: str) -> None:
    folder = work.run.trial(work.stage.name, work.task.shard)
    objects = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "best": progress.best}
    checkpoint.save(folder, progress.step, objects, {"looks": progress.looks, "identity": identity, "task_hash": work.task.hash}, {})
    checkpoint.prune(folder, KEEP)


def _resumed(work: Work, network: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, identity: str) -> Progress:
    folder = work.run.trial(work.stage.name, work.task.shard)
    found = checkpoint.newest(folder, work.say)
    if found is None:
        return Progress()
    state = found.state()
    if (state["identity"], state["task_hash"]) != (identity, work.task.hash):
        work.say(f"{found.folder} was saved from other images; this trial begins anew")
        shutil.rmtree(folder)
        return Progress()
    checkpoint.set_aside_newer(folder, found)
    network.load_state_dict(found.tensors("network"))
    optimizer.load_state_dict(found.tensors("optimizer"))
    work.say(f"resuming from {found.folder} (step {found.step} of {recipe.steps})")
    return Progress(found.step, [(step, quality) for step, quality in state["looks"]], found.tensors("best"))
