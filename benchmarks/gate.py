"""What the quality gate costs: its CPU seconds per image beside those of sampling the image, with a tiny U-Net of 25 Euler steps at 64 pixels.

Both in one process, in turns and on one thread: others on the machine cost waiting time, which does not count. A U-Net worth training costs more."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from medgen.data.store import open_store
from medgen.gate import fit
from medgen.models.base import DataShape, Given, SampleNoise
from medgen.models.diffusion.config import Config
from medgen.models.diffusion.model import Model
from medgen.spec_accept import AcceptImages
from medgen.spec_data import DataSpec

SIZE_PIXELS = 64
CHUNK = 16
STEPS = 25
ROUNDS = 3
LIMIT = 0.05
TINY = {"strategy": "rflow", "mode": "bravo", "channels": [32, 64, 64], "attention": [False, False, True], "head_channels": 64}


def run() -> dict[str, Any]:
    torch.set_num_threads(1)
    config = Config.model_validate(TINY)
    data = DataSpec(format="phantom", patients=6, size=SIZE_PIXELS)
    with tempfile.TemporaryDirectory() as name:
        store = open_store(data, 1, Path(name), lambda _: None)
        rows = store.select("train")[:CHUNK]
        images, masks = store.images("bravo", rows), torch.from_numpy(store.masks(rows)).float()[:, None]
        began = time.process_time()
        gate = fit.open_gate(fit.sources_of(store, ("bravo",), False, ("train",), False), AcceptImages(like="train"), Path(name), lambda _: None)
        fitted = time.process_time() - began
        model = Model(config, DataShape(config.input_channels, SIZE_PIXELS))
        sampling = config.sampling({"steps": STEPS})

        def sample() -> object:
            noise = SampleNoise(1, "gate", [(number,) for number in range(CHUNK)], torch.device("cpu"))
            return model.sample(noise, Given({"seg": masks}), sampling)

        def judge() -> object:
            return gate.judge({"bravo": images}, [""] * CHUNK)

        times = [(_seconds(sample), _seconds(judge)) for _ in range(ROUNDS)]
    sampled, judged = (median(side) / CHUNK for side in zip(*times, strict=True))
    return {"sampling_seconds_per_image": round(sampled, 5), "gate_seconds_per_image": round(judged, 5), "ratio": round(judged / sampled, 4), "limit": LIMIT,
            "fit_seconds": round(fitted, 2), "fit_slices": gate.record["training"]["slices"]}  # fmt: skip


def _seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began
