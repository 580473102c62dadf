"""An evaluate stage of several shards: its features are taken by an array of tasks, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import pytest
from conftest import tiny_spec

from medgen import plan as plans
from medgen import planning, site, spec, task
from medgen.errors import InputError
from medgen.evaluate import features
from medgen.evaluate.run import evaluate_run
from medgen.plan import Task
from medgen.rundir import RunDir

FEATURES = {"metrics": ["kid", "prdc"], "extractor": {"kind": "random_conv"}}


def with_shards(write_spec: Callable[[dict[str, Any]], Path], **changes: Any) -> spec.Spec:
    written = tiny_spec()
    written["stages"]["evaluate"] = {"kind": "evaluate", "of": "images", **FEATURES, **changes}
    return spec.load(write_spec(written))


def test_shards_become_an_array_in_front_and_do_not_change_the_run(write_spec: Callable[[dict[str, Any]], Path]) -> None:
    one, many = with_shards(write_spec), with_shards(write_spec, shards=3, parallel=2)
    local = site.load("local")
    assert planning.run_id_of(one) == planning.run_id_of(many)
    plan = planning.make_plan(many, local)
    stage, judged = plan.stage("features_evaluate"), plan.stage("evaluate")
    assert len({item.hash for item in stage.tasks}) == 3 and stage.parallel == 2 and stage.needs == ["collect_images"]
    assert judged.needs == ["collect_images", "features_evaluate"] and len(judged.tasks) == 1
    names = [item.name for item in plan.stages]
    assert names.index("collect_images") < names.index("features_evaluate") < names.index("evaluate")
    assert "features_evaluate" not in [item.name for item in planning.make_plan(one, local).stages]
    assert [item.hash for item in planning.make_plan(one, local).stage("evaluate").tasks] == [item.hash for item in judged.tasks]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": 4, "metrics": ["swd"], "extractor": None}, "shards share the features of images, and none of the metrics compares any"),
        ({"parallel": 2}, "parallel limits the shards, and there is one"),
        ({"shards": 0}, "shards"),
    ],
)
def test_shards_without_effect_are_refused(change: dict[str, Any], message: str, write_spec: Callable[[dict[str, Any]], Path]) -> None:
    with pytest.raises(InputError, match=message):
        with_shards(write_spec, **change)


def test_a_stage_may_not_take_the_name(write_spec: Callable[[dict[str, Any]], Path]) -> None:
    written = tiny_spec()
    written["stages"]["features_x"] = {"kind": "evaluate", "of": "images"}
    with pytest.raises(InputError, match="this name is used inside the run folder"):
        spec.load(write_spec(written))


def sharded(root: Path, cache: Path, shards: int) -> RunDir:
    """A finished run whose evaluate_images has a features stage of so many tasks."""
    run, _ = fake_run.full_run(root, cache, patients=8, size=32, count=24)
    plan = plans.read(run)
    record = asdict(plan)
    for stage in record["stages"]:
        if stage["name"] == "evaluate_images":
            stage["settings"] |= {**FEATURES, "shards": shards}
    front = fake_run.planned("features_evaluate_images", "features", ["collect_images"], {"of": "evaluate_images", "parts": shards})
    record["stages"].append(asdict(front) | {"tasks": [asdict(Task(front.name, number, f"hash-{number}", None)) for number in range(shards)]})
    run.plan.write_text(json.dumps(record))
    fake_run.finish(run, "collect_images", 1850, 8)  # its outcome names the plan's file
    return run


def test_the_evaluation_takes_nothing_that_the_array_has_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDGEN_CACHE", str(tmp_path / "cache"))
    run = sharded(tmp_path / "runs", tmp_path / "cache", 3)
    seen: list[int] = []
    computed = features._computed

    def counted(extractor: Any, pictures: Any, rows: np.ndarray) -> np.ndarray:
        seen.append(len(rows))
        return computed(extractor, pictures, rows)

    monkeypatch.setattr(features, "_computed", counted)
    shares = []
    for shard in range(3):
        before = sum(seen)
        assert task.perform(run, "features", "features_evaluate_images", shard, 0) == 0
        shares.append(sum(seen) - before)
        outcome = run.read_outcome("features_evaluate_images", shard)
        assert outcome is not None and outcome.status == "done" and outcome.facts["images"] >= shares[-1]
    assert min(shares) > 0
    taken = len(seen)
    evaluate_run(run, "evaluate_images", tmp_path / "cache", fake_run.quiet, lambda *_: None)
    assert len(seen) == taken
    scores = json.loads(run.metrics("evaluate_images").read_text())["scores"]
    evaluate_run(run, "evaluate_images", tmp_path / "cache", fake_run.quiet, lambda *_: None)
    for path in (tmp_path / "cache" / "features").rglob("*.npz"):
        path.unlink()
    evaluate_run(run, "evaluate_images", tmp_path / "cache", fake_run.quiet, lambda *_: None)
    assert len(seen) > taken
    for anew, before in zip(json.loads(run.metrics("evaluate_images").read_text())["scores"], scores, strict=True):
        assert anew["value"] == pytest.approx(before["value"], rel=1e-3, abs=1e-5), "other batches, other rounding"
