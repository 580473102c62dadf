"""FID, KID and similarity of pairs by class: real with real, real with synthetic, synthetic with synthetic, in the file and on the page."""

from __future__ import annotations

import csv
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import pytest
from conftest import tiny_spec
from scipy.ndimage import gaussian_filter

from medgen import spec
from medgen.data.image_files import write_slice
from medgen.data.store import SliceStore, open_store
from medgen.errors import InputError
from medgen.evaluate import by_class, diversity, inputs
from medgen.evaluate.run import evaluate_run
from medgen.evaluate.scores import MEANINGS, from_json
from medgen.report import words
from medgen.report.build import build_report
from medgen.rundir import RunDir
from medgen.spec_data import DataSpec
from medgen.spec_evaluate import Measures
from medgen.watch import sweep
from medgen.watch.state import read_state

SIZE = 32
SETTINGS: dict[str, Any] = {"of": "images", "against": "test", "metrics": ["fid", "kid", "ssim_pairs"], "extractor": {"kind": "random_conv"}, "allow_small_n": True}


def drawn(label: str, count: int, seed: int) -> np.ndarray:
    """Textured disks with a bright spot, on the left of one class and on the right of the other."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    disk = (rows - 16) ** 2 + (columns - 16) ** 2 < 14**2
    images = 0.35 + np.stack([gaussian_filter(noise, 2) for noise in generator.normal(size=(count, SIZE, SIZE))])
    places = generator.integers(-2, 3, size=(count, 2)) + np.array([16, 10 if label == "AD" else 22])
    spots = np.stack([0.5 * np.exp(-((rows - r) ** 2 + (columns - c) ** 2) / 8) for r, c in places])
    return np.clip((images + spots) * disk, 0, 1).astype(np.float32)


def cohort(folder: Path, counts: dict[str, int]) -> DataSpec:
    """CSV data: patients of two slices, `counts` slices of each class in train and in test."""
    lines = []
    for number, (split, label) in enumerate((split, label) for split in ("train", "test") for label in counts):
        for index, image in enumerate(drawn(label, counts[label], number)):
            path = folder / f"{split}_{label}_{index:03d}.npy"
            write_slice(path, image, "image", np.eye(4))
            lines.append({"patient": f"{split}{label}{index // 2}", "split": split, "t1": str(path), "label": label})
    with open(folder / "index.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return DataSpec(format="csv", root=folder / "index.csv", images={"t1": "t1"}, size=SIZE, window={"fixed": [0, 1]}, content=0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[DataSpec, SliceStore]:
    found = cohort(tmp_path_factory.mktemp("cohort"), {"AD": 24, "CN": 40})
    return found, open_store(found, fake_run.SEED, cache, fake_run.quiet)


def evaluated(folder: Path, data: tuple[DataSpec, SliceStore], cache: Path, images: dict[str, np.ndarray], labelled: bool = True, **changes: Any) -> tuple[RunDir, dict[str, Any]]:
    """A run whose dataset holds `images` (class -> pictures), and what evaluate wrote of it."""
    count = sum(len(part) for part in images.values())
    run = fake_run.make_run(folder, data[0], [
        fake_run.planned("train", "train", [], {"config": {"model": "pacgan"}, "repeat": None}),
        fake_run.planned("images", "generate", ["train"], {"from": "train", "count": count, "condition": None}, count),
        fake_run.planned("evaluate", "evaluate", ["images"], SETTINGS | changes),
        fake_run.planned("report", "report", ["evaluate"], {}),
    ])
    (run.root / "fingerprint").write_text(data[1].fingerprint)
    labels = [label for label, part in images.items() for _ in part]
    fake_run.write_dataset(run, "images", {"t1": np.concatenate(list(images.values()))}, None, "none", labels if labelled else None)
    evaluate_run(run, "evaluate", cache, fake_run.quiet, lambda *_: None)
    return run, json.loads(run.metrics("evaluate").read_text())


def values(record: dict[str, Any], metric: str) -> dict[tuple[str | None, str], Any]:
    return {(item.group, item.comparison): item for item in from_json(record["scores"]) if item.metric == metric}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, data: tuple[DataSpec, SliceStore], cache: Path) -> tuple[RunDir, dict[str, Any]]:
    return evaluated(tmp_path_factory.mktemp("good"), data, cache, {"AD": drawn("AD", 60, 7), "CN": drawn("CN", 60, 8)})


def test_every_class_gets_three_comparisons_of_equal_numbers(good: tuple[RunDir, dict[str, Any]]) -> None:
    record = good[1]
    assert record["schema"] == 2 and not {"fid", "kid", "ssim_pairs"} & set(record["skipped"])
    for metric in ("fd_small_n", "kid", "ssim_pairs"):
        found = values(record, metric)
        assert list(found) == [(group, comparison) for group in (None, "AD", "CN") for comparison in ("real-real", "real-synthetic", "synthetic-synthetic")]
        for (group, comparison), item in found.items():
            assert item.floor == (None if comparison == "real-real" else found[group, "real-real"].value)
        assert len({item.protocol for item in found.values()}) == 1, "one protocol, so one note, for a table"
    kid = values(record, "kid")
    # 24 real slices of AD, and half of 60 synthetic ones of CN
    assert [kid[group, "real-real"].n for group in (None, "AD", "CN")] == [54, 24, 30]
    assert "54 images a side (AD 24, CN 30)" in kid[None, "real-real"].protocol
    assert all(item.ci[0] <= item.value <= item.ci[1] for item in kid.values())
    assert all(item.ci is None for item in values(record, "fd_small_n").values())
    assert "no interval" in values(record, "fd_small_n")["AD", "real-synthetic"].protocol
    # the same distribution: no further from real ones than those are from each other
    assert all(abs(item.value) < 0.05 for item in kid.values())


def test_exchanged_classes_are_seen_in_the_classes_alone(tmp_path: Path, data: tuple[DataSpec, SliceStore], good: tuple[RunDir, dict[str, Any]], cache: Path) -> None:
    _, record = evaluated(tmp_path, data, cache, {"AD": drawn("CN", 60, 7), "CN": drawn("AD", 60, 8)})
    for group in ("AD", "CN"):
        wrong, right = (values(found, "kid")[group, "real-synthetic"] for found in (record, good[1]))
        assert wrong.value > 5 * abs(right.value) and wrong.ci[0] > 0 > right.ci[0]
        wrong, right = (values(found, "ssim_pairs")[group, "real-synthetic"] for found in (record, good[1]))
        assert wrong.value < right.value - 0.02
    everything = values(record, "kid")[None, "real-synthetic"]
    assert everything.value < 0.2 * values(record, "kid")["AD", "real-synthetic"].value


def test_a_collapsed_class_resembles_itself(tmp_path: Path, data: tuple[DataSpec, SliceStore], good: tuple[RunDir, dict[str, Any]], cache: Path) -> None:
    few = drawn("AD", 4, 7)[np.arange(60) % 4]
    _, record = evaluated(tmp_path, data, cache, {"AD": few, "CN": drawn("CN", 60, 8)})
    collapsed, fine = (values(record, "ssim_pairs")[group, "synthetic-synthetic"] for group in ("AD", "CN"))
    assert collapsed.value > collapsed.floor + 0.1
    assert fine.value == pytest.approx(fine.floor, abs=0.03)


def test_pairs_are_of_one_class_and_never_of_one_patient(data: tuple[DataSpec, SliceStore], good: tuple[RunDir, dict[str, Any]]) -> None:
    from medgen import plan as plans

    sides = inputs.choose_sides(inputs.read_dataset(good[0], "images"), plans.read(good[0]), "test", data[1], Measures())
    groups = sides.synthetic_groups()
    for label in sides.classes:
        found = by_class._pairs_of_class(sides, groups, label)
        for comparison, pairs in found.items():
            assert len(np.unique(pairs, axis=0)) == len(pairs) > 100
            labels = {"real": sides.labels(sides.reference), "synthetic": sides.synthetic_labels()}
            for side, column in zip(comparison.split("-"), pairs.T, strict=True):
                assert set(labels[side][column]) == {label}
        patients = sides.patients(sides.reference)[found["real-real"]]
        assert (patients[:, 0] != patients[:, 1]).all() and len(found["real-real"]) == min(1000, {"AD": 24 * 22, "CN": 40 * 38}[label] // 2)
        assert (found["synthetic-synthetic"][:, 0] != found["synthetic-synthetic"][:, 1]).all()


@pytest.mark.parametrize("count", [6, 90])
def test_pairs_between_two_sets_are_different_and_of_different_patients(count: int) -> None:
    first, second = np.repeat(np.arange(count), 2), np.repeat(np.arange(count // 2), 5)
    found = diversity.random_pairs_between(first, second, 40, seed=3, stream="test")
    assert len(np.unique(found, axis=0)) == len(found) == 40
    assert (first[found[:, 0]] != second[found[:, 1]]).all()
    assert len(diversity.random_pairs_between(np.zeros(3), np.zeros(4), 40, 3, "test")) == 0
    assert len(diversity.random_pairs_between(np.zeros(0), np.zeros(4), 40, 3, "test")) == 0


def test_a_set_without_classes_is_compared_as_a_whole(tmp_path: Path, data: tuple[DataSpec, SliceStore], cache: Path) -> None:
    _, record = evaluated(tmp_path, data, cache, {"AD": drawn("AD", 30, 7), "CN": drawn("CN", 30, 8)}, labelled=False)
    assert {group for group, _ in values(record, "kid")} == {None}


def test_few_images_are_refused_with_the_reason(tmp_path: Path, data: tuple[DataSpec, SliceStore], cache: Path) -> None:
    _, record = evaluated(tmp_path, data, cache, {"AD": drawn("AD", 10, 7), "CN": drawn("CN", 40, 8)}, allow_small_n=False)
    assert not any(item["metric"].startswith("f") for item in record["scores"])
    assert "all 20, CN 20 a side: a Frechet distance of fewer than 2,048 images a side is mostly bias" in record["skipped"]["fid"]
    assert "AD: 5 images on the smallest side, at least 8 are needed" in record["skipped"]["kid"]
    assert {group for group, _ in values(record, "kid")} == {None, "CN"}


def test_images_on_masks_are_grouped_by_patient_and_masks_are_left_out(tmp_path: Path, cache: Path) -> None:
    """Phantoms, two test patients: halves of the synthetic set and real sides of a single one are no basis for a kernel distance."""
    run, store = fake_run.full_run(tmp_path, cache, patients=8, size=32, count=24)
    plan = json.loads(run.plan.read_text())
    for stage in plan["stages"]:
        if stage["kind"] == "evaluate":
            stage["settings"] |= {key: value for key, value in SETTINGS.items() if key != "of"}
    run.plan.write_text(json.dumps(plan))
    records = {}
    for name in ("masks", "images", "pairs"):
        evaluate_run(run, f"evaluate_{name}", cache, fake_run.quiet, lambda *_: None)
        records[name] = json.loads(run.metrics(f"evaluate_{name}").read_text())
    assert "only masks were drawn" in records["masks"]["skipped"]["kid"] and "only masks" in records["masks"]["skipped"]["ssim_pairs"]
    assert {group for group, _ in values(records["images"], "kid")} == {None}
    tested = set(store.rows["patient"][store.select("test", positive_only=True)])
    assert len(tested) == 2
    assert "all 8 a side: the images of a side are of one patient" in records["pairs"]["skipped"]["kid"]
    assert set(values(records["pairs"], "fd_small_n")) == {(None, comparison) for comparison in ("real-real", "real-synthetic", "synthetic-synthetic")}


def test_the_page_has_a_table_by_class_with_every_number(good: tuple[RunDir, dict[str, Any]], cache: Path) -> None:
    run, record = good
    build_report(run, "report", cache, fake_run.quiet)
    page = html.unescape(run.report.read_text())
    tables = re.findall(r'<table class="comparisons of3">(.*?)</table>', page, flags=re.DOTALL)
    for table, metric in zip(tables, ("kid", "fd_small_n", "ssim_pairs"), strict=True):
        assert MEANINGS[metric].title in table
        assert re.findall(r'<th scope="row">(.*?)</th>', table) == ["all", "AD", "CN"]
        shown = re.findall(r'<td class="right[^"]*" data-label="[rs][^"]*">([^<]+)(?:<small>([^<]+)</small>)?', table)
        expected = [item for item in from_json(record["scores"]) if item.comparison is not None and item.metric == metric]
        assert [value for value, _ in shown] == [words.number(item.value) for item in expected]
        assert [interval for _, interval in shown] == [words.interval(item) or "" for item in expected]
    main = "".join(re.findall(r'<table class="scores">(.*?)</table>', page, flags=re.DOTALL))
    assert main.count("Kernel distance (KID)") == 1, "one row for the dataset as a whole"


def test_points_of_a_sweep_show_the_whole_set_alone(good: tuple[RunDir, dict[str, Any]]) -> None:
    run, record = good
    fake_run.finish(run, "evaluate", 10, 5)
    point = sweep._point(run, read_state(run), {"seed": 7})
    assert {name for name in point.scores if "ssim_pairs" in name or "kid" in name} == {"evaluate: kid t1", "evaluate: ssim_pairs t1"}
    assert point.scores["evaluate: kid t1"].value == values(record, "kid")[None, "real-synthetic"].value


def test_records_without_comparisons_are_still_read() -> None:
    old = {"metric": "swd", "channel": "t1", "value": 0.2, "ci": [0.1, 0.3], "floor": 0.1, "n": 5, "unit": "", "better": "lower", "protocol": "p"}
    [score] = from_json([old])
    assert score.is_headline and score.name == "swd t1"


# --- the spec ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["kid"]}, "kid compares features: add extractor: inception"),
        ({"metrics": ["swd"], "extractor": "random_conv"}, "extractor has no effect without fid or kid or prdc or cmmd among the metrics; remove it"),
        ({"metrics": ["kid"], "extractor": "random_conv", "allow_small_n": True}, "allow_small_n has no effect without fid"),
        ({"metrics": ["kid"], "extractor": "clip"}, "unknown kind 'clip'; the kinds are: inception, dinov2, swav, resnet50, radimagenet, torchscript, encoder, random_conv"),
        ({"metrics": ["kid"], "extractor": "inception"}, "export MEDGEN_WEIGHTS=<a folder that jobs can read>`, and put there weights-inception-2015-12-05-6726825d.pth from https://"),
        ({"metrics": ["kid"], "extractor": {"kind": "dinov2", "arch": "vitg14"}}, "arch: 'vitg14' is no network of dinov2; those are: vits14, vitb14"),
        ({"metrics": ["kid"], "extractor": {"kind": "encoder", "steps": 0}}, "extractor.steps"),
        ({"metrics": ["lpips"]}, "lpips needs the weights of a network: add lpips: alex, vgg or squeeze"),
        ({"metrics": ["swd"], "lpips": {"net": "alex", "file": "alexnet.pth"}}, "lpips has no effect without lpips or lpips_diversity among the metrics"),
        ({"metrics": ["lpips"], "lpips": "resnet"}, "net: which network; write one of alex, vgg, squeeze"),
        ({"metrics": ["lpips"], "lpips": "vgg"}, "put there vgg16-397923af.pth from https://download.pytorch.org"),
        ({"metrics": ["kid"], "extractor": {"kind": "random_conv", "size": 64}}, "extractor.size: unknown key"),
        ({"metrics": ["kid"], "extractor": {"kind": "torchscript", "file": "dino.pt", "size": 224}}, "'range' is missing"),
        ({"metrics": ["kid"], "extractor": {"kind": "torchscript", "file": "dino.pt", "size": 224, "range": [1, 0]}}, "range is what black and white become"),
        ({"metrics": ["kid"], "extractor": {"kind": "inception", "file": "i.pth", "sha256": "6726825d"}}, "extractor.sha256"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused_by_their_name(change: dict[str, Any], message: str, write_spec: Callable[[dict[str, Any]], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDGEN_WEIGHTS", raising=False)
    written = tiny_spec()
    written["stages"]["evaluate"] = {"kind": "evaluate", "of": "images", **change}
    with pytest.raises(InputError) as caught:
        spec.load(write_spec(written))
    assert message in str(caught.value)


def test_missing_weights_are_told_at_submit(medgen: Callable[..., Any], write_spec: Callable[[dict[str, Any]], Path], environment: dict[str, str], tmp_path: Path) -> None:
    written = tiny_spec()
    written["stages"]["evaluate"] = {"kind": "evaluate", "of": "images", "metrics": ["kid"], "extractor": "inception"}
    environment["MEDGEN_WEIGHTS"] = str(tmp_path / "weights")
    told = medgen("submit", write_spec(written), "--local", expect=2).stderr
    assert "weights-inception-2015-12-05-6726825d.pth: No such file or directory; weights are never downloaded" in told
