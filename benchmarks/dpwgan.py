"""What privacy costs a critic update of DP-WGAN-GP: both ways to the sum of clipped gradients beside an ordinary update, and the memory of the fast one.

Same critic, batch and optimizer on all sides; without clipping all must give the same gradient, or nothing is measured. The ordinary update is the
usual one of WGAN-GP, with real and fake images in one pass. CPU seconds of one thread, sides in turns and in changing order, the best of each:
others on the machine cost waiting time, which does not count. The noise is in none of them; it is measured for itself."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from medgen.models.dpwgan import per_record, two_pass
from medgen.models.dpwgan.networks import Critic
from medgen.models.dpwgan.records import Records

SIZES = (32, 64)
FEATURES = (8, 64)
BATCH = 32
CHUNK = {"two_pass": 16, "per_record": 8}  # records at a time
ROUNDS = {8: 8, 64: 4}  # by features
REFERENCE_ROUNDS = {8: 4, 64: 1}  # of per_record
MEMORY_BATCHES = ((64, 32), (64, 128), (128, 64))  # pixels, records; the last is the published size
PENALTY, CLIP_NORM = 10.0, 1.0
AGREE = 1e-4  # largest relative difference of the sides' gradients by their norm, in float32
WANTED = 2.5  # of the fast way with 64 features

Step = Callable[[], None]


def critic_of(features: int, size: int) -> Critic:
    torch.manual_seed(0)
    return Critic(features, size, 1)


def records_of(size: int, count: int) -> Records:
    generator = torch.Generator().manual_seed(size)
    real, fake = torch.rand((2, count, 1, 1, size, size), generator=generator) * 2 - 1
    return Records(real, fake, torch.rand((count, 1), generator=generator))


@dataclass
class Ordinary:
    """WGAN-GP as it is usually written."""

    critic: Critic
    records: Records

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.critic.parameters(), 1e-4, (0.5, 0.9))

    def gradients(self) -> None:
        real, fake, mixed = (images.flatten(0, 1) for images in (self.records.real, self.records.fake, self.records.mixed()))
        scores = self.critic(torch.cat([real, fake]))
        (slope,) = torch.autograd.grad(self.critic(mixed.requires_grad_()).sum(), mixed, create_graph=True)
        penalty = ((slope.flatten(1).square().sum(dim=1) + 1e-12).sqrt() - 1).square().mean()
        self.optimizer.zero_grad()
        (scores[len(real) :].mean() - scores[: len(real)].mean() + PENALTY * penalty).backward()

    def step(self) -> None:
        self.gradients()
        self.optimizer.step()


@dataclass
class Private:
    """The same with each record's gradient clipped, by one of the two ways."""

    critic: Critic
    records: Records
    route: ModuleType
    chunk: int

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.critic.parameters(), 1e-4, (0.5, 0.9))

    def gradients(self, clip_norm: float | None) -> None:
        found = self.route.clipped_sum(self.critic, self.records, PENALTY, clip_norm, self.chunk)
        for name, parameter in self.critic.named_parameters():
            parameter.grad = found.gradients[name].div_(len(self.records))

    def step(self) -> None:
        self.gradients(CLIP_NORM)
        self.optimizer.step()


def flat_gradient(critic: Critic) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in critic.parameters() if parameter.grad is not None])


def compared(features: int, size: int) -> dict[str, Any]:
    critic, records = critic_of(features, size), records_of(size, BATCH)
    ordinary = Ordinary(copy.deepcopy(critic), records)
    private = {name: Private(copy.deepcopy(critic), records, route, CHUNK[name]) for name, route in (("two_pass", two_pass), ("per_record", per_record))}
    ordinary.gradients()
    expected, differences = flat_gradient(ordinary.critic), {}
    for name, side in private.items():
        side.gradients(None)
        difference = float((flat_gradient(side.critic) - expected).norm() / expected.norm())
        if not difference < AGREE:
            raise SystemExit(f"{features} features, {size} px: {name} differs from the ordinary gradient by {difference:.2g} (allowed {AGREE:g})")
        differences[name] = float(f"{difference:.1e}")
    seconds = best_in_turns({"ordinary": ordinary.step, "two_pass": private["two_pass"].step}, ROUNDS[features])
    seconds |= best_in_turns({"per_record": private["per_record"].step}, REFERENCE_ROUNDS[features])
    draws = best_in_turns({"noise": lambda: [torch.randn_like(parameter) for parameter in critic.parameters()]}, ROUNDS[features])
    return {"parameters": sum(parameter.numel() for parameter in critic.parameters()), "largest_difference": differences,
            "cpu_seconds": {name: round(value, 4) for name, value in (seconds | draws).items()},
            "times_ordinary": {name: round(seconds[name] / seconds["ordinary"], 2) for name in private}}  # fmt: skip


def best_in_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU seconds of each, in one order and then in the other."""
    best = dict.fromkeys(sides, float("inf"))
    for number in range(rounds):
        for name in list(sides) if number % 2 else reversed(sides):
            start = time.process_time()
            sides[name]()
            best[name] = min(best[name], time.process_time() - start)
    return best


def print_peak(size: int, count: int) -> None:
    """Megabytes that this process held at most, before the sum and in it."""
    torch.set_num_threads(1)
    critic, records = critic_of(64, size), records_of(size, count)
    before = high_water_megabytes()
    two_pass.clipped_sum(critic, records, PENALTY, CLIP_NORM, CHUNK["two_pass"])
    print(before, high_water_megabytes())


def high_water_megabytes() -> int:
    """Of this program; what getrusage says is at least what the process that started it held."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) // 1024


def peak_megabytes(size: int, count: int) -> dict[str, int]:
    """In a process of its own: the high-water mark never falls."""
    code = f"from benchmarks.dpwgan import print_peak; print_peak({size}, {count})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.PIPE, text=True)
    before, peak = map(int, done.stdout.split())
    return {"before": before, "peak": peak}


def run() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"batch": BATCH, "chunk": CHUNK, "threads": 1, "wanted_times_ordinary": WANTED, "load_average_before": os.getloadavg()}
    for features in FEATURES:
        for size in SIZES:
            record[f"{features}_features_{size}px"] = found = compared(features, size)
            print(f"{features} features, {size} px: {found}", flush=True)
    record["megabytes_two_pass_64_features"] = {f"{size}px_{count}_records": peak_megabytes(size, count) for size, count in MEMORY_BATCHES}
    record["load_average_after"] = os.getloadavg()
    torch.set_num_threads(threads)
    return record
