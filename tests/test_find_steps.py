"""The search of a number of sampling steps: against brute force on made functions, and on a real run through the real command line."""

from __future__ import annotations

import math
import random
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_NET, tiny_spec
from launch_stub import create_run

from medgen import alone, generate, lr_search, plan, spec, task
from medgen.data.store import open_store
from medgen.errors import InputError, MedgenError
from medgen.evaluate import distances, feature_scores, inputs
from medgen.evaluate.features import Bench, features
from medgen.find_steps import Asked, find_steps
from medgen.plan import Shard, Task
from medgen.rundir import RunDir
from medgen.spec_data import DataSpec
from medgen.spec_evaluate import Measures
from medgen.spec_stages import GenerateStage
from medgen.step_measure import Drawn, Judge, Measured
from medgen.step_search import golden_section, smallest_as_good

Medgen = Callable[..., subprocess.CompletedProcess[str]]
WriteSpec = Callable[[dict[str, Any]], Path]
PNG = b"\x89PNG\r\n"
IMAGES = 18
ASKED = Asked(None, None, 1, 4, IMAGES, "val", "random_conv")
DATA = {"format": "phantom", "patients": 12, "splits": {"train": 0.3, "val": 0.5, "test": 0.2}, "size": 16, "positive_only": True, "every": 2}


def test_the_search_finds_what_brute_force_finds_and_asks_once() -> None:
    """Below 20 exactly, above to within a tenth, in at most eleven questions of up to 200."""
    draw = random.Random(1)
    for _ in range(400):
        low = draw.randint(1, 20)
        high, bottom, power = draw.randint(low, 200), draw.uniform(low / 2, 300), draw.uniform(0.3, 3)
        asked: list[int] = []

        def measure(number: int) -> float:
            asked.append(number)  # noqa: B023  called at once
            return abs(math.log(number / bottom)) ** power  # noqa: B023

        found = golden_section(measure, low, high)
        assert len(asked) == len(set(asked)) <= 11 and low <= min(asked) and max(asked) <= high
        best = min(range(low, high + 1), key=measure)
        assert found == best if best < 18 else best / 1.1 <= found <= best * 1.1


def test_the_smallest_that_is_as_good_is_found_below_what_was_tried() -> None:
    draw = random.Random(2)
    for _ in range(400):
        low = draw.randint(1, 20)
        best = draw.randint(low, 150)
        edge = draw.randint(low, best)
        tried = {best, *draw.sample(range(1, 200), 5)}
        found = smallest_as_good(lambda number: number < edge, tried, best, low)  # noqa: B023  called at once
        assert edge <= found <= max(edge + 1, 1.1 * edge), (low, edge, best)
    assert smallest_as_good(lambda number: number == 8, {4, 8, 16}, 16, 4) in range(9, 17), "a worse number ends the way, whatever lies below it"
    with pytest.raises(ValueError, match="the smallest number of steps is 1"):
        golden_section(float, 0, 5)


def test_a_difference_counts_if_its_pairs_show_it() -> None:
    """The sets vary far more than what one of them is above the other."""
    common, own = np.random.default_rng(0).normal(size=(2, 200))
    best = Measured("euler", 20, 20, 1.0, 1.0 + common)
    worse = Measured("euler", 5, 5, 1.1, 1.1 + common + 0.02 * own)
    alike = Measured("euler", 10, 10, 1.01, 1.01 + common + 0.02 * own)
    assert worse.is_worse_than(best) and not alike.is_worse_than(best) and not best.is_worse_than(worse)
    difference, (low, high) = worse.above(best)
    assert difference == pytest.approx(0.1) and low < 0.1 < high and high - low == pytest.approx(0.08, rel=0.3)
    assert worse.interval[0] < best.kid < worse.interval[1], "side by side the intervals would tell nothing"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> RunDir:
    """A trained model, and a generate stage that was not started."""
    folder = tmp_path_factory.mktemp("steps")
    stages = {
        "train": {"kind": "train", "config": {**TINY_NET, "strategy": "rflow", "mode": "dual"}, "resources": {"cpus": 1}},
        "images": {"kind": "generate", "from": "train", "condition": "test", "count": 4, "chunk": 4, "sampling": {"steps": 2, "time_shift": 2.0}},
    }
    return _made(folder, cache, {**tiny_spec(name="steps", data=DATA), "stages": stages})


