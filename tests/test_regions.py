"""Masks with several regions: their values beside real ones against closed forms, what a segmenter says of each, and how they are shown."""

from __future__ import annotations

import csv
import json
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import tiny_spec
from scipy import stats
from torch.nn import functional

from medgen import document, spec, task
from medgen.data.cardiac_phantoms import write_cardiac_phantoms
from medgen.data.image_files import write_slice
from medgen.data.store import SliceStore, open_store
from medgen.errors import InputError
from medgen.evaluate import inputs, intervals, regions
from medgen.evaluate.inputs import Sides
from medgen.evaluate.regions import Values
from medgen.evaluate.run import evaluate_run
from medgen.evaluate.scores import Score, from_json
from medgen.models.pacgan.config import Config as Pacgan
from medgen.report.build import build_report
from medgen.rundir import RunDir
from medgen.spec_data import DataSpec
from medgen.spec_evaluate import Measures
from medgen.utility import networks
from medgen.utility.learners import Segmenter
from medgen.utility.regions import as_channels

SIZE = 8
HEART = ("myocardium", "left_ventricle")
LOW, HIGH = 100.0, 2100.0  # ms that are 0 and 1


# --- values in regions, against closed forms ----------------------------------------------------------------------------


@dataclass
class Real:
    """Slices of equal hearts in memory, whose myocardium and left ventricle have these values."""

    muscle: np.ndarray
    blood: np.ndarray
    rows: pd.DataFrame
    regions: tuple[str, ...] = HEART
    has_masks: bool = True
    channels: list[str] = field(default_factory=lambda: ["image"])
    size: int = SIZE
    fingerprint: str = "made"

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.rows["label"])))

    @property
    def aliases(self) -> np.ndarray:
        return np.array([f"real_{number}" for number in range(len(self.rows))])

    def select(self, split: str, positive_only: bool = False) -> np.ndarray:
        return np.flatnonzero(self.rows["split"].to_numpy() == split)

    def images(self, channel: str, rows: np.ndarray) -> np.ndarray:
        return painted(self.muscle[rows], self.blood[rows])

    def masks(self, rows: np.ndarray) -> np.ndarray:
        return np.tile(heart(), (len(rows), 1, 1))

    def contents(self, channel: str, rows: np.ndarray) -> list[str]:
        return [str(row) for row in rows]


@dataclass
class Drawn:
    muscle: np.ndarray
    blood: np.ndarray
    index: pd.DataFrame
    name: str = "images"
    fingerprint: str = "drawn"
    tells_regions: bool = True
    files: list[str] = field(default_factory=lambda: ["image", "seg"])
    outputs: list[str] = field(default_factory=lambda: ["image"])

    @property
    def image_channels(self) -> list[str]:
        return [name for name in self.outputs if name != "seg"]

    def read(self, channel: str, rows: np.ndarray) -> np.ndarray:
        return np.tile(heart(), (len(rows), 1, 1)) if channel == "seg" else painted(self.muscle[rows], self.blood[rows])

    def contents(self, channel: str, rows: np.ndarray) -> list[str]:
        return [str(row) for row in rows]


def heart() -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[1:7, 1:7], mask[3:5, 3:5] = 1, 2
    return mask


def painted(muscle: np.ndarray, blood: np.ndarray) -> np.ndarray:
    """In each region a chessboard about its value, so that only its mean is that."""
    board = 0.01 * (1 - 2 * (np.indices((SIZE, SIZE)).sum(axis=0) % 2))
    images = board + np.where(heart() == 1, muscle[:, None, None], 0) + np.where(heart() == 2, blood[:, None, None], 0)
    return images.astype(np.float32)


def in_window(ms: np.ndarray) -> np.ndarray:
    return (ms - LOW) / (HIGH - LOW)


