"""The report: complete, self-contained, and still a report when stages are missing or have failed."""

import base64
import csv
import io
import json
import re
import shutil
from pathlib import Path

import fake_run
import numpy as np
import pytest
import yaml
from html_page import Page
from PIL import Image

from medgen.evaluate.run import evaluate_run
from medgen.report import charts, gather, words
from medgen.report.build import build_report
from medgen.report.pictures import Outline, mask_tile, outline, tile
from medgen.rundir import RunDir
from medgen.spec_data import DataSpec

COUNT = 48


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> RunDir:
    run, _ = fake_run.full_run(tmp_path_factory.mktemp("fake"), cache, patients=8, size=32, count=COUNT)
    for number, name in enumerate(("evaluate_masks", "evaluate_images", "evaluate_pairs")):
        evaluate_run(run, name, cache, fake_run.quiet, lambda *_: None)
        fake_run.finish(run, name, 1900 + number, 5)
    return run


@pytest.fixture
def run(finished: RunDir, tmp_path: Path) -> RunDir:
    return RunDir(shutil.copytree(finished.root, tmp_path / finished.run_id))


def page_of(run: RunDir, cache: Path, say: object = fake_run.quiet) -> Page:
    assert callable(say)
    assert build_report(run, "report", cache, say)[0] == run.report
    return Page(run.report.read_text())


def test_everything_is_there(run: RunDir, cache: Path) -> None:
    page = page_of(run, cache)
    assert {"masks", "images", "pairs", "training", "course", "provenance"} <= set(page.identifiers)
    for wanted in ("brain_demo", "48 synthetic masks", "48 synthetic bravo images", "Sliced Wasserstein distance", "times the floor",
                   "rejected empty", "Did the models learn?", "4f1c0de9b7a2", "data fingerprint", "c0ffee", "masks are drawn from nothing",
                   "computer-drawn phantoms", "complete", "no interval: ", "The real side is"):
        assert wanted in page.text, wanted
    kinds = {label.rpartition(" ")[0] for label in page.labels}
    assert kinds == {"given mask", "real bravo", "synthetic bravo", "real mask", "synthetic mask"}
    assert page.text.index("Is it good?") < page.text.index("Is it a copy?") < page.text.index("Is it useful?") < page.text.index("48 synthetic bravo images")
    html = run.report.read_text()
    assert html.count('<svg class="chart"') == 2 * 2 + 1 + 2 * 2  # two image sets, masks, two trainings
    assert html.count('class="outline"') > 100


def test_it_needs_no_network(run: RunDir, cache: Path) -> None:
    page_of(run, cache).require_self_contained()
    assert run.report.stat().st_size < 3 * 2**20


def test_every_number_of_the_metrics_is_on_the_page(run: RunDir, cache: Path) -> None:
    page = page_of(run, cache)
    for stage in ("evaluate_masks", "evaluate_images", "evaluate_pairs"):
        record = gather.read_metrics(run, stage)
        assert record is not None
        for score in record["scores"]:
            assert words.number(score["value"]) in page.text
            assert words.number(score["floor"]) in page.text
            assert score["protocol"] in page.text


def test_the_table_and_a_card_of_each_set_lie_beside_the_page(run: RunDir, cache: Path) -> None:
    written = build_report(run, "report", cache, fake_run.quiet)
    assert {path.name for path in written} == {"index.html", "scores.csv", "dataset_card_masks.md", "dataset_card_images.md", "dataset_card_pairs.md"}
    with open(run.report_table, newline="") as handle:
        rows = list(csv.DictReader(handle))
    records = {stage: gather.read_metrics(run, stage) for stage in ("evaluate_masks", "evaluate_images", "evaluate_pairs")}
    assert [(row["stage"], row["dataset"], float(row["value"])) for row in rows] == [
        (stage, stage.removeprefix("evaluate_"), item["value"]) for stage in ("evaluate_images", "evaluate_pairs", "evaluate_masks") for item in (records[stage] or {})["scores"]
    ]
    text = run.dataset_card("masks").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["pretty_name"] == "brain_demo: 48 synthetic masks"
    for wanted in ("c0ffee" * 10, "commit 4f1c0de9b7a2", "| rejected empty | 3 |", "| split train | 4 patients", "drawn from nothing but noise 48", "nothing here shows a patient", "diffusion, rflow, seg"):
        assert wanted in text, wanted
    assert not re.search(r"/tmp|node-7|ada\b", text), "a card is given away: no paths, hosts or people"
    assert text.splitlines()[12] in run.report.read_text(), "the page shows the card"


