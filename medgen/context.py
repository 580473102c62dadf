"""What the loop offers a model's step: precision, data parallelism, accumulation. Built by train.py."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medgen import dist
from medgen.activity import Activity
from medgen.device import capability_of, uses_bf16
from medgen.dist import Ranks
from medgen.models.base import Batch

MEASURED_FORWARDS = 64  # of a logging window, on a GPU


class Context:
    """Implements models.base.StepContext for one process; `activity` learns what a step does."""

    def __init__(
        self, ranks: Ranks, precision: Literal["auto", "fp32", "bf16"], micro_batch: int | None, micro_batch_divisor: int = 1, activity: Activity | None = None
    ):
        self.ranks = ranks
        self.activity = activity or Activity()
        self.step = 0
        self.total_steps = 0
        self.steps_per_epoch = 1.0
        self.phase = 0
        self.phase_progress = 0.0
        self.rehearsing = False
        self.use_bf16 = uses_bf16(precision, ranks.device.type, capability_of(ranks.device))
        self.micro_batch, self._divisor = micro_batch, micro_batch_divisor
        self._wrapped: dict[int, nn.Module] = {}
        self._forward_began = 0.0
        self._forwards: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # begin and end
        self._forward_event: torch.cuda.Event | None = None  # the begin of one that is measured

    def autocast(self) -> AbstractContextManager[None]:
        if not self.use_bf16:
            return nullcontext()
        return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16)

    def parallel(self, module: nn.Module) -> nn.Module:
        if self.ranks.world_size == 1:
            return module
        if id(module) not in self._wrapped:
            on_gpu = self.ranks.device.type == "cuda"
            # of the module inside: DDP's own forward may wait for the other ranks' buffers
            module.register_forward_pre_hook(self._forward_begins)
            module.register_forward_hook(self._forward_ends)
            # DDP regroups its buckets after the first step of a process, and sums change in their last bit with the grouping:
            # looking for unused parameters keeps the first grouping, so that a resumed run on the CPU equals an uninterrupted one
            self._wrapped[id(module)] = DistributedDataParallel(
                module, device_ids=[self.ranks.device] if on_gpu else None, gradient_as_bucket_view=True, find_unused_parameters=not on_gpu
            )
        return self._wrapped[id(module)]

    def part_size(self, samples: int) -> int:
        """Of so many samples of a rank, how many are in one backward pass."""
        return max(1, -(-(self.micro_batch or samples) // self._divisor))

    def micro_batches(self, batch: Batch, module: nn.Module) -> Iterator[tuple[Batch, float]]:
        size = self.part_size(len(batch))
        last_start = (len(batch) - 1) // size
        for number, part in enumerate(batch.split(size)):
            silent = isinstance(module, DistributedDataParallel) and number < last_start
            with module.no_sync() if silent else nullcontext():  # type: ignore[operator]
                yield part, len(part) / len(batch)

    def reduce_gradients(self, parameters: list[nn.Parameter]) -> None:
        self.activity.now("exchanging gradients")
        dist.average_gradients(parameters, self.ranks)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        self.activity.now("exchanging gradients")
        dist.sum_in_place(tensors, self.ranks)

    def mean(self, value: Tensor) -> Tensor:
        return dist.sum_over_ranks(value.detach().clone(), self.ranks) / self.ranks.world_size

    def take_own_seconds(self) -> float:
        """Of reading and computing before the first exchange with other ranks, since the last call. Does not wait for the GPU: call it after what did."""
        for begin, end in self._forwards:
            if end.query():
                self.activity.add_own(begin.elapsed_time(end) / 1000)
        self._forwards.clear()
        return self.activity.take_own_seconds()

    def _forward_begins(self, module: nn.Module, arguments: Any) -> None:
        if self.activity.doing == "validating":
            return
        self.activity.now("computing a step")
        self._forward_began = time.monotonic()
        if self.ranks.device.type == "cuda" and len(self._forwards) < MEASURED_FORWARDS:
            self._forward_event = _recorded()

    def _forward_ends(self, module: nn.Module, arguments: Any, result: Any) -> None:
        if self.activity.doing != "computing a step":
            return
        if self._forward_event is not None:
            self._forwards.append((self._forward_event, _recorded()))
            self._forward_event = None
            self.activity.add_own(self._forward_began - time.monotonic())  # the GPU's time counts instead of the time to start its kernels
        self.activity.now("exchanging gradients")


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