def real_side(patients: int, t2_windows: bool = False) -> Real:
    """A T1 and a T2 slice of each patient, as many in train as in test; the T1 of myocardium 1000 ms, evenly spread by 60 ms to both sides."""
    count = patients
    steps = np.linspace(-60, 60, count)
    muscle, blood = in_window(1000 + steps), in_window(1500 + 2 * steps)
    rows = pd.concat([
        pd.DataFrame({"id": f"{split} {label}", "patient": [f"{split} {number}" for number in range(count)], "split": split, "slice": 0, "label": label,
                      "mask_pixels": 36, "unit": "ms", "window_low_image": LOW, "window_high_image": HIGH})
        for split in ("test", "train") for label in ("T1", "T2")
    ], ignore_index=True)  # fmt: skip
    if t2_windows:
        rows.loc[rows["label"] == "T2", "window_high_image"] = HIGH + np.arange(2 * count)
    return Real(np.tile(muscle, 4), np.tile(blood, 4), rows)


def drawn_side(real: Real, narrowing: float) -> Drawn:
    """The test slices again, each that much of the way towards the mean of all."""
    rows = real.select("test")

    def pulled(values: np.ndarray) -> np.ndarray:
        return values.mean() + narrowing * (values - values.mean())

    index = pd.DataFrame({"id": [str(row) for row in rows], "label": real.rows["label"].to_numpy()[rows], "condition_kind": "synthetic", "condition": ""})
    return Drawn(pulled(real.muscle[rows]), pulled(real.blood[rows]), index)


def compared(drawn: Drawn, real: Real, **measures: Any) -> Sides:
    return inputs.sides_of(drawn, real, 7, "test", ("train",), Measures(metrics=["regions"], **measures))


def measured(drawn: Drawn, real: Real) -> tuple[dict[tuple[str, str, str | None], Score], list[dict[str, Any]], str | None]:
    sides = compared(drawn, real)
    told: list[dict[str, Any]] = []
    found, reason = regions.region_scores(sides, {"image": drawn.read("image", sides.chosen)}, told)
    return {(item.metric, item.channel, item.group): item for item in found}, told, reason


def test_a_set_that_is_right_on_average_and_too_narrow_is_found_out_in_ms() -> None:
    real = real_side(40)
    found, told, reason = measured(drawn_side(real, 0.7), real)
    assert reason is None and len(found) == 3 * 3 * 2
    steps = np.linspace(-60, 60, 40)
    for region, mean, factor in (("myocardium", 1000, 1), ("left_ventricle", 1500, 2), ("left_ventricle - myocardium", 500, 1)):
        of = {metric: found[f"region_{metric}", f"image: {region}", "T1"] for metric in ("mean", "spread", "distance")}
        assert {item.unit for item in of.values()} == {"ms"}
        assert (of["mean"].value, of["mean"].floor) == (pytest.approx(mean, abs=1e-2), pytest.approx(mean, abs=1e-2)), "a difference knows no offset of the window"
        spread = factor * steps.std(ddof=1)
        assert (of["spread"].value, of["spread"].floor) == (pytest.approx(0.7 * spread, rel=1e-4), pytest.approx(spread, rel=1e-4))
        assert of["spread"].ci is not None and of["spread"].ci[1] < 0.9 * spread, "shown to be too narrow"
        assert of["mean"].ci is not None and of["mean"].ci[0] < mean < of["mean"].ci[1]
        assert of["distance"].value == pytest.approx(0.3 * factor * np.abs(steps).mean(), rel=1e-4), "each rank is moved by 0.3 of its step"
        assert of["distance"].floor == pytest.approx(0, abs=1e-3), "the train split has the same values"
        assert of["mean"].better == "closer to floor" and of["distance"].n == 40
    item = next(item for item in told if (item["region"], item["group"]) == ("myocardium", "T1"))
    assert item["ratio"] == pytest.approx(0.7, abs=1e-4) and item["verdict"] == "narrow"
    assert re.fullmatch(r"T1 myocardium: spread between images 25.2 ms, 0.70 times the real 36 \(0.\d\d to 0.\d\d\): 30% too narrow; mean 1000 beside 1000: no difference shown", item["words"])


