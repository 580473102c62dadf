"""The search of a learning rate: the curve in closed form, and that a training with it equals one without, bit for bit, whatever happens in between."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY_NET, tiny_spec
from launch_stub import create_run
from test_pipeline import _equal, _last_tensors, outcome
from test_ranks import free_port

from medgen import files, lr_curve, lr_search, models, task
from medgen.alone import alone
from medgen.dist import ALONE
from medgen.errors import InputError, MedgenError
from medgen.find_lr import find_lr
from medgen.lr_curve import Smoothed, judged
from medgen.models.settings import LrSearch
from medgen.report import words
from medgen.rundir import RunDir

Medgen = Callable[..., subprocess.CompletedProcess[str]]
WriteSpec = Callable[[dict[str, Any]], Path]
PNG = b"\x89PNG\r\n"
NET = {key: value for key, value in TINY_NET.items() if key != "lr"}
LOOP = {"log_steps": 1, "checkpoint_steps": 1, "preview_images": 0, "validate_epochs": 1.0}
CONFIG = {**NET, "strategy": "rflow", "mode": "bravo", "epochs": 1, "batch_size": 4, "loop": LOOP}


def smoothed(losses: list[float]) -> list[float]:
    running = Smoothed()
    for loss in losses:
        running.add(loss)
    return running.values


def test_rates_grow_by_one_factor() -> None:
    rates = lr_curve.rates(100)
    assert rates[0] == pytest.approx(1e-7) and rates[-1] == pytest.approx(1e-1) and len(rates) == 100
    assert [later / earlier for earlier, later in pairwise(rates)] == pytest.approx([10 ** (6 / 99)] * 99)


def test_the_smoothed_loss_is_the_weighted_mean_of_what_was() -> None:
    """Without the correction the first values would lie near zero."""
    losses = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]
    share = lr_curve.SMOOTHING
    for number, value in enumerate(smoothed(losses)):
        weights = [share ** (number - earlier) for earlier in range(number + 1)]
        assert value == pytest.approx(sum(weight * loss for weight, loss in zip(weights, losses, strict=False)) / sum(weights))
    assert smoothed([2.5] * 40) == pytest.approx([2.5] * 40)


def test_the_sweep_ends_where_the_loss_blows_up_and_not_before_ten_steps() -> None:
    running = Smoothed()
    for number, loss in enumerate([1.0, 100.0, *[1.0] * 60, *[1000.0] * 3]):
        running.add(loss)
        judged = running.values[10:]  # an easy first batch would be a best that no later step can hold
        assert running.has_blown_up == (number >= 10 and judged[-1] > 4 * min(judged)), "also of a first loss that was far off"
    assert running.has_blown_up
    running.add(math.nan)
    assert running.has_blown_up


def made_curve(best: float, steps: int = 200) -> tuple[list[float], list[float]]:
    """Flat, falling over two decades to a known rate, and blowing up beyond it."""
    rates = lr_curve.rates(steps)
    distance = [math.log10(rate / best) for rate in rates]
    return rates, [1.0 if place < -2 else 0.1 + 0.9 * (place / 2) ** 2 if place < 0 else 0.1 * 10 ** (2 * place) for place in distance]


@pytest.mark.parametrize("best", [1e-4, 1e-3, 1e-2])
def test_the_suggestion_lies_a_tenth_below_the_lowest_smoothed_loss(best: float) -> None:
    rates, losses = made_curve(best)
    curve = judged(rates, losses, smoothed(losses), len(rates))
    assert curve.suggestion == float(f"{rates[curve.lowest] / lr_curve.MARGIN:.1e}")
    assert best <= rates[curve.lowest] <= 2 * best, "smoothing lags a little behind"
    again = judged(rates, [*losses[:-1], math.nan], [*curve.smoothed[:-1], math.nan], len(rates))
    assert again.suggestion == curve.suggestion and json.loads(json.dumps(again.record, allow_nan=False))["losses"][-1] is None


def test_a_curve_that_says_nothing_suggests_nothing() -> None:
    rates = lr_curve.rates(50)
    with pytest.raises(MedgenError, match=r"no learning rate lowers the loss in 50 steps .*remove find_lr and write lr"):
        judged(rates, [1.0] * 50, [1.0] * 50, 50)
    with pytest.raises(MedgenError, match=r"the loss is nan at step 3, with a learning rate of .* too small to be the cause: look at the data"):
        judged(rates[:3], [1.0, 1.0, math.nan], [1.0, 1.0, math.nan], 50)


@pytest.mark.parametrize(("family", "change", "message"), [
    ("diffusion", {"find_lr": True, "lr": 1e-3}, r"lr: 0.001 and find_lr contradict each other"),
    ("diffusion", {"find_lr": {}, "lr": 1e-3}, r"lr: 0.001 and find_lr contradict each other"),
    ("diffusion", {"find_lr": 3}, r"write find_lr: true, or how many learning rates it tries"),
    ("diffusion", {"find_lr": {"steps": 5}}, r"greater than or equal to 20"),
    ("pacgan", {"find_lr": True}, r"find_lr has no effect: the losses of players against each other rise and fall"),
])
def test_what_has_no_effect_or_contradicts_is_refused(family: str, change: dict[str, Any], message: str) -> None:
    config = models.config_class(family)
    with pytest.raises(ValueError, match=message):
        config.model_validate({**next(iter(config.examples().values())), **change})


def test_the_resolved_form_holds_no_rate_that_nobody_wrote() -> None:
    config = models.config_class("diffusion")
    example = next(iter(config.examples().values()))
    asked = config.model_validate({**example, "find_lr": True, "lr": None})
    record = asked.model_dump(mode="json")
    assert "lr" not in record and record["find_lr"] == {"steps": 100} and config.model_validate(record) == asked
    assert config.model_validate({**example, "find_lr": False}).model_dump(mode="json")["lr"] == 1e-4
    assert lr_search.with_lr(asked, 3e-4) == config.model_validate({**example, "lr": 3e-4})
    with pytest.raises(MedgenError, match=r"find_lr found lr 1.00e-07, which does not go with .*lr_min: 1e-06 is above lr: 1e-07"):
        lr_search.with_lr(asked, 1e-7)


def training_of(tmp_path: Path, write_spec: WriteSpec, runs: str, **changes: Any) -> Path:
    """A run with one train stage, not started."""
    stage = {"kind": "train", "config": {**CONFIG, **changes}, "resources": {"cpus": 1}}
    return create_run(write_spec({**tiny_spec(name="search"), "stages": {"train": stage, "report": {"kind": "report"}}}), (), tmp_path / runs)[0].root


def kill_when(run: Path, environment: dict[str, str], reached: Callable[[str], bool]) -> None:
    """`reached` is asked with what the training has said so far."""
    said = run.with_name(f"{run.name}.said")
    with said.open("w") as stream, subprocess.Popen([sys.executable, "-m", "medgen", "train", str(run)], env=environment, stdout=stream, stderr=stream) as process:
        deadline = time.monotonic() + 120
        while not reached(said.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)


def test_a_training_that_searched_and_was_killed_equals_one_whose_rate_was_written(
    tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the search: it searches anew. Killed in training, with the record lost: the rate is that of the checkpoint."""
    run = training_of(tmp_path, write_spec, "runs", find_lr={"steps": 60})
    together = tmp_path / "together" / run.name
    shutil.copytree(run, together)
    kill_when(run, environment, lambda said: "find_lr: trying 60" in said)
    assert not (run / "train" / "find_lr.json").exists(), "nothing is recorded half"
    kill_when(run, environment, lambda _: len(list((run / "train" / "ckpt").glob("step-*"))) > 1)
    record = lr_search.read(run / "train" / "find_lr.json")
    (run / "train" / "find_lr.json").unlink()
    done = medgen("train", run)
    assert f"find_lr: lr {record['lr']:.2e}, as found before" in done.stdout and "resuming from" in done.stdout and "trying" not in done.stdout
    assert outcome(run, "train")["facts"]["found_lr"] == record["lr"]

    monkeypatch.setenv("MEDGEN_CACHE", environment["MEDGEN_CACHE"])
    assert task.perform(RunDir(run), "report", None, 0, 0) == 0
    assert f"learning rate found: {words.number(record['lr'])}" in (run / "report" / "index.html").read_text()

    written = training_of(tmp_path, write_spec, "written", lr=record["lr"])
    medgen("train", written)
    steps, expected = _last_tensors(written)
    assert _last_tensors(run)[0] == steps and _equal(_last_tensors(run)[1], expected)
    states = [files.read_json(max((root / "train" / "ckpt").glob("step-*")) / "state.json") for root in (run, written)]
    assert states[0]["config"] == states[1]["config"], "a checkpoint says what it was trained with"

    # two ranks find what one does, and take their steps with it
    _train_by_two(together, environment)
    by_two = lr_search.read(together / "train" / "find_lr.json")
    assert by_two["lr"] == record["lr"] and by_two["losses"] == pytest.approx(record["losses"], rel=1e-3)
    assert _last_tensors(together)[0] == steps
    assert logged(together, "loss") == pytest.approx(logged(written, "loss"), rel=1e-3), "one rank with another rate would part the replicas"
    assert logged(together, "lr") == logged(written, "lr")

    # the verb finds the same, and takes the place of nothing
    spec = tmp_path / "search.yaml"
    told = medgen("find-lr", spec, "-ostages.train.config.lr=null", "-ostages.train.config.find_lr.steps=60", "--out", "found").stdout
    found = lr_search.read(tmp_path / "found" / "find_lr.json")
    assert [found[key] for key in ("lr", "rates", "losses", "smoothed")] == [record[key] for key in ("lr", "rates", "losses", "smoothed")]
    assert f"-o stages.train.config.lr={record['lr']:.2e}" in told and "<- suggestion" in told
    for picture in (tmp_path / "found" / "find_lr.png", run / "train" / "find_lr.png"):
        assert picture.read_bytes().startswith(PNG)


