"""What a training step and sampling of the diffusion U-Net cost: medgen's beside MONAI's own inferer in a plain loop, and more processes beside one.

Both sides have the same network with the same weights, the same batch and AdamW; neither keeps an average. medgen's step has more to do: each sample's
own noise, clipping, the guard, the loss by time. The plain side on a GPU is float16 with a gradient scaler, as in MONAI's tutorials, and in float32; TF32 is
on for all.
Sides are taken in turns; on the CPU seconds of one thread count, which others on the machine cannot make longer by taking turns with it."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from monai.inferers import DiffusionInferer
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.pacgan import in_turns
from medgen import dist
from medgen.acceleration import compile_networks, try_compiled
from medgen.context import Context
from medgen.device import EARNED_STEPS, capability_of, compiles, set_tf32, uses_tf32
from medgen.dist import Ranks
from medgen.models.base import Batch, DataShape, Given, SampleNoise
from medgen.models.diffusion.config import Config
from medgen.models.diffusion.model import Model

CPU_SIZE, CPU_BATCH, CPU_CHANNELS = 64, 8, (32, 64, 64)
GPU_SIZE, GPU_BATCH, GPU_CHANNELS = 128, 16, (128, 256, 256)
SAMPLING_STEPS = 50
WANTED = {"cpu": {"training": 1.0, "sampling": 1.0}, "cuda": {"training": 1.8, "sampling": 1.5}}
AGREE = 1e-4  # largest difference of the two networks' outputs, in float32
PEAK_SIDE = 2048  # of the matrices whose product is the peak
EXCHANGES = 5
ATTENTION = (False, True, True)


def made(device: torch.device) -> tuple[Model, DiffusionModelUNet, Batch]:
    """medgen's model, MONAI's network with the same weights as its tutorials build it, and a batch."""
    size, count, channels = (GPU_SIZE, GPU_BATCH, GPU_CHANNELS) if device.type == "cuda" else (CPU_SIZE, CPU_BATCH, CPU_CHANNELS)
    config = Config.model_validate({"mode": "bravo", "channels": channels, "attention": ATTENTION, "head_channels": channels[-1], "batch_size": count,
                                    "warmup_epochs": 0.0, "ema": None})  # fmt: skip
    torch.manual_seed(0)
    model = Model(config, DataShape(config.input_channels, size))
    with torch.no_grad():  # the last layer begins at zero: nothing could be compared
        for name, parameter in model.network.named_parameters():
            if name.startswith("out."):
                parameter.normal_(std=0.1)
    plain = DiffusionModelUNet(spatial_dims=2, in_channels=2, out_channels=1, channels=channels, attention_levels=ATTENTION, num_res_blocks=1,
                               num_head_channels=channels[-1], norm_num_groups=32)  # fmt: skip
    plain.load_state_dict(model.network.state_dict())
    generator = torch.Generator().manual_seed(1)
    images = {name: torch.rand((count, 1, size, size), generator=generator).to(device) for name in config.input_channels}
    return _moved(model, device), plain.to(device), Batch(images, list(range(count)), 1)


def _moved(model: Model, device: torch.device) -> Model:
    for module in model.modules().values():
        module.to(device)
    return model


class Plain:
    """A training step as MONAI's tutorials write it."""

    def __init__(self, network: DiffusionModelUNet, batch: Batch, half: bool):
        self.network, self.half, self.device = network, half, batch.device
        self.images, self.masks = batch.channels["bravo"] * 2 - 1, batch.channels["seg"] * 2 - 1
        self.scheduler = DDPMScheduler(num_train_timesteps=1000)
        self.inferer = DiffusionInferer(self.scheduler)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        self.scaler = torch.amp.GradScaler(batch.device.type, enabled=half)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.float16) if self.half else nullcontext():
            noise = torch.randn_like(self.images)
            times = torch.randint(0, 1000, (len(self.images),), device=self.device).long()
            predicted = self.inferer(inputs=self.images, diffusion_model=self.network, noise=noise, timesteps=times, condition=self.masks, mode="concat")
            loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @torch.no_grad()
    def sample(self) -> Tensor:
        scheduler = DDIMScheduler(num_train_timesteps=1000)
        scheduler.set_timesteps(SAMPLING_STEPS)
        images: Tensor = self.inferer.sample(torch.randn_like(self.images), self.network, scheduler, conditioning=self.masks, mode="concat", verbose=False)
        return images


def clock_of(device: torch.device) -> Callable[[], float]:
    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock if device.type == "cuda" else time.process_time


def peak(device: torch.device, kind: torch.dtype, clock: Callable[[], float]) -> float:
    """Operations per second of a product of two large matrices, the best of five."""
    left, right = (torch.randn(PEAK_SIDE, PEAK_SIDE, device=device, dtype=kind) for _ in range(2))
    times = []
    for _ in range(6):
        start = clock()
        left @ right
        times.append(clock() - start)
    return 2 * PEAK_SIDE**3 / min(times[1:])


def operations(plain: Plain) -> int:
    """Of one forward and backward pass, with attention written out; fused attention computes the same."""
    counter = FlopCounterMode(display=False)
    with counter:
        plain.step()
    return int(counter.get_total_flops())