def test_equal_sets_are_not_told_apart_and_a_shift_is() -> None:
    real = real_side(30)
    same, told, _ = measured(drawn_side(real, 1.0), real)
    assert {item["verdict"] for item in told} == {"not shown"}
    assert all(item.ci is not None and item.ci[0] < item.floor < item.ci[1] for item in same.values() if item.metric != "region_distance" and item.floor is not None)
    moved = drawn_side(real, 1.0)
    moved.muscle = moved.muscle + 50 / (HIGH - LOW)
    found, told, _ = measured(moved, real)
    wrong = found["region_mean", "image: myocardium", "T1"]
    assert wrong.value == pytest.approx(1050, abs=0.01) and wrong.ci is not None and wrong.floor is not None and wrong.ci[0] > wrong.floor
    assert found["region_distance", "image: myocardium", "T1"].value == pytest.approx(50, abs=0.01)
    assert "above by 50" in next(item["words"] for item in told if item["region"] == "myocardium")


def test_windows_that_differ_leave_values_in_the_window() -> None:
    real = real_side(10, t2_windows=True)
    found, _, _ = measured(drawn_side(real, 1.0), real)
    assert found["region_mean", "image: myocardium", "T1"].unit == "ms"
    of_t2 = found["region_mean", "image: myocardium", "T2"]
    assert of_t2.unit == "of the window" and of_t2.value == pytest.approx(in_window(np.array(1000.0)), abs=1e-5)
    real.rows["unit"] = "1"
    assert measured(drawn_side(real, 1.0), real)[0]["region_mean", "image: myocardium", "T1"].unit == "of the window"


def test_few_patients_give_no_interval_and_few_images_no_distance() -> None:
    real = real_side(4)
    found, told, reason = measured(drawn_side(real, 0.5), real)
    assert {item.ci for item in found.values()} == {None} and {item.metric for item in found.values()} == {"region_mean", "region_spread"}
    assert reason is not None and reason.startswith("no distance with 4 images on the smallest side, at least 8 are needed (T1 myocardium, T2 myocardium, ")
    assert {item["verdict"] for item in told} == {"too few patients"} and "with too few patients to tell it from chance" in told[0]["words"]
    still = measured(drawn_side(real, 0.0), real)[1][0]
    assert still["verdict"] == "narrow" and "do not vary at all" in still["words"]


def test_what_has_no_regions_says_why() -> None:
    real = real_side(8)
    whole = drawn_side(real, 1.0)
    assert measured(replace(whole, outputs=["seg"]), real)[2] == "only masks were drawn"
    assert measured(replace(whole, files=["image"]), real)[2] == "the images come without masks, so nobody knows where a region is"
    assert measured(whole, replace(real, has_masks=False))[2] == "the real images come without masks"
    reason = measured(replace(whole, tells_regions=False), real)[2]
    assert reason is not None and reason.startswith("masks of a folder say where something is and nothing more, and those of the data hold myocardium, left_ventricle")
    for measures in ({"by": "lesion_size"}, {"positive_only": True}, {"positive_only": False}):
        with pytest.raises(InputError, match="several regions, none of them a lesion; remove it"):
            compared(whole, real, **measures)


def test_values_in_regions_are_those_of_brute_force() -> None:
    generator = np.random.default_rng(0)
    images, masks = generator.random((5, 6, 6)).astype(np.float32), generator.integers(0, 4, (5, 6, 6)).astype(np.uint8)
    masks[2][masks[2] == 3] = 0
    found = regions.values_in_regions(images, masks, (*HEART, "right_ventricle"))
    for number, name in enumerate((*HEART, "right_ventricle"), 1):
        assert found[name] == pytest.approx([image[mask == number].astype(float).mean() if (mask == number).any() else np.nan for image, mask in zip(images, masks, strict=True)], nan_ok=True)
    assert np.isnan(found["right_ventricle"]).tolist() == [False, False, True, False, False]
    assert found["left_ventricle - myocardium"] == pytest.approx(found["left_ventricle"] - found["myocardium"])
    assert list(regions.values_in_regions(images, masks, ("foreground",))) == ["foreground"]
    assert (as_channels(masks, 3) == np.stack([masks == number for number in (1, 2, 3)], axis=1)).all()


