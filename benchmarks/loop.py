"""What the training loop costs: seconds per step through `medgen train` over a bare PyTorch loop, same model.

The bare loop keeps its data in memory, draws noise with torch.randn, and does what is the model's business:
forward, backward, clipping, AdamW, EMA. Both run alternately in fresh processes on the same cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROUNDS = 2
STEPS = 30
WARM_UP = 5
CONFIG = {
    "model": "diffusion", "strategy": "ddpm", "mode": "bravo", "channels": [32, 64, 64], "attention": [False, False, True], "head_channels": 64,
    "batch_size": 16, "warmup_epochs": 0.0, "loop": {"log_steps": 1, "preview_images": 0, "validate_epochs": 1000.0},
}
BARE = """
import json, sys, time
import torch
from medgen import spec
from medgen.models.base import DataShape
from medgen.models.diffusion.model import Model
config = spec.family_config(json.loads(sys.argv[1]))
steps, threads = int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
model = Model(config, DataShape(config.input_channels, 32))
data = torch.rand(256, 2, 32, 32)
alpha_bar = model.strategy.alpha_bar.float()
times = []
for step in range(steps):
    start = time.perf_counter()
    rows = torch.randint(0, len(data), (config.batch_size,))
    clean, mask = data[rows, :1] * 2 - 1, data[rows, 1:] * 2 - 1
    noise, t = torch.randn_like(clean), torch.randint(0, 1000, (config.batch_size,))
    a = alpha_bar[t].view(-1, 1, 1, 1)
    loss = (model.network(torch.cat([a.sqrt() * clean + (1 - a).sqrt() * noise, mask], 1), t.float()) - noise).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
    model.optimizer.step()
    model.optimizer.zero_grad(set_to_none=True)
    [average.update() for average in model.averages.values()]
    loss.item()
    times.append(time.perf_counter() - start)
print(json.dumps(times))
"""


def bare(threads: int) -> list[float]:
    command = [sys.executable, "-c", BARE, json.dumps({**CONFIG, "epochs": 1.0}), str(STEPS), str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    times: list[float] = json.loads(done.stdout.splitlines()[-1])
    return times[WARM_UP:]


def through_medgen(folder: Path, number: int, threads: int) -> list[float]:
    spec = {"version": 1, "name": f"loop{number}", "data": {"format": "phantom", "patients": 6, "size": 32},
            "stages": {"train": {"kind": "train", "config": {**CONFIG, "epochs": 3.0}, "resources": {"cpus": threads}}}}
    path = folder / "loop.yaml"
    path.write_text(json.dumps(spec))  # JSON is YAML
    environment = {**os.environ, "MEDGEN_RUNS": str(folder / "runs")}
    subprocess.run([sys.executable, "-m", "medgen", "submit", str(path), "--local"], env=environment, check=True, capture_output=True)
    log = next((folder / "runs").glob(f"loop{number}-*")) / "train" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line["seconds_per_step"] for line in lines if "seconds_per_step" in line][WARM_UP:]


def run() -> dict[str, Any]:
    threads = len(os.sched_getaffinity(0))
    bare_times: list[float] = []
    medgen_times: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        for number in range(ROUNDS):
            bare_times += bare(threads)
            medgen_times += through_medgen(Path(name), number, threads)
    return {"bare_seconds_per_step": round(median(bare_times), 4), "medgen_seconds_per_step": round(median(medgen_times), 4),
            "ratio": round(median(medgen_times) / median(bare_times), 4), "limit": 1.03, "steps": len(medgen_times), "threads": threads}