def compared(device: torch.device) -> dict[str, Any]:
    model, network, batch = made(device)
    context = Context(Ranks(0, 1, 0, device), "auto", None)
    context.total_steps = 1000
    set_tf32(False)
    difference = _difference(model, network, batch)
    set_tf32(uses_tf32("auto", capability_of(device)))
    compiled = "not compiled"
    if compiles("auto", capability_of(device), steps=EARNED_STEPS):
        forwards = compile_networks(model.compiled_networks(), Path.home() / ".cache" / "medgen")
        compiled = try_compiled(forwards, lambda: model.step(batch, context), lambda well: well)
    plain = {"plain": Plain(network, batch, half=device.type == "cuda")}
    if device.type == "cuda":
        plain["plain_float32"] = Plain(copy.deepcopy(network), batch, half=False)
    clock, gpu = clock_of(device), device.type == "cuda"
    training: dict[str, Callable[[], object]] = {"medgen": lambda: model.step(batch, context), **{name: side.step for name, side in plain.items()}}
    seconds = in_turns(training, 20 if gpu else 3, clock)
    given, settings = Given({"seg": batch.channels["seg"]}), model.config.sampling({"sampler": "ddim", "steps": SAMPLING_STEPS, "weights": "raw"})
    noise = [(number,) for number in range(len(batch))]
    sampling: dict[str, Callable[[], object]] = {
        "medgen": lambda: model.sample(SampleNoise(1, "bench", noise, device), given, settings), "plain": plain["plain"].sample,
    }  # fmt: skip
    sample_seconds = in_turns(sampling, 3 if gpu else 1, clock)
    work, most = operations(plain["plain"]), peak(device, torch.bfloat16 if gpu else torch.float32, clock)
    return {
        "batch": len(batch), "pixels": model.shape.size, "channels": list(network.block_out_channels), "compiled": compiled, "largest_difference": float(f"{difference:.1e}"),
        "training_seconds": {name: round(value, 4) for name, value in seconds.items()},
        "training_faster_by": {name: round(seconds[name] / seconds["medgen"], 2) for name in plain},
        "sampling_seconds": {name: round(value, 3) for name, value in sample_seconds.items()},
        "sampling_faster_by": round(sample_seconds["plain"] / sample_seconds["medgen"], 2),
        "gigaoperations_per_step": round(work / 1e9, 1), "peak_gigaoperations_per_second": round(most / 1e9, 1),
        "mfu": {name: round(work / value / most, 3) for name, value in seconds.items()},
    }  # fmt: skip


@torch.no_grad()
def _difference(model: Model, network: DiffusionModelUNet, batch: Batch) -> float:
    """Largest of the two networks' outputs. Ends the benchmark if they do not agree."""
    inputs, times = torch.cat([batch.channels["bravo"], batch.channels["seg"]], dim=1), torch.arange(len(batch), device=batch.device) * 60.0
    found = float((model.network(inputs, times) - network(inputs, times)).abs().max())
    if not found < AGREE:
        raise SystemExit(f"the networks differ by {found:.2g} (allowed {AGREE:g}): a ratio of times would mean nothing")
    return found


# --- several processes -----------------------------------------------------------------------------------------------


def several() -> dict[str, Any]:
    """Processes on this machine with one thread each and the same global batch; and what they send each other, among two and among eight."""
    found: dict[str, Any] = {}
    for count in (1, 2):
        found[f"seconds_per_step_of_{count}"] = round(max(_seconds(count, "step")), 3)
    found["faster_by"] = round(found["seconds_per_step_of_1"] / found["seconds_per_step_of_2"], 2)
    alone, both = _seconds(1, "copy"), _seconds(2, "copy")
    found["copy_gigabytes_per_second"] = {"one_process": round(1 / alone[0], 1), "each_of_two": round(1 / max(both), 1)}
    gradients = sum(parameter.numel() for parameter in made(torch.device("cpu"))[0].network.parameters()) * 4
    found["gradient_megabytes"] = round(gradients / 1e6, 2)
    for count in (2, 8):
        found[f"exchange_seconds_of_{count}"] = round(max(_seconds(count, "exchange")), 4)
    step, exchange = found["seconds_per_step_of_1"], found["exchange_seconds_of_8"]
    found["estimate_for_8"] = {"faster_by": round(step / (step / 8 + exchange), 2),
                               "assumes": "a core of its own for each process, no shared memory bandwidth, an eighth of a batch an eighth of the time, an exchange as slow as "
                                          "eight processes on these cores make it, and none of it behind the backward pass"}  # fmt: skip
    return found


def _seconds(count: int, what: str) -> list[float]:
    """Of every process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.diffusion", what]
    started = [subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True) for rank in range(count)]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{' '.join(command)}: a process failed")
    return [float(text.splitlines()[-1]) for text in said]


def one_of_several(what: str) -> None:
    """Prints its median wall seconds: of a step, of copying a gigabyte, or of exchanging gradients once."""
    with dist.joined_ranks(threads=1) as ranks:
        model, _, batch = made(ranks.device)
        context = Context(ranks, "fp32", None)
        context.total_steps = 1000
        share = len(batch) // ranks.world_size
        parameters = list(model.network.parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        source, target = torch.ones(2**26), torch.empty(2**26)  # a quarter of a gigabyte: read, and written
        does: Callable[[], object] = {
            "step": lambda: model.step(next(batch.split(share)), context), "exchange": lambda: dist.average_gradients(parameters, ranks),
            "copy": lambda: (target.copy_(source), target.copy_(source)),
        }[what]  # fmt: skip
        times = []
        for _ in range(EXCHANGES + 1):
            dist.barrier(ranks)
            start = time.perf_counter()
            does()
            times.append(time.perf_counter() - start)
        print(median(times[1:]))


def run() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"threads": 1, "load_average_before": os.getloadavg(), "wanted_faster_by": WANTED}
    record["cpu"] = compared(torch.device("cpu"))
    print(record["cpu"], flush=True)
    record["processes"] = several()
    record["gpu"] = compared(torch.device("cuda", 0)) if torch.cuda.is_available() else "no GPU here"
    record["load_average_after"] = os.getloadavg()
    torch.set_num_threads(threads)
    return record


if __name__ == "__main__":
    one_of_several(sys.argv[1])
