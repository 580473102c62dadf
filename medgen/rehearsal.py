"""Steps that leave no trace: how much memory a part of a batch needs, whether the compiler copes. Called by train.py before a phase begins."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from medgen import dist
from medgen.acceleration import compile_networks, try_compiled
from medgen.context import Context
from medgen.device import capability_of, compiles
from medgen.dist import Ranks
from medgen.errors import MedgenError
from medgen.models.base import Model
from medgen.training import Training

MARGIN = 0.1  # of the memory stays free: fragments, and what validation and other ranks' messages need
GIB = 2**30
SMALL_PARTS = (1, 2)  # sizes that are measured, in multiples of what must stay together


def prepare_phase(training: Training) -> None:
    """Find the part of a batch that fits, then compile for it, where that was asked for. All ranks do alike; says what came of it."""
    loop, ranks, work = training.config.loop, training.ranks, training.work
    facts: dict[str, Any] = {}
    if loop.micro_batch == "auto":
        facts["micro_batch"], words = _fitting(training)
        work.say(f"micro-batches of {training.context.micro_batch} samples: {words}")
    steps_left = training.context.total_steps - training.clock.step
    if "compile" in training.config.offers and all(dist.gathered(compiles(loop.compile, capability_of(ranks.device), steps_left), ranks)):
        if training.compiled is None:
            training.compiled = compile_networks(training.model.compiled_networks(), work.run.cache)
        facts["compiled"] = try_compiled(
            training.compiled, lambda: _rehearse(training, training.context.part_size(_share(training))), lambda well: all(dist.gathered(well, ranks)),
        )  # fmt: skip
        work.say(facts["compiled"])
    if facts:
        training.accelerated[training.phase.name] = facts


def _fitting(training: Training) -> tuple[int, str]:
    """Sets the context's micro-batch to what fits on every rank's GPU. On the CPU, where nobody tells how much a step takes, to the whole share."""
    ranks, context, share = training.ranks, training.context, _share(training)
    if ranks.device.type != "cuda":
        context.micro_batch = share
        return share, "the whole share, since there is no GPU whose memory could be too small"
    with without_trace(training.model, ranks.device):
        fit = largest_part(share, training.config.micro_batch_multiple, lambda samples: _step(training, samples), GpuMemory(ranks.device))
    context.micro_batch = min(dist.gathered(fit.samples, ranks))
    return context.micro_batch, fit.words + ("; another GPU has room for no more" if context.micro_batch < fit.samples else "")


def _share(training: Training) -> int:
    return training.phase.batch_size // training.ranks.world_size


def _rehearse(training: Training, samples: int) -> None:
    with without_trace(training.model, training.ranks.device):
        _step(training, samples)


def _step(training: Training, samples: int) -> None:
    """A step of this rank alone with parts of so many samples; two of them if there are two, since gradients are then kept beside the second."""
    clock, real = training.clock, training.context
    ranks = Ranks(0, 1, training.ranks.local_rank, training.ranks.device)
    alone = Context(ranks, training.config.loop.precision, samples)
    alone.step, alone.total_steps, alone.steps_per_epoch = clock.step, real.total_steps, real.steps_per_epoch
    alone.rehearsing = True
    alone.phase, alone.phase_progress = clock.phase, real.phase_progress
    positions = list(range(min(2 * samples, _share(training))))
    rows = training.rows[np.resize(np.arange(len(training.rows)), len(positions))]
    try:
        training.model.step(training.batch(rows, positions, "rehearsal"), alone)
    finally:
        for module in training.model.modules().values():
            module.zero_grad(set_to_none=True)


class Memory(Protocol):
    """Of the device that trains, as its allocator tells it."""

    def measured(self, work: Callable[[], None]) -> int:
        """Runs the work; returns the most bytes that were taken meanwhile, with what was there before. Raises torch.OutOfMemoryError."""
        ...

    def limit(self) -> int:
        """Bytes that this process may take, with those it has."""
        ...


class GpuMemory:
    """Of one NVIDIA GPU."""

    def __init__(self, device: torch.device):
        self.device = device

    def measured(self, work: Callable[[], None]) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_reserved(self.device)

    def limit(self) -> int:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)  # others may be on this GPU too
        return free + torch.cuda.memory_reserved(self.device)


@dataclass(frozen=True)
class Fit:
    """`samples`: of a part that fits; `words`: how it was found."""

    samples: int
    words: str


def largest_part(share: int, multiple: int, step: Callable[[int], None], memory: Memory) -> Fit:
    """The most samples of a rank's share in one backward pass: measured at two small sizes, a straight line through both, tried once.

    step: a training step with parts of so many samples. Raises MedgenError if not even the smallest fits."""
    small, next_small = (size * multiple for size in SMALL_PARTS)
    if share <= small:
        return Fit(share, "the whole share, which is as small as can be")
    try:
        step(small)  # from now on the optimizer has its own memory, as in every step but the first
    except torch.OutOfMemoryError as error:
        raise MedgenError(f"loop.micro_batch: auto: not even {small} sample{'s' if small > 1 else ''} fit: {str(error).splitlines()[0]}; "
                          "take a GPU with more memory, a smaller network, or loop.checkpoint_activations: true") from None
    limit = (1 - MARGIN) * memory.limit()
    lower = memory.measured(lambda: step(small))
    try:
        upper = memory.measured(lambda: step(next_small))
    except torch.OutOfMemoryError:
        return Fit(small, f"{next_small} do not fit")
    per_sample = max(upper - lower, 1) / (next_small - small)
    words = f"{small} and {next_small} samples took {lower / GIB:.2f} and {upper / GIB:.2f} GiB, {limit / GIB:.1f} GiB may be used"
    wanted = even_part(share, small + max(0, int((limit - lower) / per_sample)), multiple)
    if wanted <= next_small:
        return Fit(wanted, words)
    try:
        fits = memory.measured(lambda: step(wanted)) <= limit
    except torch.OutOfMemoryError:
        fits = False
    if not fits:
        return Fit(even_part(share, wanted // 2, multiple), f"{words}; {wanted} were too many when tried, so half of it")
    return Fit(wanted, words)


def even_part(share: int, most: int, multiple: int) -> int:
    """The share in as few parts as `most` allows, as equal as can be: a last part of another size would be compiled on its own."""
    parts = -(-share // max(multiple, min(share, most) // multiple * multiple))
    return min(share, -(-share // (parts * multiple)) * multiple)


@contextmanager
def without_trace(model: Model, device: torch.device) -> Iterator[None]:
    """Whatever is done to a model inside is undone: weights, buffers, averages, optimizers, gradients, generators, bit for bit; also after an error."""
    modules, optimizers = model.modules(), model.optimizers()
    kept = {name: _on_cpu(module.state_dict()) for name, module in modules.items()}
    settings = {name: _on_cpu(optimizer.state_dict()) for name, optimizer in optimizers.items()}
    trained = [(parameter, parameter.requires_grad) for module in modules.values() for parameter in module.parameters()]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for parameter, requires_grad in trained:  # a step that was broken off may have left them otherwise
            parameter.grad = None
            parameter.requires_grad_(requires_grad)
        for name, module in modules.items():
            module.load_state_dict(kept[name])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(settings[name])
        gc.collect()  # an error's traceback holds activations
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _on_cpu(state: Any) -> Any:
    return tree_map(lambda item: item.detach().to("cpu", copy=True) if isinstance(item, Tensor) else copy.copy(item), state)