def test_stages_that_measure_usefulness_are_told_and_those_that_did_not_run(run: RunDir, cache: Path) -> None:
    plan = json.loads(run.plan.read_text())
    template = next(stage for stage in plan["stages"] if stage["name"] == "evaluate_images")
    for name, kind in (("worth", "utility"), ("shape", "structure")):
        stage = json.loads(json.dumps(template).replace("evaluate_images", name))
        plan["stages"].insert(-1, {**stage, "kind": kind, "settings": {"kind": kind, "of": "images"}})
    run.plan.write_text(json.dumps(plan))
    fake_run.finish(run, "shape", 100, 5, status="failed", cause="the disk is full")
    score = {"metric": "utility_dice", "channel": "bravo", "value": 0.61, "ci": [0.5, 0.7], "floor": None, "n": 40, "unit": "", "better": "higher", "protocol": "U-Net", "comparison": None}
    run.metrics("worth").parent.mkdir()
    run.metrics("worth").write_text(json.dumps({
        "schema": 2, "kind": "utility", "stage": "worth", "of": "images", "against": "test", "scores": [{**score, "group": "real"}, {**score, "group": "synthetic", "value": 0.44}],
        "skipped": {}, "counts": {"test": 40}, "details": {"comparisons": [{"metric": "utility_dice", "arm": "synthetic", "to": "real", "words": "a loss of 0.170"}]},
    }))
    text = page_of(run, cache).text
    assert "by what was trained on: real 0.610, synthetic 0.440. synthetic: a loss of 0.170." in text
    assert "Not measured: shape failed: the disk is full." in text
    assert "Not measured: shape failed." in run.dataset_card("images").read_text(), "a cause may name a patient, and cards are given away"
    assert "worth,images,utility_dice,bravo,synthetic,,0.44" in run.report_table.read_text()


def test_suspected_copies_stand_beside_the_training_slice(run: RunDir, cache: Path) -> None:
    record = json.loads(run.metrics("evaluate_images").read_text())
    pair = record["details"]["copies"][0]
    suspect, other = {**pair, "ratio": 0.1234, "space": "features", "is_suspect": True}, {**pair, "ratio": 0.777, "space": "pixels", "is_suspect": False}
    for suspects, shown in ((1, 4), (6, 6), (30, 16)):
        record["details"]["copies"] = [*[suspect] * suspects, *[other] * 20]
        run.metrics("evaluate_images").write_text(json.dumps(record))
        text = page_of(run, cache).text
        assert text.count("suspected copy, ratio 0.123 (features)") == min(suspects, 16)
        assert text.count("ratio 0.777 (pixels)") == shown - min(suspects, 16)


def test_the_gallery_is_drawn_from_the_seed(run: RunDir, cache: Path) -> None:
    first = page_of(run, cache).labels
    assert page_of(run, cache).labels == first


def test_stages_that_never_ran_are_named(run: RunDir, cache: Path) -> None:
    for folder in ("images", "evaluate_images", "evaluate_pairs", "evaluate_masks", "train_bravo"):
        shutil.rmtree(run.stage(folder))
        for outcome in (run.root / "outcome").glob(f"*{folder}*.json"):
            outcome.unlink()
    page = page_of(run, cache)
    assert "incomplete" in page.text
    assert "images has not been collected yet" in page.text
    assert "This set was not evaluated" in page.text
    assert any(label.startswith("given mask") for label in page.labels), "pairs need no evaluation to be shown"


def test_train_generate_report_is_enough(tmp_path: Path, cache: Path, finished: RunDir) -> None:
    data = DataSpec(format="phantom", patients=8, size=32)
    run = fake_run.make_run(tmp_path, data, [
        fake_run.planned("train", "train", [], {"config": {"model": "other"}, "repeat": None}),
        fake_run.planned("samples", "generate", ["train"], {"from": "train", "count": 6, "condition": None}, 6),
        fake_run.planned("report", "report", ["samples"], {}),
    ])
    images = fake_run.blurred(np.random.default_rng(0).uniform(size=(6, 32, 32)), 2)
    fake_run.write_dataset(run, "samples", {"bravo": images}, None, "none")
    page = page_of(run, cache)
    assert "6 synthetic bravo images" in page.text
    assert "training" not in page.identifiers


def test_a_failure_is_told_with_its_cause(run: RunDir, cache: Path) -> None:
    fake_run.finish(run, "images", 1700, 60, status="failed", cause="node-7 ran out of memory", attempt=2)
    fake_run.finish(run, "images", 1800, 60, status="failed", cause="loss is <b>not a number</b> at step 40", attempt=3)
    page = page_of(run, cache)
    assert "partly failed" in page.text
    assert "loss is <b>not a number</b> at step 40" in page.text, "causes are text, not markup"
    assert "node-7 ran out of memory" in page.text, "earlier attempts are told too"
    assert "What went wrong on the way" in page.text


def test_a_report_without_the_real_data_says_so_and_shows_the_rest(run: RunDir, cache: Path, tmp_path: Path) -> None:
    plan = json.loads(run.plan.read_text())
    plan["data"] |= {"format": "nifti", "root": str(tmp_path / "gone")}
    del plan["data"]["patients"]
    run.plan.write_text(json.dumps(plan))
    said: list[str] = []
    page = page_of(run, cache, said.append)
    assert any("real pictures are left out" in line and "gone" in line for line in said)
    assert any(label.startswith("synthetic bravo") for label in page.labels)
    assert not any(label.startswith("real") for label in page.labels)


