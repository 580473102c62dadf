"""The next batch, read and drawn by a thread while the device computes. Used by train.py's loop; the bytes are those of reading in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from medgen import rng
from medgen.models.base import Batch, Draw

Read = Callable[[int], Batch]  # a batch on the CPU, by its step


class Batches:
    """Hands out the batch of each step in turn. `read`: from memory maps, on the CPU."""

    def __init__(self, read: Read, device: torch.device, thread: ThreadPoolExecutor | None):
        self._read, self._device, self._thread = read, device, thread
        self._next: tuple[int, Future[Batch]] | None = None
        self._asked: frozenset[Draw] = frozenset()  # what noise the step before wanted: most likely this one wants it too

    def of(self, step: int, following: int | None) -> Batch:
        """The batch of `step` on the device. `following`: the step whose batch is read meanwhile; None at the end.

        Raises what reading it has raised."""
        if self._next is not None and self._next[0] == step:
            batch = self._next[1].result()
        else:
            batch = self._read(step)
        asked: set[Draw] = set()
        self._next = None
        moved = replace(batch.mapped(self._moved), asked=asked)
        if self._thread is not None and following is not None:
            self._next = following, self._thread.submit(self._read_and_draw, following, self._asked)
        return moved

    def learn(self, batch: Batch) -> None:
        """After a step: what noise to draw for the one after the next."""
        self._asked = frozenset(batch.asked)

    def _read_and_draw(self, step: int, asked: frozenset[Draw]) -> Batch:
        batch = self._read(step)
        indices = [(position,) for position in batch.positions]
        drawn = {(name, shape): self._pinned(rng.normal_per_sample(shape, batch.seed, f"{batch.stream}/{name}", indices)) for name, shape in asked}
        return replace(batch.mapped(self._pinned), drawn=drawn)

    def _pinned(self, tensor: Tensor) -> Tensor:
        """From where a GPU can fetch it by itself."""
        return tensor.pin_memory() if self._device.type == "cuda" else tensor

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


@contextmanager
def batches(read: Read, device: torch.device, ahead: bool) -> Iterator[Batches]:
    """`ahead`: with a thread, which has ended when this does, however it ends."""
    if not ahead:
        yield Batches(read, device, None)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="medgen-ahead") as thread:
        try:
            yield Batches(read, device, thread)
        finally:
            thread.shutdown(wait=True, cancel_futures=True)