def _made(folder: Path, cache: Path, record: dict[str, Any]) -> RunDir:
    import yaml

    path = folder / f"{record['name']}.yaml"
    path.write_text(yaml.safe_dump(record))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDGEN_CACHE", str(cache))
        made: RunDir = create_run(path)[0]
        assert task.perform(made, "train", "train", 0, 0) == 0
    return made


@pytest.fixture(autouse=True)
def _same_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("MEDGEN_CACHE", str(cache))


def test_a_number_of_steps_is_judged_by_the_images_that_the_stage_would_draw(run: RunDir) -> None:
    """Image by image those of `generate`, and their KID by the definition of it, over both sequences."""
    planned = plan.read(run)
    settings = GenerateStage.model_validate({**planned.stage("images").settings, "count": IMAGES, "condition": "val"})
    stage = replace(planned.stage("images"), settings=settings.model_dump(mode="json", by_alias=True))
    work = alone.alone(run, planned, stage, Task("images", 0, "", Shard(0, IMAGES)))
    made_by = generate.prepare(work, settings, torch.device("cpu"))
    store = open_store(DataSpec.model_validate(planned.data), planned.seed, run.cache, work.say)
    measures = Measures.model_validate({"metrics": ["kid"], "extractor": "random_conv"})
    bench = Bench(run.cache, work.say, lambda *_: None)
    told: list[tuple[int, int]] = []
    sampling = made_by.config.sampling({**settings.sampling, "steps": 3})
    judge = Judge(made_by, sampling, store, "val", measures, bench, lambda *done: told.append(done))
    measured = judge.measure("euler", sampling)
    assert told[-1] == (IMAGES, IMAGES) and (measured.steps, measured.evaluations) == (3, 3)

    expected = [image for chunk in generate.chunks_of(Shard(0, IMAGES), 4) for image in generate.sample(replace(made_by, sampling=sampling), chunk, 0)]
    drawn = Drawn(made_by, sampling, lambda *_: None)
    kids = []
    for channel in ("t1_pre", "t1_gd"):
        images = np.stack([image[channel] for image in expected])
        assert np.array_equal(drawn.read(channel, np.arange(IMAGES)), images)
        extractor = feature_scores.extractor_of(judge.sides, channel, measures, bench)
        ours = extractor.network(extractor.prepared(images)).numpy()
        theirs = features(extractor, feature_scores.pictures_of(judge.sides, channel)[0], judge.sides.reference, bench)
        conditions = store.rows["patient"].to_numpy()[inputs.partner_rows(drawn, np.arange(IMAGES), store)]
        kids.append(distances.discrepancy(distances.cubic, ours, theirs, conditions, judge.sides.patients(judge.sides.reference), 0, "").value)
    assert measured.kid == pytest.approx(np.mean(kids), rel=1e-4)
    again = judge.measure("euler", sampling)
    assert np.array_equal(again.replicates, measured.replicates) and len(told) < 2 * IMAGES, "from the cache"