def test_an_interval_by_leaving_groups_out_is_that_of_welch_for_single_images() -> None:
    generator = np.random.default_rng(1)
    first, second = generator.normal(3, 1, 12), generator.normal(2, 2, 9)
    sides = [intervals.jackknifed(values, np.arange(len(values)), regions._mean) for values in (first, second)]
    assert sides[0].variance == pytest.approx(first.var(ddof=1) / 12), "closed form"
    low, high = stats.ttest_ind(first, second, equal_var=False).confidence_interval()
    assert intervals.difference_interval(*sides) == pytest.approx((low, high))
    groups = np.repeat(np.arange(4), 3)
    grouped = intervals.jackknifed(first, groups, regions._log_spread)
    assert grouped.value == pytest.approx(np.log(first.std(ddof=1)))
    assert grouped.without == pytest.approx([np.log(first[groups != group].std(ddof=1)) for group in range(4)])
    assert intervals.difference_interval(grouped, sides[1]) is None, "four groups"


def test_distances_and_their_interval_are_those_of_scipy() -> None:
    generator = np.random.default_rng(2)
    first, second = (Values(generator.normal(shift, 1, 24), np.repeat(np.arange(8), 3)) for shift in (0, 0.5))
    value = regions.wasserstein(first.values, second.values)
    assert value == pytest.approx(stats.wasserstein_distance(first.values, second.values))
    weights = [intervals.draw_weights(8, regions.REPLICATES, 7, f"test_{number}")[:, side.groups] for number, side in enumerate((first, second))]
    replicates = [stats.wasserstein_distance(first.values, second.values, *pair) for pair in zip(*weights, strict=True)]
    low, high = np.percentile(replicates - np.mean(replicates), intervals.COVERAGE_PERCENTILES)
    assert regions._distance_interval(first, second, value, 7, "test") == pytest.approx((max(0, value + low), value + high))
    with pytest.raises(ValueError, match="same number of values"):
        regions.wasserstein(first.values, second.values[1:])


# --- a cohort of hearts: segmenters, files, pages -------------------------------------------------------------------------

