"""Ranks and devices: who am I, which device is mine, and what all ranks agree on. Used by train.py and task.py."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from medgen import fault, lifeline
from medgen.errors import Interrupted, MedgenError
from medgen.world import rank_from_environment

COLLECTIVE_TIMEOUT = timedelta(minutes=5)  # a dead rank frees the others after this at the latest
SLOW_TIMEOUT = timedelta(hours=1)  # while one rank writes or verifies a checkpoint; one that has died is noticed at once
MEETING_SECONDS = 120
RETRY_SECONDS = 1.0

T = TypeVar("T")


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


ALONE = Ranks(0, 1, 0, torch.device("cpu"))  # a process that nobody waits for


@contextmanager
def joined_ranks(threads: int, gone: lifeline.Gone = lambda rank: None) -> Iterator[Ranks]:
    """Set threads and device, join the process group if there are several ranks, and leave it at the end.

    `gone`: called from a thread when another rank's process has ended before its work."""
    torch.set_num_threads(threads)
    rank, world_size, local_rank = rank_from_environment()
    device = torch.device("cpu")
    promised = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if promised and torch.backends.cuda.is_built() and not torch.cuda.is_available():
        raise MedgenError(f"no GPU can be used on {socket.gethostname()}, although the job was given {promised}: the node or its driver is broken")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    ranks = Ranks(rank, world_size, local_rank, device)
    if world_size == 1:
        yield ranks
        return
    # gloo beside NCCL: agreements about stopping are made on the CPU and never wait for the GPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with _ended_by_term():
        if fault.ARMED:
            fault.at("rdzv")
        store = meet(rank, world_size, *master, MEETING_SECONDS)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    try:
        with lifeline.held(rank, world_size, store, master, gone) as leave:
            try:
                yield ranks
            except Interrupted:  # all ranks have agreed on it
                leave()
                raise
            leave()
    finally:
        distributed.destroy_process_group()


@contextmanager
def _ended_by_term() -> Iterator[None]:
    """TERM ends the process at once: who waits for the others in C hears of no flag, and there is nothing to save yet."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def meet(rank: int, world_size: int, address: str, port: int, timeout_seconds: float) -> distributed.Store:
    """The store where all ranks find each other, at rank 0 (under torchrun at its agent).

    Raises MedgenError that says who could not reach what, within `timeout_seconds`."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = distributed.TCPStore(address, port, world_size, is_master=False, timeout=timedelta(seconds=timeout_seconds))
        # the agent's store is used by every attempt it makes
        return distributed.PrefixStore(f"medgen/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    here = f"rank {rank} on {socket.gethostname()}"
    if rank != 0:
        _wait_for(address, port, timeout_seconds, here)
    try:
        return distributed.TCPStore(address, port, world_size, is_master=rank == 0, timeout=timedelta(seconds=timeout_seconds))
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:300]
        raise MedgenError(f"the ranks could not meet: {here}, at {address}:{port}, {world_size} ranks expected within {timeout_seconds:g} s: {reason}") from None


def _wait_for(address: str, port: int, timeout_seconds: float, here: str) -> None:
    """Return when somebody listens there. Raises MedgenError when nobody does in time, naming what was tried."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
        except socket.gaierror:
            problem = f"the name {address} is known to no name service here; give the node's address in slurm.conf (NodeAddr) or in /etc/hosts"
        except OSError as error:
            problem = f"{error.strerror or error}; is a firewall between the nodes, or has rank 0 ended? See its log"
        else:
            return
        if time.monotonic() > deadline:
            raise MedgenError(f"the ranks could not meet: {here} could not reach rank 0 at {address}:{port} within {timeout_seconds:g} s: {problem}")
        time.sleep(RETRY_SECONDS)


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


def sum_in_place(tensors: Sequence[Tensor], ranks: Ranks) -> None:
    """Replace every tensor by its sum over ranks, in one flat message per dtype."""
    if ranks.world_size == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for alike in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        distributed.all_reduce(flat)
        start = 0
        for tensor in alike:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()


def average_gradients(parameters: list[nn.Parameter], ranks: Ranks) -> None:
    """Replace every .grad by its mean over ranks."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sum_in_place(gradients, ranks)
    if ranks.world_size > 1:
        for gradient in gradients:
            gradient /= ranks.world_size


_slow_groups: dict[distributed.ProcessGroup, distributed.ProcessGroup] = {}  # by the default group of the time


def slow_group() -> distributed.ProcessGroup:
    """For messages about files that may take minutes: on the CPU, and patient. All ranks ask for it together."""
    default = distributed.group.WORLD
    assert default is not None
    if default not in _slow_groups:
        _slow_groups.clear()
        _slow_groups[default] = distributed.new_group(backend="gloo", timeout=SLOW_TIMEOUT)
    return _slow_groups[default]


def gathered(value: T, ranks: Ranks) -> list[T]:
    """The value of every rank, in order, on every rank. What may be sent is what pickle can carry."""
    if ranks.world_size == 1:
        return [value]
    values: list[Any] = [None] * ranks.world_size
    distributed.all_gather_object(values, value, group=slow_group())
    return values


def agree(problem: Exception | None, ranks: Ranks) -> None:
    """Raise on all ranks if any rank has a problem: the same words, those of the first rank that has one."""
    own = problem
    if problem is not None and not isinstance(problem, MedgenError):
        problem = MedgenError(f"rank {ranks.rank} on {socket.gethostname()}: {type(problem).__name__}: {problem}")
    first = next((item for item in gathered(problem, ranks) if item is not None), None)
    if first is None:
        return
    if own is not None and not isinstance(own, MedgenError):
        raise own  # a defect: its traceback belongs in this rank's log
    raise first


def on_main(function: Callable[[], T], ranks: Ranks) -> T:
    """What rank 0 gets from `function`, on all ranks; if it raises there, all ranks raise."""
    value, problem = None, None
    if ranks.is_main:
        try:
            value = function()
        except Exception as error:
            problem = error
    agree(problem, ranks)
    return gathered(value, ranks)[0]  # type: ignore[return-value]  # None only where it raised
