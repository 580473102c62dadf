"""A sweep through the command line to its picture and table: every number against the files of the runs it comes from."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from PIL import Image
from test_pacgan_run import NET, spec_of, write_side

from medgen import spec as specs

Medgen = Callable[..., Any]
WriteSpec = Callable[[dict[str, Any]], Path]
LATENT, WEIGHT = "stages.train.config.latent", "stages.train.config.aimed_class"
VALUES: dict[str, list[int]] = {LATENT: [4, 8], WEIGHT: [2, 4]}


@pytest.fixture
def swept(tmp_path: Path) -> dict[str, Any]:
    """Four points of seconds: two sizes, images, and their scores against the val split."""
    write_side(tmp_path / "cohort", range(12))
    spec = spec_of(tmp_path / "cohort", "grid", images={"kind": "generate", "from": "train", "count": 8},
                   evaluate={"kind": "evaluate", "of": "images", "against": "val", "metrics": ["swd"]})  # fmt: skip
    spec["stages"]["train"]["config"] = {**NET, "critic_iterations": 1}
    return {**spec, "sweep": VALUES}


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def best_by_log(run: Path) -> float:
    """The highest AUC of the last phase among those that count for selection, from the training's own lines."""
    commits = [json.loads(path.read_text()) for path in (run / "train" / "ckpt").glob("step-*/commit.json")]
    selectable = {commit["step"] for commit in commits if "auc_16px" in commit["metrics"]}
    lines = [json.loads(line) for line in (run / "train" / "log.jsonl").read_text().splitlines()]
    return max(line["val_auc"] for line in lines if "val_auc" in line and line["step"] in selectable)


def test_the_picture_and_the_table_of_a_sweep(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, swept: dict[str, Any]) -> None:
    assert "no sweep called 'grid'" in medgen("study", "grid", "--out", "study", expect=2).stderr
    medgen("submit", write_spec(swept), "--local", timeout=900)  # sixteen processes, each of which imports torch
    told = medgen("study", "grid", "--out", "study").stdout
    rows = rows_of(tmp_path / "study" / "points.csv")
    assert sorted((row[LATENT], row[WEIGHT], row["state"]) for row in rows) == [("4", "2", "done"), ("4", "4", "done"), ("8", "2", "done"), ("8", "4", "done")]
    for row in rows:
        run = tmp_path / "runs" / row["run"]
        assert json.loads((run / "manifest.json").read_text())["sweep"] == {LATENT: int(row[LATENT]), WEIGHT: int(row[WEIGHT])}
        assert float(row["train: auc_16px"]) == best_by_log(run) and row["train: auc_16px split"] == "val"
        assert "train: auc_8px" not in row, "an earlier phase says nothing of the last"
        [swd] = [score for score in json.loads((run / "evaluate" / "metrics.json").read_text())["scores"] if score["metric"] == "swd"]
        assert float(row["evaluate: swd image"]) == swd["value"] and row["evaluate: swd image split"] == "val"
        assert [row[f"evaluate: swd image {end}"] for end in ("low", "high")] == ([repr(end) for end in swd["ci"]] if swd["ci"] else ["", ""])
    best = max(rows, key=lambda row: float(row["train: auc_16px"]))
    assert f"best in auc_16px, val split (higher is better): latent {best[LATENT]}, aimed_class {best[WEIGHT]}, with {float(best['train: auc_16px']):.4g}" in told
    assert "nothing was selected on the test set" in told and "4 of 4 points finished" in told
    with Image.open(tmp_path / "study" / "study.png") as picture:
        assert picture.width > 800 and picture.height > 600
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50, "something is drawn"
    assert "two results must not mix" in medgen("study", "grid", "--out", "study", expect=2).stderr

    run = tmp_path / "runs" / best["run"]  # as if it were still at work
    outcome = (run / "outcome" / "train.0.json").read_text()
    (run / "outcome" / "train.0.json").unlink()
    told = medgen("study", "grid", "--out", "later").stdout
    assert "3 of 4 points finished" in told and best["run"] not in told, "what is not finished is not named"
    assert [row["state"] == "done" for row in rows_of(tmp_path / "later" / "points.csv")].count(False) == 1
    metrics = run / "evaluate" / "metrics.json"  # and as if it were scored in another way
    [protocol] = [score["protocol"] for score in json.loads(metrics.read_text())["scores"] if score["metric"] == "swd"]
    metrics.write_text(metrics.read_text().replace(protocol, "X" + protocol[1:]))
    (run / "outcome" / "train.0.json").write_text(outcome)
    medgen("study", "grid", "--out", "mixed")
    heights = [Image.open(tmp_path / folder / "study.png").height for folder in ("study", "mixed")]
    assert heights[1] > heights[0] + 100, "another protocol has a panel of its own"
    table = medgen("ls", "grid", "--sweep").stdout
    assert "auc_16px" in table and "real against real" in table


def test_the_grid_of_the_published_study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEDGEN_ADNI", str(tmp_path))
    job = REPOSITORY / "jobs" / "pacgan_study.yaml"
    points = specs.load_points(job)
    assert len(points) == 105 and {point.spec.stages["evaluate"].against for point in points} == {"val"}  # type: ignore[union-attr]
    smaller = specs.load_points(job, ["name=pacgan_study64", "data.size=64", "stages.train.config.factors=[1, 1, 0.5, 0.25, 0.125]"])
    assert smaller[0].spec.stages["train"].config["batch_sizes"] == [32, 32, 32, 16, 16]  # type: ignore[union-attr]
