"""Pairs stay registered: what a dual model generates lies as far apart as what it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import pytest
import torch

from medgen.context import Context
from medgen.data.store import open_store
from medgen.dist import Ranks
from medgen.evaluate import registration
from medgen.evaluate.run import evaluate_run
from medgen.models.base import Batch, DataShape, Given, Model, SampleNoise
from medgen.models.diffusion.config import Config
from medgen.spec_data import DataSpec
from medgen.training import build_model

CPU = torch.device("cpu")
SIZE, STEPS, BATCH = 16, 160, 8
REACH = 5  # pixels that a displacement is looked for in


def anatomies(seed: int, count: int, shift: int) -> dict[str, torch.Tensor]:
    """Discs at places of their own, with another grey after contrast, `shift` columns to the right there; masks lie anywhere."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIZE, :SIZE]

    def soft(distance: np.ndarray) -> np.ndarray:
        return np.clip(0.5 - distance, 0, 1)

    made: dict[str, list[np.ndarray]] = {"t1_pre": [], "t1_gd": [], "seg": []}
    for _ in range(count):
        row, column, radius = generator.uniform(5, 10), generator.uniform(5, 10 - shift), generator.uniform(3, 4.5)
        before, after = (soft(np.hypot(rows - row, columns - column - moved) - radius) for moved in (0, shift))
        top, left = generator.integers(0, SIZE - 3, 2)
        mask = (rows >= top) & (rows < top + 3) & (columns >= left) & (columns < left + 3)
        for name, image in (("t1_pre", 0.9 - 0.6 * before), ("t1_gd", 0.2 + 0.6 * after), ("seg", mask)):
            made[name].append(image.astype(np.float32)[None])
    return {name: torch.from_numpy(np.stack(images)) for name, images in made.items()}


def trained(seed: int, shift: int, **network: Any) -> tuple[Config, Model]:
    config = Config(
        strategy="rflow", mode="dual", epochs=STEPS, warmup_epochs=20, batch_size=BATCH, lr=3e-3, lr_min=1e-4,
        ema={"beta": 0.98, "update_after_step": 10, "update_every": 1}, **network,
    )  # fmt: skip
    model = build_model("diffusion", config, DataShape(config.input_channels, SIZE), seed, "test")
    context = Context(Ranks(0, 1, 0, CPU), "fp32", None)
    context.total_steps, context.steps_per_epoch = STEPS, 1.0
    everything = anatomies(seed, 512, shift)
    for context.step in range(STEPS):
        picked = np.random.default_rng([seed, context.step]).integers(0, 512, BATCH)
        channels = {name: images[picked] for name, images in everything.items()}
        model.step(Batch(channels, list(range(context.step * BATCH, (context.step + 1) * BATCH)), seed), context)
    return config, model