def test_a_damaged_dataset_costs_its_pictures_only(run: RunDir, cache: Path) -> None:
    for path in (run.dataset("images") / "bravo").iterdir():
        path.write_bytes(b"")
    page = page_of(run, cache)
    assert "No pictures" in page.text and "has changed since it was collected" in page.text
    assert any(label.startswith("synthetic mask") for label in page.labels)


def test_a_log_cut_by_a_crash_still_gives_curves(run: RunDir, cache: Path) -> None:
    with open(run.training_log("train_seg"), "a") as log:
        log.write('{"step": 410, "lo')
    curves = gather.training_curves(run, "train_seg")
    assert curves is not None
    assert curves.steps[-1] == 400
    assert len(curves.bins) == 10
    assert curves.bins[0] > curves.bins[9]
    page_of(run, cache)


def test_device_hours_count_every_attempt(run: RunDir) -> None:
    from medgen import plan as plans

    fake_run.finish(run, "images", 1000, 3600, status="failed", cause="killed", attempt=2)
    fake_run.finish(run, "images", 5000, 1800, attempt=3)
    facts = {stage.name: stage for stage in gather.all_stages(run, plans.read(run))}
    assert facts["images"].device_hours == pytest.approx((240 + 3600 + 1800) / 3600)
    assert facts["images"].status == "done"
    assert [attempt.status for attempt in facts["images"].attempts] == ["done", "failed", "done"]


def test_pictures_are_made_small_and_colours_stay() -> None:
    shown = tile(np.zeros((300, 600, 3)), np.eye(300, dtype=np.uint8), "synthetic image", "synthetic", "a")
    picture = Image.open(io.BytesIO(base64.b64decode(shown.source.partition(",")[2])))
    assert (picture.size, picture.mode, shown.width, shown.height) == ((256, 128), "RGB", 600, 300)


def test_the_outline_of_a_mask_goes_around_its_pixels() -> None:
    mask = np.zeros((6, 6), np.uint8)
    mask[2:4, 1:3] = 1
    numbers = [float(text) for text in re.findall(r"-?[\d.]+", outline(mask))]
    columns, rows = numbers[::2], numbers[1::2]
    assert (min(columns), max(columns), min(rows), max(rows)) == (1.0, 3.0, 2.0, 4.0)
    assert outline(np.zeros((6, 6), np.uint8)) == ""
    assert outline(np.ones((6, 6), np.uint8)).count("M") == 1, "a mask that touches the border is closed there"


def test_regions_of_a_mask_have_outlines_and_colours_of_their_own() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[1:7, 1:7], mask[3:5, 3:5] = 1, 2
    ring, cavity = mask_tile(mask, "given mask", "a").outlines
    assert (ring.colour, cavity.colour) == (1, 2)
    assert ring.path.count("M") == 2 and cavity.path.count("M") == 1, "a ring has an inner border too; filled by the even-odd rule it is empty inside"
    columns = [float(text) for text in re.findall(r"-?[\d.]+", cavity.path)][::2]
    assert (min(columns), max(columns)) == (3.0, 5.0)
    (only,) = tile(np.zeros((8, 8)), (mask > 0).astype(np.uint8), "synthetic image", "synthetic", "a").outlines
    assert only == Outline(outline(mask > 0), 1) and mask_tile(np.zeros((8, 8), np.uint8), "given mask", "a").outlines == ()
    (third,) = mask_tile(np.where(mask == 2, 3, 0), "given mask", "a").outlines
    assert third.colour == 3, "a region keeps its colour where others are missing"


def test_charts_map_values_to_places() -> None:
    axis = charts.Axis(0, 10, 100, 200)
    assert (axis(0), axis(5), axis(10)) == (100, 150, 200)
    logarithmic = charts.Axis(0.01, 100, 0, 400, logarithmic=True)
    assert logarithmic(1) == 200
    assert set(logarithmic.ticks(5)) >= {0.01, 1, 100}
    assert charts.line_chart([], "x", "y") == ""
    flat = charts.line_chart([charts.Series("flat", [1, 2], [3, 3], "first")], "x", "y", allow_logarithmic=True)
    assert "nan" not in flat
    assert "log scale" in charts.line_chart([charts.Series("steep", [1, 2], [1, 1e4], "first")], "x", "y", allow_logarithmic=True)


@pytest.mark.parametrize(("value", "text"), [
    (0.0, "0"), (0.12345, "0.123"), (0.0012345, "0.00123"), (1.0, "1.00"), (27.69, "27.7"), (999.0, "999"), (1059.6, "1,060"), (12345, "12,345"), (1e-5, "1e-05"),
])
def test_numbers_for_people(value: float, text: str) -> None:
    assert words.number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (59.9, "1 min"), (250, "4 min 10 s"), (12300, "3 h 25 min"), (190800, "2 d 5 h")])
def test_durations_for_people(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text
