"""Ranks and devices: who am I, which device is mine, and what all ranks agree on. Used by train.py and task.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as distributed
from torch import Tensor, nn

COLLECTIVE_TIMEOUT = timedelta(minutes=5)  # a dead rank frees the others after this at the latest


@dataclass(frozen=True)
class Ranks:
    """This process's place. World size 1 needs no process group."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"


def rank_from_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) from srun's step or torchrun's variables; (0, 1, 0) outside of both.

    A batch script's own shell has SLURM_PROCID too, so only a step's task count makes a world."""
    environment = os.environ
    if "SLURM_STEP_NUM_TASKS" in environment:
        return int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_LOCALID"])
    if "WORLD_SIZE" in environment:
        return int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_RANK", "0"))
    return 0, 1, 0


@contextmanager
def joined_ranks(threads: int) -> Iterator[Ranks]:
    """Set threads and device, join the process group if there are several ranks, and leave it at the end."""
    torch.set_num_threads(threads)
    rank, world_size, local_rank = rank_from_environment()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if world_size > 1:
        # gloo beside NCCL: agreements about stopping are made on the CPU and never wait for the GPU
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    try:
        yield Ranks(rank, world_size, local_rank, device)
    finally:
        if world_size > 1:
            distributed.destroy_process_group()


def largest(number: int, ranks: Ranks) -> int:
    """The largest of all ranks' numbers: how ranks agree to save or to stop."""
    if ranks.world_size == 1:
        return number
    tensor = torch.tensor(number)
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    return int(tensor)


def sum_over_ranks(values: Tensor, ranks: Ranks) -> Tensor:
    """Element-wise sum of a CPU tensor over all ranks."""
    if ranks.world_size > 1:
        distributed.all_reduce(values)
    return values


def barrier(ranks: Ranks) -> None:
    if ranks.world_size > 1:
        largest(0, ranks)


def average_gradients(parameters: list[nn.Parameter], ranks: Ranks) -> None:
    """Replace every .grad by its mean over ranks, in one flat message per dtype."""
    if ranks.world_size == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= ranks.world_size
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()