def displacements(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    """(rows, columns) by which the second of each pair lies from the first, [N, 2]: where their edges agree best, by trying every shift."""
    edges = []
    for images in (first, second):
        down, across = np.gradient(images[:, 0].numpy(), axis=(1, 2))
        edges.append(np.hypot(down, across))
    tried = [(rows, columns) for rows in range(-REACH, REACH + 1) for columns in range(-REACH, REACH + 1)]
    agreement = [(edges[0] * np.roll(edges[1], (-rows, -columns), axis=(1, 2))).sum(axis=(1, 2)) for rows, columns in tried]
    return np.array(tried)[np.argmax(agreement, axis=0)]


def generated(config: Config, model: Model, seed: int, count: int = 32) -> np.ndarray:
    """Displacements of the generated pairs, [N, 2]."""
    given = Given({"seg": anatomies(seed + 1000, count, 0)["seg"]})
    noise = SampleNoise(seed, "test", [(index,) for index in range(count)], CPU)
    images = model.sample(noise, given, config.sampling({"steps": 20}))
    return displacements(images["t1_pre"], images["t1_gd"])


UNET = {"channels": [16, 32], "attention": [False, False], "head_channels": 32}
DIT = {"network": "dit", "dit": {"depth": 4, "width": 64, "heads": 4, "patch": 2}}


@pytest.mark.parametrize(("shift", "network"), [(0, UNET), (3, UNET), (0, DIT)], ids=["registered", "shifted by 3", "registered, transformer"])
def test_generated_pairs_lie_as_the_training_pairs_do(shift: int, network: dict[str, Any]) -> None:
    """A channel moved anywhere between the data and the samples, or drawn apart from the other, would show.

    With seeds 1 to 3 all pairs were right; one wrong in ten is allowed for other processors and versions."""
    real = anatomies(9, 64, shift)
    assert (displacements(real["t1_pre"], real["t1_gd"]) == [0, shift]).all(), "the measure itself is wrong"
    config, model = trained(1, shift, **network)
    found = generated(config, model, 1)
    assert (np.median(found, axis=0) == [0, shift]).all()
    assert (found == [0, shift]).all(axis=1).mean() >= 0.9
    strangers = displacements(real["t1_pre"], real["t1_gd"].roll(1, dims=0))
    assert (strangers == [0, shift]).all(axis=1).mean() < 0.3, "pairs of different anatomies must not pass"


# --- the metric that asks it of any dataset ---------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [-2, -1, 0, 1, 2])
def test_shifts_are_those_found_by_trying_all(shift: int) -> None:
    pair = anatomies(3, 40, shift)
    first, second = pair["t1_pre"][:, 0].numpy(), pair["t1_gd"][:, 0].numpy()
    found = registration.shifts(first, second)
    assert (found == [0, shift]).all() and (found == displacements(pair["t1_pre"], pair["t1_gd"])).all()
    assert (registration.shifts(first.transpose(0, 2, 1), second.transpose(0, 2, 1)) == [shift, 0]).all()
    assert registration.distances_mm(first, second, np.tile([1.0, 2.5], (40, 1))) == pytest.approx(abs(shift) * 2.5)
    assert np.isnan(registration.shifts(first[:1] * 0, second[:1])).all()


def test_noise_is_not_registered() -> None:
    """Two images that have nothing to do with each other agree nowhere, least of all by lying on top of each other."""
    first, second = np.random.default_rng(5).uniform(size=(2, 60, 48, 48))
    found = registration.shifts(first, second)
    assert (found == 0).all(axis=1).mean() < 0.2
    assert np.hypot(*found.T).mean() > 2


def test_an_evaluation_tells_pairs_that_are_not_registered(tmp_path: Path, cache: Path) -> None:
    """Drawn slices are the real ones, as they are and with one channel 3 pixels (of 1 mm, says their index) further down."""
    data = DataSpec(format="phantom", patients=8, size=32, images={"t1_pre": "t1_pre.nii.gz", "t1_gd": "t1_gd.nii.gz"}, mask="seg.nii.gz")
    store = open_store(data, fake_run.SEED, cache, fake_run.quiet)
    settings = {"of": "dual", "against": "test", "metrics": ["registration"], "extractor": None}
    config = {"model": "diffusion", "strategy": "rflow", "mode": "dual"}
    stages = [
        fake_run.planned("train", "train", [], {"config": config, "repeat": None}),
        fake_run.planned("dual", "generate", [], {"from": "train", "count": 20, "condition": "test"}, 20),
        fake_run.planned("evaluate", "evaluate", [], settings),
    ]
    rows = store.select("test", positive_only=True)[:20]
    found = {}
    for moved in (0, 3):
        run = fake_run.make_run(tmp_path / str(moved), data, stages)
        (run.root / "fingerprint").write_text(store.fingerprint)
        images = {"t1_pre": store.images("t1_pre", rows), "t1_gd": np.roll(store.images("t1_gd", rows), moved, axis=1), "seg": store.masks(rows)}
        fake_run.write_dataset(run, "dual", images, [str(store.aliases[row]) for row in rows], "real")
        evaluate_run(run, "evaluate", cache, fake_run.quiet, lambda *_: None)
        record = json.loads(run.metrics("evaluate").read_text())
        assert "registration" not in record["skipped"]
        (found[moved],) = (item for item in record["scores"] if item["metric"] == "registration")
    assert found[0]["channel"] == "t1_pre to t1_gd" and found[0]["unit"] == "mm" and found[0]["n"] == len(rows)
    assert found[0]["value"] == found[0]["floor"] == 0
    assert found[3]["value"] == pytest.approx(3) and found[3]["floor"] == 0