def test_a_stage_that_repeats_another_takes_its_rate_and_a_damaged_record_is_none(tmp_path: Path, write_spec: WriteSpec) -> None:
    stages = {"train": {"kind": "train", "config": {**CONFIG, "find_lr": True}}, "again": {"kind": "train", "repeat": "train"}}
    run, planned = create_run(write_spec({**tiny_spec(name="both"), "stages": stages}), (), tmp_path / "runs")
    rates, losses = made_curve(1e-3)
    record = run.lr_search("train")
    lr_search.write(record, curve := judged(rates, losses, smoothed(losses), 200), {"task_hash": planned.stage("train").tasks[0].hash})
    work = alone(run, planned, planned.stage("again"), planned.stage("again").tasks[0])

    def searched() -> Any:
        raise MedgenError("it searches")

    def found() -> float:
        return lr_search.found_once(work, ALONE, LrSearch(), searched)

    assert found() == curve.suggestion
    content = record.read_text()
    for damaged in (content.replace('"lr"', '"lr "'), content.replace("1.0", "1.1"), content[:99], "[]"):
        record.write_text(damaged)
        with pytest.raises(MedgenError, match="it searches"):
            found()
    lr_search.write(record, curve, {"task_hash": "of another plan"})
    with pytest.raises(MedgenError, match="it searches"):
        found()


