"""Sample grids of a training: how they are laid out, which are kept, what of them is on the report."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import fake_run
import numpy as np
import pytest
from html_page import Page
from PIL import Image

from medgen.models.base import Phase
from medgen.models.pacgan.config import Config
from medgen.previews import GAP_GREY, GAP_PIXELS, as_png, sample_grid
from medgen.report import gather, trainings
from medgen.report.build import build_report
from medgen.rundir import RunDir
from medgen.spec_data import DataSpec
from medgen.training import Clock, Training, steps_in
from medgen.validation import MOST_GRIDS, _is_kept, steps_between


@pytest.mark.parametrize(("count", "channels", "size", "columns"), [(8, 1, 64, 4), (3, 1, 64, 3), (8, 2, 70, 2), (5, 1, 16, 4), (64, 1, 64, 8), (1, 3, 64, 1)])
def test_each_sample_has_its_place(count: int, channels: int, size: int, columns: int) -> None:
    images = np.random.default_rng(0).uniform(-0.2, 1.2, (channels, count, size, size))
    grid, enlarged, cell = sample_grid(list(images)), max(1, 64 // size), max(size, 64)
    across, down = channels * cell + GAP_PIXELS, cell + GAP_PIXELS
    assert grid.shape == (-(-count // columns) * down - GAP_PIXELS, columns * across - GAP_PIXELS)
    for sample in range(count):
        for channel in range(channels):
            row, column = divmod(sample, columns)
            part = grid[row * down :, column * across + channel * cell :][:cell, :cell]
            assert (part == np.kron(np.rint(images[channel, sample].clip(0, 1) * 255), np.ones((enlarged, enlarged)))).all()
    if count % columns:
        assert (grid[-cell:, (count % columns) * across :] == round(GAP_GREY * 255)).all()
    assert (np.asarray(Image.open(io.BytesIO(as_png(grid)))) == grid).all() and as_png(grid) == as_png(grid.copy())


@pytest.mark.parametrize("epochs", [[1.0] * 3, [100.0] * 7, [0, 0, 250.0], [3000.0]])
def test_a_long_training_keeps_some_of_its_grids(epochs: list[float]) -> None:
    """Which ones depends on the step alone, so that an interruption changes nothing."""
    config = Config.model_validate({**Config.examples()["grey"], "loop": {"validate_epochs": 1.0}})
    phases = [Phase(f"{number}", count, 4, 8) for number, count in enumerate(epochs)]
    made = SimpleNamespace(config=config, phases=phases, samples=40, clock=Clock())
    kept, validations, start = list[int](), 0, 0
    for number, phase in enumerate(phases):
        made.phase, steps = phase, steps_in(phase, 40)
        every = steps_between(cast(Training, made), phase)
        for step in range(every, steps + 1, every):
            made.clock = Clock(step=start + step, phase=number, phase_start_step=start)
            validations += 1
            kept += [start + step] if _is_kept(cast(Training, made)) else []
        start += steps
        assert not steps or kept[-1] == start, "the last of each phase"
    assert kept[0] == 10 and len(kept) <= min(validations, MOST_GRIDS + len(phases)) and len(kept) >= min(validations, MOST_GRIDS // 2)


# on the report


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    config = {"model": "pacgan", **Config.examples()["grey"]}
    made = fake_run.make_run(tmp_path, DataSpec(format="phantom", patients=8, size=32), [
        fake_run.planned("train", "train", [], {"config": config, "repeat": None}), fake_run.planned("report", "report", ["train"], {})])  # fmt: skip
    fake_run.finish(made, "train", 0, 5)
    return made


def write_log(run: RunDir, lines: list[dict[str, Any]]) -> None:
    run.training_log("train").parent.mkdir(exist_ok=True)
    run.training_log("train").write_text("".join(json.dumps(line) + "\n" for line in lines))


def page_of(run: RunDir, cache: Path, said: list[str]) -> Page:
    build_report(run, "report", cache, said.append)
    page = Page(run.report.read_text())
    page.require_self_contained()
    return page


def test_grids_from_the_first_to_the_last(run: RunDir, cache: Path) -> None:
    write_log(run, [{"step": 10, "loss": 1.0}])
    noise, said = np.random.default_rng(0), list[str]()
    assert "Samples through training" not in page_of(run, cache, said).text
    steps = list(range(100, 1200, 100))
    for step in steps:
        path = run.preview("train", step)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(as_png(sample_grid([noise.uniform(size=(8, 128, 128))])))
    (run.previews("train") / "step-mine.png").write_bytes(b"")
    assert list(run.drawn_previews("train")) == steps
    page = page_of(run, cache, said)
    assert [label.split(" train/")[0] for label in page.labels] == [f"step {step:,}" for step in (100, 300, 500, 700, 900, 1100)]
    assert "6 of 11 grids of train/previews" in page.text and run.report.stat().st_size < 2**20
    shown = Image.open(io.BytesIO(base64.b64decode(next(address for address in page.addresses if address.startswith("data:")).partition(",")[2])))
    assert shown.size == (384, 191)

    said.clear()
    run.preview("train", 500).write_bytes(b"cut")
    assert len(page_of(run, cache, said).labels) == 5 and any("train/previews/step-000500.png: left out of the report" in line for line in said)


def test_curves_are_what_the_family_says_and_the_log_has(run: RunDir, cache: Path) -> None:
    """A log of many steps is drawn with few points; numbers that are none, and charts of what was not logged, are left out."""
    lines: list[dict[str, Any]] = [{"step": step, "loss": -1.0, "critic_real_score": step / 1000, "critic_fake_score": float("nan") if step == 77 else -step / 1000} for step in range(1, 20001)]
    write_log(run, [*lines, {"step": 20000, "val_auc_real": 0.9, "val_loss": 0.5}])
    page = page_of(run, cache, [])
    charts = [words for words in page.words if words in ("Loss", "Loss on the val split", "Scores of the critic", "Losses of the players", "Classes told apart on the val split")]
    assert charts == ["Loss", "Loss on the val split", "Scores of the critic", "Classes told apart on the val split"]
    assert ",nan" not in page.html and run.report.stat().st_size < 200_000
    assert "The losses of players against each other rise and fall" in page.text and "A falling loss" not in page.text
    curves = gather.training_curves(run, "train")
    assert curves is not None
    steps, values = curves.logged("critic_fake_score")
    assert len(steps) == 19_999 and 77 not in steps and values[-1] == -20.0
    thin, few = trainings._thinned(steps, values)
    assert (thin[0], thin[-1], len(few)) == (1, 20000, trainings.MOST_POINTS)


def test_a_family_that_this_medgen_does_not_know_has_its_loss(run: RunDir, cache: Path) -> None:
    plan = json.loads(run.plan.read_text())
    for config in ({"model": "gone"}, {"model": "pacgan", "gone": 1}):
        plan["stages"][0]["settings"]["config"] = config
        run.plan.write_text(json.dumps(plan))
        write_log(run, [{"step": 10, "loss": 1.0, "critic_real_score": 2.0}])
        page = page_of(run, cache, [])
        assert page.html.count('<svg class="chart"') == 1 and "Scores of the critic" not in page.text
