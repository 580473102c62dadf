"""What the loop offers a model's step: precision, data parallelism, accumulation. Built by train.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from medgen import dist
from medgen.dist import Ranks
from medgen.errors import InputError
from medgen.models.base import Batch


class Context:
    """Implements models.base.StepContext for one process."""

    def __init__(self, ranks: Ranks, precision: Literal["auto", "fp32", "bf16"], micro_batch: int | None, micro_batch_divisor: int = 1):
        self.ranks = ranks
        self.step = 0
        self.total_steps = 0
        self.steps_per_epoch = 1.0
        self.use_bf16 = _use_bf16(ranks.device, precision)
        self._micro_batch, self._divisor = micro_batch, micro_batch_divisor
        self._wrapped: dict[int, nn.Module] = {}

    def autocast(self) -> AbstractContextManager[None]:
        if not self.use_bf16:
            return nullcontext()
        return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16)

    def parallel(self, module: nn.Module) -> nn.Module:
        if self.ranks.world_size == 1:
            return module
        if id(module) not in self._wrapped:
            on_gpu = self.ranks.device.type == "cuda"
            # DDP regroups its buckets after the first step of a process, and sums change in their last bit with the grouping:
            # looking for unused parameters keeps the first grouping, so that a resumed run on the CPU equals an uninterrupted one
            self._wrapped[id(module)] = DistributedDataParallel(
                module, device_ids=[self.ranks.device] if on_gpu else None, gradient_as_bucket_view=True, find_unused_parameters=not on_gpu
            )
        return self._wrapped[id(module)]

    def micro_batches(self, batch: Batch, module: nn.Module) -> Iterator[tuple[Batch, float]]:
        size = max(1, -(-(self._micro_batch or len(batch)) // self._divisor))
        last_start = (len(batch) - 1) // size
        for number, part in enumerate(batch.split(size)):
            silent = isinstance(module, DistributedDataParallel) and number < last_start
            with module.no_sync() if silent else nullcontext():  # type: ignore[operator]
                yield part, len(part) / len(batch)

    def reduce_gradients(self, parameters: list[nn.Parameter]) -> None:
        dist.average_gradients(parameters, self.ranks)


def _use_bf16(device: torch.device, precision: str) -> bool:
    """bf16 only where the hardware has it: emulated, it is three times slower than float32."""
    has_units = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "bf16" and not has_units:
        raise InputError(f"loop.precision: bf16: this device ({device.type}) has no bf16 units; write auto or fp32")
    return has_units and precision != "fp32"
