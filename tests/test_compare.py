"""`medgen compare`: one row only for what was measured alike, and no better one within the noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_run
import pytest

from medgen import files
from medgen.errors import InputError
from medgen.evaluate.scores import METRICS_SCHEMA, Score, score, to_json
from medgen.watch.compare import Column, Measured, compare, compared

PROTOCOL = "extractor A; 100 images a side; seed 1"


def one(value: float, ci: tuple[float, float] | None = None, metric: str = "kid", protocol: str = PROTOCOL, n: int = 100, floor: float | None = 0.0) -> Score:
    return score(metric, "bravo", value, ci, floor, n, protocol)


def column(name: str, *scores: Score, against: str = "test", data: str = "d1") -> Column:
    return Column(name, tuple(Measured(item, against, data) for item in scores))


def test_another_seed_is_the_same_protocol_and_disjoint_intervals_tell_them_apart() -> None:
    found = compared([column("a", one(0.1, (0.08, 0.12))), column("b", one(0.3, (0.25, 0.35), protocol=PROTOCOL.replace("seed 1", "seed 7")))])
    (row,) = found.rows
    assert row.values == {"a": (0.1, (0.08, 0.12)), "b": (0.3, (0.25, 0.35))} and row.lead == "a" and "seed" not in row.protocol and not found.apart


@pytest.mark.parametrize(
    ("metric", "first", "second", "lead"),
    [
        ("kid", (0.1, (0.05, 0.2)), (0.3, (0.15, 0.4)), "not shown"),
        ("kid", (0.1, None), (0.3, (0.25, 0.35)), "no interval"),
        ("psnr", (20.0, (19.0, 21.0)), (30.0, (29.0, 31.0)), "b"),
        ("ms_ssim_diversity", (0.1, (0.09, 0.11)), (0.3, (0.29, 0.31)), "b"),  # nearer to the floor of 0.35, though larger
        ("mae", (0.1, (0.09, 0.11)), (0.3, (0.29, 0.31)), "a"),
    ],
)
def test_what_is_better_depends_on_the_metric_and_shows_only_beyond_the_noise(metric: str, first: Any, second: Any, lead: str) -> None:
    found = compared([column("a", one(*first, metric, floor=0.35)), column("b", one(*second, metric, floor=0.35))])
    assert found.rows[0].lead == lead


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (column("b", one(0.3, n=90)), "images 100 in a, 90 in b"),
        (column("b", one(0.3), data="d2"), "real data d1 in a, d2 in b"),
        (column("b", one(0.3), against="val"), "split test in a, val in b"),
        (column("b", one(0.3, protocol=PROTOCOL.replace("A", "B"))), "extractor A in a, extractor B in b"),
    ],
)
def test_what_was_not_measured_alike_is_never_in_one_row(other: Column, reason: str) -> None:
    found = compared([column("a", one(0.1)), other])
    assert found.rows == () and found.apart == (f"kid bravo: {reason}",)


def test_a_third_one_that_differs_is_listed_beside_the_row_of_the_others() -> None:
    found = compared([column("a", one(0.1)), column("b", one(0.2)), column("c", one(0.3, n=5), one(1.0, metric="mae"))])
    assert set(found.rows[0].values) == {"a", "b"}
    assert found.apart == ("kid bravo: images 5 in c, 100 in a", "mae bravo: only c has it")


def write(folder: Path, *scores: Score, schema: int = METRICS_SCHEMA) -> Path:
    files.write_json(folder / "metrics.json", {"schema": schema, "against": "test", "inputs": {"data_fingerprint": "d1"}, "scores": to_json(list(scores))})
    return folder


def test_the_command_line(tmp_path: Path, medgen: Callable[..., Any]) -> None:
    write(tmp_path / "a", one(0.1, (0.08, 0.12)))
    write(tmp_path / "b", one(0.3, (0.25, 0.35)), one(2.0, metric="mae"))
    shown = medgen("compare", "a", "b").stdout
    assert "Kernel distance (KID) bravo" in shown and "0.1 [0.08, 0.12]" in shown and "mae bravo: only b has it" in shown
    assert json.loads(medgen("compare", "a", "b", "--json").stdout)["rows"][0]["lead"] == "a"
    assert "a comparison needs two evaluations" in medgen("compare", "a", expect=2).stderr
    assert "a stands twice" in medgen("compare", "a", "a", expect=2).stderr
    (tmp_path / "empty").mkdir()
    assert "empty: a folder without metrics.json" in medgen("compare", "a", "empty", expect=2).stderr
    write(tmp_path / "old", one(0.1), schema=1)
    assert "written by another version of medgen" in medgen("compare", "a", "old", expect=2).stderr
    (tmp_path / "b" / "metrics.json").write_text("{}")
    assert "no scores of medgen" in medgen("compare", "a", "b", expect=2).stderr


def test_one_evaluation_is_no_comparison() -> None:
    with pytest.raises(InputError, match="needs two evaluations"):
        compared([column("a", one(0.1))])


def test_runs_by_their_sets_with_all_that_measures_them(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sets of one run are two columns; a run without scores says how to see how far it is."""
    monkeypatch.setenv("MEDGEN_RUNS", str(tmp_path))
    run, _ = fake_run.full_run(tmp_path, cache)
    with pytest.raises(InputError, match=f"nothing of it is measured yet; medgen watch {run.run_id}"):
        compare([run.run_id], as_json=True)
    for stage, value in (("evaluate_images", 0.1), ("evaluate_pairs", 0.3)):
        write(run.metrics(stage).parent, one(value, (value - 0.01, value + 0.01)))
    compare([run.run_id], as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["columns"] == [f"{run.run_id}/images", f"{run.run_id}/pairs"] and found["rows"][0]["lead"] == f"{run.run_id}/images"