def test_find_steps_tells_the_fewest_and_measures_nothing_twice(run: RunDir, medgen: Medgen, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--low", 1, "--high", 4, "--images", IMAGES, "--extractor", "random_conv"]
    told = medgen("find-steps", run.root, *options).stdout
    record = lr_search.read(run.step_search("images"))
    assert run.step_search("images").with_suffix(".png").read_bytes().startswith(PNG)
    steps = [item["steps"] for item in record["measured"]]
    assert set(steps) <= {1, 2, 3, 4} and record["best"]["steps"] in steps and record["chosen"]["steps"] <= record["best"]["steps"]
    assert record["sampling"] == {"time_shift": 2.0, "sampler": "euler", "steps": record["chosen"]["steps"]}
    spec.family_config(plan.read(run).stage("train").settings["config"]).sampling(record["sampling"])
    assert f"-o stages.images.sampling.steps={record['chosen']['steps']}" in told and "noise: paired bootstrap over" in told
    best = next(item for item in record["measured"] if item["steps"] == record["best"]["steps"])
    assert best["kid"] == min(item["kid"] for item in record["measured"])
    chosen = next(item for item in record["measured"] if item["steps"] == record["chosen"]["steps"])
    assert np.percentile(np.array(chosen["replicates"]) - np.array(best["replicates"]), 2.5) <= 0

    def never(*_: object) -> None:
        raise AssertionError("it was drawn again")

    with monkeypatch.context() as patch:
        patch.setattr(generate, "sample", never)
        find_steps(str(run.root), ASKED)
        run.step_search("images").write_text("{damaged")
        find_steps(str(run.root), ASKED)  # the features are still in the cache
    assert lr_search.read(run.step_search("images")) == record

    both = find_steps(str(run.root), replace(ASKED, samplers=["heun"], high=2))
    joined = {(item["sampler"], item["steps"]): item["evaluations"] for item in lr_search.read(run.step_search("images"))["measured"]}
    assert {name for name, _ in joined} == {"euler", "heun"} and joined["heun", 2] == 3 and "heun" in both
    find_steps(str(run.root), replace(ASKED, images=IMAGES + 1, low=2, high=2))
    assert [(item["sampler"], item["steps"]) for item in lr_search.read(run.step_search("images"))["measured"]] == [("euler", 2)], "another protocol is another table"
    assert len(list(run.step_search("images").parent.glob("find_steps-*.json"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(generate, "sample", never)
        find_steps(str(run.root), ASKED)
    assert {item["sampler"] for item in lr_search.read(run.step_search("images"))["measured"]} == {"euler", "heun"}, "and the first is still there"


@pytest.mark.parametrize(("change", "message"), [
    ({"against": "test"}, "--against test: what is chosen by the test split cannot be judged by it any more; choose by val"),
    ({"low": 5}, "--low 5 is above --high 4"),
    ({"samplers": ["ddim"]}, r"ddim with steps: 1 \(--sampler, --low, --high\): sampler: 'ddim' does not fit strategy rflow; use one of: euler"),
    ({"stage": "train"}, "--stage train: it is a train stage; those that draw images: images"),
    ({"extractor": "inceptoin"}, "--extractor inceptoin: the extractors are: inception"),
    ({"extractor": "{kind: encoder, steps: 1}"}, "--extractor: .*greater than or equal to 50"),
])
def test_what_cannot_be_searched_is_refused(run: RunDir, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_steps(str(run.root), replace(ASKED, **change))


def test_what_has_no_steps_no_images_or_no_split_is_refused(tmp_path: Path, write_spec: WriteSpec) -> None:
    net = {**TINY_NET, "strategy": "rflow"}
    stages = {
        "train": {"kind": "train", "config": {**net, "mode": "seg"}},
        "bravo": {"kind": "train", "config": {**net, "mode": "bravo"}},
        "again": {"kind": "train", "repeat": "bravo"},
        "players": {"kind": "train", "config": {"model": "pacgan", "factors": [1, 1, 1], "in_channels": 8, "channels": ["bravo"]}},
        "masks": {"kind": "generate", "from": "train", "count": 4},
        "images": {"kind": "generate", "from": "bravo", "condition": "test", "count": 4},
        "repeated": {"kind": "generate", "from": "again", "condition": "test", "count": 4},
        "by_class": {"kind": "generate", "from": "players", "count": 4},
    }
    made = str(create_run(write_spec({**tiny_spec(name="others"), "stages": stages}))[0].root)
    for stage, message in (
        (None, "say which stage with --stage; generate stages that draw images: images, repeated, by_class"),
        ("masks", "--stage masks: it draws masks, and KID compares the features of images; name a stage that draws images: images"),
        ("by_class", "by_class: players samples in one go, so that there are no steps to choose"),
        ("repeated", "--against val: again was trained on the val split too"),
        ("images", "images needs bravo, where 1 of 1 tasks are not done"),
    ):
        with pytest.raises(MedgenError, match=message):
            find_steps(made, replace(ASKED, stage=stage))
