"""What a training step, a sampling and a training's memory cost with semantic diffusion, and how near its arithmetic comes to plain convolutions.

The step is `Model.step` with all that it does; operations are counted by torch's counter, so that what is achieved can be held against 3x3
convolutions of the network's own widths on the same machine in the same run: nothing made of convolutions can be faster. Sampling with and without
modulation worked out beforehand is the same images. Memory is that of a process of its own. CPU seconds of one thread, sides taken in turns."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.pacgan import in_turns
from medgen.acceleration import recompute_activations
from medgen.context import Context
from medgen.dist import ALONE
from medgen.models.base import Batch, DataShape
from medgen.models.sdm.config import Config
from medgen.models.sdm.model import Model
from medgen.models.sdm.networks import SemanticUNet

REGIONS = ("myocardium", "left_ventricle")
BATCHES = {64: 4, 128: 2}  # images per step, by pixels per side
REFERENCE_GFLOP = {64: 46.7, 128: 118.0}  # forward, per image, of the published network with 64 channels and 7 classes
ROUNDS = 5
WANTED_CACHED = 1.5  # times faster a sampling step with modulation worked out beforehand
AGREE = 1e-5
CONV_ROUNDS = 5
MEMORY_SIZE = 128


def made(size: int) -> tuple[Model, Batch]:
    config = Config.model_validate({"told": [], "channels": 64, "batch_size": BATCHES[size], "warmup_epochs": 0.0, "ema": None})
    torch.manual_seed(0)
    model = Model(config, DataShape(config.input_channels, size, regions=REGIONS))
    with torch.no_grad():  # layers that begin at zero would make a network that computes nothing
        for parameter in model.network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    generator, count = torch.Generator().manual_seed(1), BATCHES[size]
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    radius = torch.hypot(rows - size / 2, columns - size / 2)
    ring = (radius < size / 4).float() + (radius < size / 6).float()
    channels = {"image": torch.rand((count, 1, size, size), generator=generator), "seg": ring.expand(count, 1, size, size), "valid": torch.ones(count, 1, size, size)}
    return model, Batch(channels, list(range(count)), 1)


def context() -> Context:
    found = Context(ALONE, "fp32", None)
    found.total_steps, found.steps_per_epoch = 1000, 100.0
    return found


def counted(call: Callable[[], object]) -> float:
    """Operations, two for each multiplication and addition."""
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return float(counter.get_total_flops())


def convolutions_per_second(size: int) -> float:
    """Operations per second of 3x3 convolutions and their two gradients, at the widths and sizes of the network's levels, the best of a few."""
    best = []
    for width, side in ((64, size), (128, size // 4), (256, size // 8)):
        images = torch.randn(BATCHES[size], width, side, side, requires_grad=True)
        kernels = torch.randn(width, width, 3, 3, requires_grad=True)
        operations = 3 * 2 * images.shape[0] * side * side * width * width * 9
        times = []
        for _ in range(CONV_ROUNDS):
            began = time.process_time()
            functional.conv2d(images, kernels, padding=1).sum().backward()
            times.append(time.process_time() - began)
        best.append(operations / min(times))
    return max(best)


def of_training(size: int) -> dict[str, Any]:
    model, batch = made(size)
    where = context()
    model.step(batch, where)  # allocations, and the optimizer
    network: SemanticUNet = model.network
    labels = torch.zeros(1, network.shape.classes, size, size)
    forward = counted(lambda: network(torch.zeros(1, 1, size, size), torch.zeros(1), labels))
    step = counted(lambda: model.step(batch, where))
    ours, plain = [], []
    for _ in range(ROUNDS):  # one after the other: what else the machine does comes to both
        plain.append(convolutions_per_second(size))
        began = time.process_time()
        model.step(batch, where)
        ours.append(step / (time.process_time() - began))
    shares = [achieved / possible for achieved, possible in zip(ours, plain, strict=True)]
    return {
        "pixels": size, "batch": BATCHES[size], "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "gflop_forward_per_image": round(forward / 1e9, 1), "reference_gflop_forward_per_image": REFERENCE_GFLOP[size],
        "gflop_step_over_forward": round(step / forward / BATCHES[size], 2), "step_cpu_s": round(step / median(ours), 2),
        "gflop_per_s": round(median(ours) / 1e9, 1), "plain_convolutions_gflop_per_s": round(median(plain) / 1e9, 1),
        "share_of_plain_convolutions": {"median": round(median(shares), 2), "lowest": round(min(shares), 2), "highest": round(max(shares), 2)},
    }  # fmt: skip


@torch.no_grad()
def of_sampling(size: int) -> dict[str, Any]:
    """One step of one mask, as each of a sampling's many."""
    model, _ = made(size)
    network: SemanticUNet = model.network.eval()
    labels = torch.zeros(1, network.shape.classes, size, size)
    labels[:, 0] = 1
    images, time_told = torch.randn(1, 1, size, size), torch.full((1,), 500.0)
    modulation = network.modulate(labels)
    difference = float((network(images, time_told, modulation) - network(images, time_told, labels)).abs().max())
    assert difference < AGREE, difference
    sides: dict[str, Callable[[], object]] = {"cached": lambda: network(images, time_told, modulation), "anew": lambda: network(images, time_told, labels)}
    seconds = in_turns(sides, ROUNDS + 2, time.process_time)
    ratio = seconds["anew"] / seconds["cached"]
    return {"pixels": size, "step_cpu_s": {name: round(value, 3) for name, value in seconds.items()}, "anew_over_cached": round(ratio, 2), "wanted": WANTED_CACHED,
            "largest_difference": difference, "cache_mib_per_mask": round(modulation.bytes / 2**20, 1)}  # fmt: skip


def peak_mib(checkpointed: bool) -> float:
    """What a training step takes above what weights, gradients and their moments hold, in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.sdm", str(int(checkpointed))], capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return float(done.stdout)


def _one_process(checkpointed: bool) -> None:
    model, batch = made(MEMORY_SIZE)
    if checkpointed:
        recompute_activations(model.blocks())
    for parameter in model.network.parameters():  # gradients and moments are made by the first step, and are no activations
        parameter.grad = torch.zeros_like(parameter)
    model.optimizer.step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model.step(batch, context())
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def run() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        memory = {name: round(peak_mib(flag)) for name, flag in (("kept", False), ("computed_again", True))}
        return {
            "training": [of_training(size) for size in BATCHES], "sampling": [of_sampling(size) for size in BATCHES],
            "memory_mib_of_a_step": {"pixels": MEMORY_SIZE, "batch": BATCHES[MEMORY_SIZE], **memory, "kept_over_computed_again": round(memory["kept"] / memory["computed_again"], 2)},
        }  # fmt: skip
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _one_process(bool(int(sys.argv[1])))
