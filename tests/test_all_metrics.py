"""Every metric that a job may ask for, in one evaluate stage, with an encoder that the stage trains itself and LPIPS from a local file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fake_run
import pytest
from test_lpips import file_of, package

from medgen import plan as plans
from medgen.evaluate.run import evaluate_run
from medgen.evaluate.scores import MEANINGS, from_json
from medgen.files import sha256_file
from medgen.rundir import RunDir
from medgen.spec_evaluate import FEATURE_METRICS, MASK_METRICS, METRICS, PERCEPTUAL_METRICS

STAGE = "evaluate_pairs"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[RunDir, dict[str, Any], list[str]]:
    root = tmp_path_factory.mktemp("all")
    run, _ = fake_run.full_run(root, cache, patients=16, size=32, count=64)
    backbone = file_of(package("alex"), root / "alexnet.pth")
    record = json.loads(run.plan.read_text())
    for stage in record["stages"]:
        if stage["name"] == STAGE:
            stage["settings"] |= {
                "metrics": [name for name in METRICS if name not in (*MASK_METRICS, "auc")],
                "extractor": {"kind": "encoder", "size": 32, "steps": 50, "width": 8},
                "lpips": {"net": "alex", "file": str(backbone), "sha256": sha256_file(backbone)}, "allow_small_n": True,
            }  # fmt: skip
    run.plan.write_text(json.dumps(record))
    said: list[str] = []
    evaluate_run(run, STAGE, cache, said.append, lambda *_: None)
    return run, json.loads(run.metrics(STAGE).read_text()), said


def test_every_metric_has_a_score_or_a_reason_under_its_own_name(evaluated: tuple[RunDir, dict[str, Any], list[str]]) -> None:
    """A metric that nobody wired up would be reported under another's name, or not at all."""
    run, record, _ = evaluated
    names = {"prdc": ("precision", "recall", "density", "coverage"), "fid": ("fd_small_n",), "regions": ("region_mean", "region_spread", "region_distance")}
    found = {item.metric for item in from_json(record["scores"])}
    asked = [name for name in METRICS if name not in (*MASK_METRICS, "auc")]
    for name in asked:
        assert set(names.get(name, (name,))) <= found or name in record["skipped"], name
    assert not set(record["skipped"]) & {"lpips", "psd", "mse", "lpips_diversity", "cmmd", "prdc"}
    assert found <= set(MEANINGS)
    assert plans.read(run).stage(STAGE).settings["of"] == record["of"]


def test_the_encoder_is_part_of_the_protocol_and_is_trained_once(evaluated: tuple[RunDir, dict[str, Any], list[str]], cache: Path) -> None:
    run, record, said = evaluated
    protocols = {item["protocol"].split(",")[0] for item in record["scores"] if item["metric"] in (*FEATURE_METRICS, "precision")}
    assert len(protocols) == 1 and "encoder" in next(iter(protocols))
    again: list[str] = []
    evaluate_run(run, STAGE, cache, again.append, lambda *_: None)
    assert json.loads(run.metrics(STAGE).read_text())["scores"] == record["scores"]
    assert any(line.startswith("encoder: 50 steps on") for line in said) and not any(line.startswith("encoder: ") for line in again)


def test_perceptual_scores_see_the_blur_and_name_their_network(evaluated: tuple[RunDir, dict[str, Any], list[str]]) -> None:
    _, record, _ = evaluated
    scores = {item.metric: item for item in from_json(record["scores"]) if item.metric in PERCEPTUAL_METRICS}
    assert 0 < scores["lpips"].value < (scores["lpips"].floor or 0), "its own patient is nearer than another"
    assert all("alex" in item.protocol and "sha256" in item.protocol for item in scores.values())
    assert scores["lpips_diversity"].floor is not None and "random pairs" in scores["lpips_diversity"].protocol