def logged(run: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "train" / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def _train_by_two(run: Path, environment: dict[str, str]) -> None:
    common = {**environment, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "medgen", "train", str(run)]
    ranks = [subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.DEVNULL) for rank in range(2)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]


def test_what_nothing_can_be_found_for_is_refused_by_the_verb(tmp_path: Path, write_spec: WriteSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDGEN_RUNS", str(tmp_path / "runs"))
    stages = {"train": {"kind": "train", "config": {**CONFIG, "lr": 1e-3}}, "again": {"kind": "train", "repeat": "train"}}
    spec = write_spec({**tiny_spec(name="both"), "stages": stages})
    with pytest.raises(InputError, match="--stage again: it repeats train, with that stage's learning rate; name that one"):
        find_lr(spec, [], "again", None, tmp_path / "new")
    with pytest.raises(InputError, match=r"lr: 0.001 and find_lr contradict each other"):
        find_lr(spec, ["stages.train.config.find_lr=true"], "train", None, tmp_path / "new")
    with pytest.raises(InputError, match="exists; name a new folder with --out"):
        find_lr(spec, [], "train", None, tmp_path)
    stages = {"train": {"kind": "train", "config": {"model": "pacgan", "factors": [1, 1, 1], "in_channels": 8, "channels": ["bravo"]}}}
    spec = write_spec({**tiny_spec(name="players"), "stages": stages})
    with pytest.raises(InputError, match="train: find_lr has no effect: the losses of players"):
        find_lr(spec, [], None, None, tmp_path / "new")
    assert not (tmp_path / "new").exists() and not (tmp_path / "runs").exists()


def test_one_easy_batch_at_the_start_is_not_the_lowest_loss() -> None:
    """Losses of small batches scatter: what counts is the curve once it is smooth."""
    rates = lr_curve.rates(60)
    scatter = np.random.default_rng(3).normal(0, 0.15, 60)
    losses = [float((0.5 if 1e-3 < rate < 3e-2 else 1.0 if rate <= 1e-3 else 3.0) * (1 + spread)) for rate, spread in zip(rates, scatter, strict=True)]
    losses[0] = 0.05
    smoothed = Smoothed()
    for loss in losses:
        smoothed.add(loss)
    curve = judged(rates, losses, smoothed.values, 60)
    assert curve.lowest >= lr_curve.FEWEST_STEPS and 1e-4 < curve.suggestion < 1e-2


def test_an_easy_batch_at_the_start_does_not_end_the_sweep() -> None:
    smoothed = Smoothed()
    for loss in [0.05, *[1.0] * 30]:
        smoothed.add(loss)
        assert not smoothed.has_blown_up