TRAIN, TEST = 12, 30  # slices: of 2 and 5 patients, a T1 and a T2 of three levels each
FEW = {"of": "images", "channels": [8, 16], "batch_size": 8, "seeds": 1, "steps": 60, "lr": 1.0e-2, "allow_few_seeds": True, "parallel": None}
STRUCTURE = {**FEW, "against": "test"}
USEFUL = {**FEW, "task": "segmentation", "network": None, "arms": ["real", "synthetic"], "ratios": [2.0]}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[DataSpec, SliceStore]:
    folder = tmp_path_factory.mktemp("hearts") / "cohort"
    write_cardiac_phantoms(folder, 8, 5)
    data = DataSpec.model_validate({"format": "cardiac", "root": folder, "size": 32, "splits": {"train": 0.25, "val": 0.125, "test": 0.625}})
    return data, open_store(data, fake_run.SEED, cache, fake_run.quiet)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Tasks are performed in this process, and listen for signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def hearts(tmp_path_factory: pytest.TempPathFactory, cohort: tuple[DataSpec, SliceStore], cache: Path) -> RunDir:
    """A run whose images are those of the training patients twice, noisier, on their own masks; all stages done."""
    data, store = cohort
    run = fake_run.make_run(tmp_path_factory.mktemp("run"), data, [
        fake_run.planned("train", "train", [], {"config": {"model": "sdm"}, "repeat": None}),
        fake_run.planned("images", "generate", ["train"], {"from": "train", "count": 2 * TRAIN, "condition": "train"}, 2 * TRAIN),
        fake_run.planned("collect_images", "collect", ["images"], {"of": "images"}),
        fake_run.planned("evaluate", "evaluate", ["collect_images"], {"of": "images", "against": "test", "metrics": ["regions", "mae"], "extractor": None}),
        fake_run.planned("structure", "structure", ["collect_images"], STRUCTURE),
        fake_run.planned("collect_structure", "collect", ["structure"], {"of": "structure"}),
        fake_run.planned("useful", "utility", ["collect_images"], USEFUL, tasks=2),
        fake_run.planned("collect_useful", "collect", ["useful"], {"of": "useful"}),
        fake_run.planned("report", "report", ["evaluate", "collect_structure", "collect_useful"], {}),
    ])  # fmt: skip
    (run.root / "fingerprint").write_text(store.fingerprint)
    rows = np.tile(store.select("train"), 2)
    noise = np.random.default_rng(0).normal(scale=0.02, size=(len(rows), 32, 32))
    images = np.clip(store.images("image", rows) + noise, 0, 1)
    fake_run.write_dataset(run, "images", {"image": images, "seg": store.masks(rows)}, [str(store.aliases[row]) for row in rows], "real", list(store.rows["label"].to_numpy()[rows]))
    fake_run.finish(run, "collect_images", 0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDGEN_CACHE", str(cache))
        for stage, kind, trials in (("structure", "structure", 1), ("useful", "utility", 2)):
            assert [task.perform(run, kind, stage, shard, 0) for shard in range(trials)] == [0] * trials
            assert task.perform(run, "collect", f"collect_{stage}", 0, 0) == 0
    evaluate_run(run, "evaluate", cache, fake_run.quiet, lambda *_: None)
    return run


def record_of(run: RunDir, stage: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(run.metrics(stage).read_text())
    return record


def test_masks_keep_their_labels_in_a_dataset(hearts: RunDir, cohort: tuple[DataSpec, SliceStore]) -> None:
    dataset, store = inputs.read_dataset(hearts, "images"), cohort[1]
    found = dataset.read("seg", np.arange(TRAIN))
    assert found.dtype == np.uint8 and (found == store.masks(store.select("train"))).all() and set(np.unique(found)) == {0, 1, 2}


def test_each_region_has_a_dice_of_its_own_on_real_test_maps(hearts: RunDir) -> None:
    record = record_of(hearts, "useful")
    found = {(item.channel, item.group): item for item in from_json(record["scores"]) if item.metric == "utility_dice"}
    assert set(found) == {(channel, arm) for channel in ("image", "image: myocardium", "image: left_ventricle") for arm in ("real", "synthetic")}
    for arm in ("real", "synthetic"):
        of_arm = [found[f"image: {region}", arm].value for region in HEART]
        assert min(of_arm) > 0.5 and found["image", arm].value == pytest.approx(np.mean(of_arm))
    lines = list(csv.DictReader(hearts.predictions("useful").open()))
    assert set(lines[0]) == {"id", "patient", "arm", "seed", *(f"{name}_{region}" for name in ("pixels", "found_pixels", "dice") for region in HEART)}
    by_hand = np.mean([float(line["dice_myocardium"]) for line in lines if line["arm"] == "synthetic"])
    assert found["image: myocardium", "synthetic"].value == pytest.approx(by_hand)
    compared_regions = {item.get("region") for item in record["details"]["comparisons"]}
    assert compared_regions == {None, *HEART}
    assert record["skipped"] == {"utility_false_positives": "every test slice shows a region"}
    assert record["counts"]["test_with_myocardium"] == TEST and "lesion" not in json.dumps(record["counts"])


def test_structure_tells_the_regions_apart_and_has_no_sizes(hearts: RunDir) -> None:
    record = record_of(hearts, "structure")
    found = {(item.metric, item.channel): item for item in from_json(record["scores"])}
    assert all(item.group is None for item in found.values())
    for metric in ("structure_dice", "structure_iou", "structure_hd95", "structure_dice_real", "structure_dice_shuffled"):
        parts = [found[metric, f"image: {region}"] for region in HEART]
        assert found[metric, "image"].value == pytest.approx(np.mean([part.value for part in parts])), metric
        assert "mean over myocardium and left_ventricle" in found[metric, "image"].protocol
    for region in HEART:
        channel = f"image: {region}"
        assert found["structure_dice", channel].value > found["structure_dice_shuffled", channel].value and found["structure_dice", channel].floor == found["structure_dice_real", channel].value
    words = record["details"]["words"]
    assert "; myocardium: Dice " in words and "; left_ventricle: Dice " in words and "lesion" not in words
    assert record["details"]["quick_look"] is None and record["counts"]["synthetic_with_left_ventricle"] == 2 * TRAIN
    lines = list(csv.DictReader(hearts.predictions("structure").open()))
    assert len(lines) == TEST + 2 * TRAIN and {"pixels_myocardium", "hd95_mm_left_ventricle", "dice_shuffled_myocardium"} <= set(lines[0]) and "bin" not in lines[0]


def test_one_region_is_learnt_as_it_always_was() -> None:
    """Bit for bit: results of before stay comparable."""
    generator = torch.Generator().manual_seed(3)
    outputs = torch.randn(5, 1, 16, 16, generator=generator, requires_grad=True)
    targets = (torch.rand(5, 1, 16, 16, generator=generator) > 0.8).float()

    def before(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        chance = logits.sigmoid()
        return functional.binary_cross_entropy_with_logits(logits, truth) + 1 - (2 * (chance * truth).sum() + 1) / (chance.sum() + truth.sum() + 1)

    gradients = []
    for loss in (Segmenter.loss(None, outputs, targets), before(outputs, targets)):  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(loss, outputs)
        gradients.append((loss, gradient))
    assert torch.equal(gradients[0][0], gradients[1][0]) and torch.equal(gradients[0][1], gradients[1][1])
    two, truth = torch.randn(5, 2, 16, 16, generator=generator), (torch.rand(5, 2, 16, 16, generator=generator) > 0.8).float()
    assert Segmenter.loss(None, two, truth) == pytest.approx(np.mean([float(before(two[:, [place]], truth[:, [place]])) for place in (0, 1)]), rel=1e-5)  # type: ignore[arg-type]
    assert networks.unet(1, [4, 8], 0, 3)(torch.zeros(2, 1, 16, 16)).shape == (2, 3, 16, 16)


def test_a_run_reports_its_regions(hearts: RunDir, cache: Path) -> None:
    record = record_of(hearts, "evaluate")
    found = {(item.metric, item.channel, item.group): item for item in from_json(record["scores"])}
    of_muscle = found["region_mean", "image: myocardium", "T1"]
    assert of_muscle.unit == "ms" and 900 < of_muscle.value < 1150 and of_muscle.floor is not None and 900 < of_muscle.floor < 1150
    assert record["positive_only"] is False and "lesion" not in of_muscle.protocol
    build_report(hearts, "report", cache, fake_run.quiet)
    page, card = hearts.report.read_text(), hearts.dataset_card("images").read_text()
    assert '<path class="region2" d="M' in page and "left ventricle</span>" in page
    assert "Are the values in each region right?" not in page, "by class only, so in tables by group"
    assert "Spread of the value in a region" in page and "T1 myocardium: spread between images" in page and "· ms ·" in page
    assert "as a share of the real one: " in card and "0 background, 1 myocardium, 2 left_ventricle" in card and "T1 0 to 2500 ms" in card
    assert "myocardium: real 0." in page, "what each region gains is told at the top"


@pytest.mark.parametrize("suffix", [".nii.gz", ".npy"])
def test_labels_survive_a_file(tmp_path: Path, suffix: str) -> None:
    from medgen.data.image_files import read_slice
    from medgen.errors import MedgenError

    labels = np.arange(256).reshape(16, 16)
    write_slice(tmp_path / f"a{suffix}", labels.astype(np.float32), "labels", np.eye(4))
    back = read_slice(tmp_path / f"a{suffix}").array
    assert back.dtype == np.uint8 and (back == labels).all()
    for wrong in (labels + 0.5, labels - 1, labels + 1, np.full((4, 4), np.nan)):
        with pytest.raises(MedgenError, match="labels are whole numbers from 0 to 255"):
            write_slice(tmp_path / f"a{suffix}", wrong, "labels", np.eye(4))
    with pytest.raises(MedgenError, match="a PNG mask holds 0 and 255 only"):
        write_slice(tmp_path / "a.png", labels, "labels", np.eye(4))


def test_sizes_of_lesions_are_refused_for_hearts_before_anything_runs(tmp_path: Path) -> None:
    config = next(iter(Pacgan.examples().values()))
    stages = {
        "train": {"kind": "train", "config": {"model": "pacgan", **config}},
        "images": {"kind": "generate", "from": "train", "count": 4},
        "evaluate": {"kind": "evaluate", "of": "images", "metrics": ["swd"], "by": "lesion_size"},
    }
    text = tiny_spec(data={"format": "cardiac", "root": str(tmp_path), "size": 16}, stages=stages)
    with pytest.raises(InputError, match="by: lesion_size is of lesions, and the masks of these data hold several regions"):
        spec.check(document.parse(yaml.safe_dump(text), "job.yaml"))
