"""`medgen evaluate SYNTHETIC REAL` on folders of every kind, and everything that keeps two folders from being compared."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_run
import nibabel
import numpy as np
import pytest
from conftest import tiny_spec
from html_page import Page
from PIL import Image
from scipy.ndimage import gaussian_filter

from medgen import spec, two_folders
from medgen.data.image_looks import Reading
from medgen.data.store import open_store
from medgen.errors import InputError
from medgen.evaluate.file_images import open_folder
from medgen.report import words

SIZE = 32
QUICK = ["psd", "swd"]


def textured(count: int, seed: int, size: int = SIZE) -> np.ndarray:
    generator = np.random.default_rng(seed)
    coarse = np.stack([gaussian_filter(image, 3) for image in generator.normal(size=(count, size, size))])
    return np.clip(0.5 + 2 * coarse + 0.03 * generator.normal(size=coarse.shape), 0, 1).astype(np.float32)


def write_png(folder: Path, images: np.ndarray, names: list[str] | None = None, suffix: str = ".png") -> Path:
    for number, image in enumerate(images):
        path = folder / f"{names[number] if names else f'{number:03d}'}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(255 * image).astype(np.uint8)).save(path)
    return folder


def compare(synthetic: Path, real: Path, out: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "train": None, "masks": (None, None, None), "pair": None, "size": None, "window": None, "gray": False, "patient": None, "channel": None, "unlike_files": False,
        "measures": {"metrics": QUICK}, "seed": 1,
    }  # fmt: skip
    two_folders.evaluate(synthetic, real, out, **options | changes)
    record: dict[str, Any] = json.loads((out / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    return record


def value(record: dict[str, Any], metric: str, group: str | None = None, comparison: str | None = None) -> dict[str, Any]:
    (found,) = (item for item in record["scores"] if (item["metric"], item["group"], item["comparison"]) == (metric, group, comparison))
    return dict(found)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDGEN_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("MEDGEN_CACHE", raising=False)
    monkeypatch.delenv("MEDGEN_WEIGHTS", raising=False)


def test_two_folders_of_pictures_from_the_command_line(tmp_path: Path, medgen: Callable[..., Any]) -> None:
    """Subfolders on both sides are classes; the blurred class is found; the table and the CSV say the same."""
    names = [f"{label}/{number}" for label in ("CN", "AD") for number in range(20)]
    write_png(tmp_path / "real", textured(40, 1), names)
    soft = textured(40, 2)
    soft[20:] = [0.6 * gaussian_filter(image, 1.5) for image in soft[20:]]
    write_png(tmp_path / "drawn", soft, names)
    done = medgen("evaluate", "drawn", "real", "--metrics", "kid,prdc,psd", "--extractor", "random_conv")
    assert "AD, CN stand on both sides: taken as classes" in done.stderr and "each real file counts as a patient" in done.stderr
    assert "Kernel distance (KID), AD" in done.stdout and "evaluation: metrics.json, scores.csv" in done.stdout
    record = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    blurred, good = (value(record, "kid", label, "real-synthetic") for label in ("AD", "CN"))
    assert blurred["value"] > 5 * abs(good["value"]) and blurred["ci"][0] > good["floor"]
    assert value(record, "psd")["value"] > 3 * value(record, "psd")["floor"]
    assert {item["metric"] for item in record["scores"]} >= {"precision", "recall", "density", "coverage"}
    with open(tmp_path / "evaluation" / "scores.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert [float(line["value"]) for line in lines] == [item["value"] for item in record["scores"]]
    assert all(line["protocol"] and line["n"] for line in lines)
    page = Page((tmp_path / "evaluation" / "report.html").read_text())
    page.require_self_contained()
    assert "Furthest from its floor is AD" in page.text and "two folders do not say it" in page.text and "taken as classes" in page.text
    assert {label.rpartition(" ")[0] for label in page.labels} == {"real AD", "real CN", "synthetic AD", "synthetic CN"}
    assert all(words.number(item["value"]) in page.text for item in record["scores"])
    text = (tmp_path / "evaluation" / "dataset_card.md").read_text()
    assert "| classes | AD 20, CN 20 |" in text and "| trained on | ________" in text and str(tmp_path) not in text.partition("## Limits")[0]
    again = medgen("evaluate", "drawn", "real", expect=2)
    assert "evaluation exists; name a new folder with --out" in again.stderr
    assert "--metrics is for two folders" in medgen("evaluate", "some_run", "--metrics", "kid", expect=2).stderr
    assert "drawn: a folder, and no run; name the folder of real images as well" in medgen("evaluate", "drawn", expect=2).stderr
    assert "--stage is for the evaluate stage of a run" in medgen("evaluate", "drawn", "real", "--stage", "x", expect=2).stderr


def test_pairs_by_name_are_exact_whatever_the_format(tmp_path: Path) -> None:
    """The same 16-bit values in PNG, npy and NIfTI; one pixel off by a known amount."""
    images = np.rint(textured(9, 3) * 65535) / 65535
    for number, image in enumerate(images):
        (tmp_path / "real").mkdir(exist_ok=True)
        Image.fromarray((image * 65535).round().astype(np.uint16)).save(tmp_path / "real" / f"case_{number}.png")
    other = images.copy()
    other[:, 5, 6] = 1 - other[:, 5, 6]
    (tmp_path / "drawn").mkdir()
    for number, image in enumerate(other):
        np.save(tmp_path / "drawn" / f"case_{number}.npy", image.astype(np.float32))
    record = compare(tmp_path / "drawn", tmp_path / "real", tmp_path / "out", pair="name", measures={"metrics": ["mae", "mse", "psnr"]})
    assert value(record, "mae")["value"] == pytest.approx(np.abs(other - images).mean(), rel=1e-4)
    assert value(record, "mse")["value"] == pytest.approx(((other - images) ** 2).mean(), rel=1e-4)
    assert "the real image of the same name" in value(record, "mae")["protocol"] and record["counts"]["pairs"] == 9
    by_place = compare(tmp_path / "drawn", tmp_path / "real", tmp_path / "out2", pair="index", measures={"metrics": ["mae"]})
    assert value(by_place, "mae")["value"] == value(record, "mae")["value"]


def test_volumes_give_their_slices_and_are_patients(tmp_path: Path) -> None:
    for number, seed in enumerate((1, 2, 3, 4)):
        for side in ("real", "drawn"):
            volume = 900 * textured(6, seed + (10 if side == "drawn" else 0)).transpose(2, 1, 0)
            volume[:, :, 0] = 0  # nothing to see
            (tmp_path / side).mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / side / f"{number}.nii.gz")
    folder = open_folder(tmp_path / "real", Reading(window=(0.0, 1000.0)))
    assert len(folder.items) == 20 and folder.items["patient"].nunique() == 4 and folder.items["number"].min() == 1
    with pytest.raises(InputError, match=r"values from 0 to 9\d\d.*--window LOW,HIGH"):
        compare(tmp_path / "drawn", tmp_path / "real", tmp_path / "out")
    record = compare(tmp_path / "drawn", tmp_path / "real", tmp_path / "out", window="0,1000", measures={"metrics": ["ms_ssim_diversity"]})
    assert record["counts"]["real_patients"] == 4 and record["counts"]["real"] == 20
    shown = folder.images("image", np.array([0]))
    expected = np.asarray(nibabel.load(tmp_path / "real" / "0.nii.gz").dataobj)[:, :, 1].T[::-1, ::-1] / 1000
    np.testing.assert_allclose(shown[0], expected, atol=1e-6)


def test_patients_from_the_names_widen_the_interval(tmp_path: Path) -> None:
    base = textured(8, 1)
    names = [f"sub-{patient:02d}_{slice_}" for patient in range(8) for slice_ in range(5)]
    write_png(tmp_path / "real", np.clip(np.repeat(base, 5, axis=0) + 0.01 * np.random.default_rng(0).normal(size=(40, SIZE, SIZE)), 0, 1), names)
    write_png(tmp_path / "drawn", textured(40, 2))
    alone = compare(tmp_path / "drawn", tmp_path / "real", tmp_path / "a", measures={"metrics": ["psd"]})
    joined = compare(tmp_path / "drawn", tmp_path / "real", tmp_path / "b", measures={"metrics": ["psd"]}, patient="(sub-[0-9]+)_")
    assert (alone["counts"]["real_patients"], joined["counts"]["real_patients"]) == (40, 8)
    width = [item["ci"][1] - item["ci"][0] for item in (value(alone, "psd"), value(joined, "psd"))]
    assert width[1] > 1.3 * width[0]


def test_colour_pictures_are_seen_in_colour_by_networks_and_by_channel_elsewhere(tmp_path: Path) -> None:
    for side, seed in (("real", 1), ("drawn", 2)):
        write_png(tmp_path / side, np.stack([textured(30, seed), textured(30, seed + 10), textured(30, seed + 20)], axis=-1))
    record = compare(tmp_path / "drawn", tmp_path / "real", tmp_path / "out", measures={"metrics": ["kid", "psd"], "extractor": "random_conv"})
    assert {item["channel"] for item in record["scores"] if item["metric"] == "kid"} == {"colour"}
    assert {item["channel"] for item in record["scores"] if item["metric"] == "psd"} == {"red", "green", "blue"}
    gray = compare(tmp_path / "drawn", tmp_path / "real", tmp_path / "gray", gray=True)
    assert {item["channel"] for item in gray["scores"]} == {"image"}
    write_png(tmp_path / "gray_side", textured(30, 2))
    with pytest.raises(InputError, match=r"gray_side is gray.*--gray"):
        compare(tmp_path / "gray_side", tmp_path / "real", tmp_path / "x")


def test_a_collected_dataset_and_the_stack_beside_it_are_folders_too(tmp_path: Path, cache: Path) -> None:
    run, store = fake_run.full_run(tmp_path / "fake", cache, patients=8, size=SIZE, count=12)
    folder = open_folder(run.dataset("pairs"), Reading())
    assert len(folder.items) == 12 and folder.size == SIZE and folder.masks(np.arange(12)).any()
    # a file shows what the store shows, whatever turns its header takes on the way
    row = int(np.flatnonzero(store.rows["split"] == "test")[0])
    assert folder.images("image", np.arange(1)).shape == store.images("bravo", np.array([row])).shape
    fake_run.write_dataset(run, "dual", dict.fromkeys(("t1_pre", "t1_gd"), textured(2, 1)), None, "none")
    with pytest.raises(InputError, match="dual/dataset: a dataset of t1_pre, t1_gd; one image channel is compared: copy its files to a folder"):
        open_folder(run.dataset("dual"), Reading())
    stack = textured(10, 4).transpose(2, 1, 0)[:, :, None] * 2 - 1
    nibabel.save(nibabel.Nifti1Image(stack.astype(np.float32), np.eye(4)), tmp_path / "Generated32x32.nii.gz")
    stacked = open_folder(tmp_path / "Generated32x32.nii.gz", Reading())
    np.testing.assert_allclose(stacked.images("image", np.arange(10)), textured(10, 4), atol=1e-6)


def test_lesions_only(tmp_path: Path) -> None:
    images = textured(48, 5)
    masks = np.zeros((48, SIZE, SIZE), np.float32)
    masks[::2, 8:16, 8:16] = 1
    for side in ("real", "drawn"):
        write_png(tmp_path / side, images)
        write_png(tmp_path / f"{side}_masks", masks)
    record = compare(tmp_path / "drawn", tmp_path / "real", tmp_path / "out", masks=(tmp_path / "drawn_masks", tmp_path / "real_masks", None), measures={"metrics": QUICK, "positive_only": True})
    assert record["counts"]["real"] == 24 and record["counts"]["synthetic_used"] == 24 and record["positive_only"]
    assert "with a lesion only" in value(record, "psd")["protocol"]
    for masks_of, missing in ((("real_masks", None), "real show a lesion.*--real-masks FOLDER"), ((None, "real_masks"), "drawn show a lesion.*--synthetic-masks FOLDER")):
        given = [None if name is None else tmp_path / name for name in masks_of]
        for option, measures in (("--positive-only", {"metrics": QUICK, "positive_only": True}), ("--by lesion_size", {"metrics": QUICK, "by": "lesion_size"})):
            with pytest.raises(InputError, match=f"{option}: nothing tells which images of .*{missing}"):
                compare(tmp_path / "drawn", tmp_path / "real", tmp_path / "x", masks=(*given, None), measures=measures)


def test_one_image_gives_reasons_instead_of_numbers(tmp_path: Path) -> None:
    write_png(tmp_path / "real", textured(30, 1))
    write_png(tmp_path / "drawn", textured(1, 2))
    measures = {"metrics": ["kid", "prdc", "swd", "psd", "ms_ssim_diversity", "ssim_pairs", "mae"], "extractor": "random_conv"}
    with pytest.raises(InputError, match=r"nothing could be computed: kid: .*swd: only 1 images on the smaller side.*mae: no pairs") as told:
        compare(tmp_path / "drawn", tmp_path / "real", tmp_path / "out", measures=measures)
    assert all(f"{name}: " in str(told.value) for name in measures["metrics"]) and not (tmp_path / "out").exists()


def test_more_drawn_than_real_are_compared_at_equal_numbers(tmp_path: Path) -> None:
    write_png(tmp_path / "real", textured(20, 1))
    write_png(tmp_path / "drawn", textured(90, 2))
    record = compare(tmp_path / "drawn", tmp_path / "real", tmp_path / "out", measures={"metrics": ["kid", "psd"], "extractor": "random_conv"})
    assert value(record, "psd")["n"] == 10 and value(record, "kid", comparison="real-synthetic")["n"] == 10
    assert record["counts"]["synthetic"] == 90


def broken_png(folder: Path) -> None:
    path = next(folder.glob("*.png"))
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda f: [path.unlink() for path in f.iterdir()], {}, r"drawn: no images; it is empty; known are \.png"),
        (lambda f: [path.rename(path.with_suffix(".txt")) for path in f.iterdir()], {}, "no images; it holds 12 .txt"),
        (lambda f: write_png(f, textured(1, 3, 48), ["large"]), {}, r"images of different sizes: 32x32 \(12\), 48x48 \(1\); bring all to one with --size, such as --size 32"),
        (lambda f: write_png(f, textured(12, 3, 48)), {}, r"the sides differ in size: 48 px in .*drawn, 32 px in .*real; bring all to one with --size 32"),
        (lambda f: [Image.fromarray((image * 65535).astype(np.uint16)).save(f / f"{n:03d}.png") for n, image in enumerate(textured(12, 3))], {},
         r"real: 8 bits a value, but not .*drawn.*--unlike-files"),
        (lambda f: [Image.open(path).save(path.with_suffix(".jpg")) or path.unlink() for path in sorted(f.iterdir())], {}, r"drawn: JPEG, but not .*real.*--unlike-files"),
        (lambda f: [np.save(path.with_suffix(".npy"), np.full((SIZE, SIZE), np.nan, np.float32)) or path.unlink() for path in sorted(f.iterdir())],
         {"unlike_files": True}, "1024 values are NaN or infinite"),
        (broken_png, {}, "cannot be read|not a readable picture"),
        (lambda f: (f / "000.png").rename(f / "other.png"), {"pair": "name"}, r"1 of .*drawn without a partner: other; 1 of .*real without a partner: 000;"),
        (lambda f: (f / "000.png").unlink(), {"pair": "index"}, "11 images in .* but 12 in"),
        (lambda f: None, {"patient": "sub"}, r"give one group, which is the patient"),
        (lambda f: None, {"patient": "(sub-[0-9]+)"}, "finds no patient in this name"),
        (lambda f: None, {"patient": "("}, "not a regular expression"),
        (lambda f: None, {"window": "3"}, "write two numbers"),
        (lambda f: None, {"window": "3,1"}, "black must lie below white"),
        (lambda f: None, {"window": "0,inf"}, "finite numbers"),
        (lambda f: (f / "gone.png").symlink_to(f / "nowhere.png"), {}, "gone.png: the name of an image, but no file"),
        (lambda f: Image.new("L", (SIZE, SIZE)).save(f / "pages.tif", save_all=True, append_images=[Image.new("L", (SIZE, SIZE))]), {}, "pages.tif: 2 pages in one file"),
        (lambda f: Image.fromarray(np.zeros((SIZE, SIZE), np.uint16)).save(f / "deep.png"), {}, "drawn: some of 8 bits a value, some of more"),
        (lambda f: [Image.new("L", (4, 4)).save(path) for path in f.iterdir()], {}, "images of 4 px; from 8 to 2048 are compared"),
        (lambda f: None, {"window": "0,1"}, "--window has no effect on pictures"),
        (lambda f: None, {"train": "real"}, "the same folder as REAL; copies are judged by real images"),
        (lambda f: None, {"measures": {"metrics": ["kid"], "extractor": "dino"}}, "--extractor dino: the extractors are: inception, dinov2"),
        (lambda f: None, {"measures": {"metrics": ["kid"], "extractor": "{kind: torchscript"}}, "the extractors are: inception"),
        (lambda f: None, {"measures": {"lpips": "alex"}}, "lpips: .*alexnet-owt-7be5be79.pth"),
        (lambda f: None, {"measures": {"metrics": ["kidd"]}}, "unknown metric 'kidd'; the metrics are: mae"),
        (lambda f: None, {"measures": {"metrics": ["psd", "auc"]}}, "--metrics auc: it asks the model that made the images"),
        (lambda f: None, {"measures": {"metrics": ["kid"], "extractor": "encoder"}}, "--extractor encoder: .*--train FOLDER"),
        (lambda f: None, {"measures": {"metrics": ["kid"], "extractor": "inception"}}, r"inception needs its weights, .*`export MEDGEN_WEIGHTS="),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_with_what_mends_it(tmp_path: Path, damage: Callable[[Path], Any], options: dict[str, Any], message: str) -> None:
    write_png(tmp_path / "real", textured(12, 1))
    damage(write_png(tmp_path / "drawn", textured(12, 2)))
    with pytest.raises(InputError, match=re.compile(message, re.DOTALL)):
        compare(tmp_path / "drawn", tmp_path / "real", tmp_path / "out", **{name: tmp_path / value if name == "train" else value for name, value in options.items()})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "003.png").unlink(), r"no mask for 003\.png; masks have the names of their images"),
        (lambda f: write_png(f, textured(12, 9)), r"000\.png: not a mask: \d+ different values"),
        (lambda f: [Image.open(path).save(path.with_suffix(".jpg")) or path.unlink() for path in sorted(f.iterdir())], "a JPEG has no sharp labels"),
        (lambda f: Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(f / "003.tif"), r"several masks for 003\.png"),
    ],
)
def test_masks_that_are_none_are_refused(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    for side in ("real", "drawn"):
        write_png(tmp_path / side, textured(12, 1))
        write_png(tmp_path / f"{side}_masks", (textured(12, 4) > 0.5).astype(np.float32))
    damage(tmp_path / "real_masks")
    with pytest.raises(InputError, match=message):
        compare(tmp_path / "drawn", tmp_path / "real", tmp_path / "out", masks=(tmp_path / "drawn_masks", tmp_path / "real_masks", None), measures={"metrics": QUICK, "positive_only": True})


def test_unlike_files_are_brought_to_the_coarser_side_where_that_is_asked_for(tmp_path: Path) -> None:
    images = textured(12, 1)
    write_png(tmp_path / "real", images)
    (tmp_path / "drawn").mkdir()
    for number, image in enumerate(images):
        Image.fromarray((image * 65535).round().astype(np.uint16)).save(tmp_path / "drawn" / f"{number:03d}.png")
    record = compare(tmp_path / "drawn", tmp_path / "real", tmp_path / "out", unlike_files=True, pair="name", measures={"metrics": ["mae"]})
    assert value(record, "mae")["value"] < 1e-6
    assert any("compared all the same (the finer side rounded to 8 bits)" in note for note in record["notes"])


def test_copies_of_training_images_are_looked_for(tmp_path: Path) -> None:
    train = textured(60, 7)
    write_png(tmp_path / "train", train)
    write_png(tmp_path / "real", textured(120, 8))
    drawn = textured(40, 9)
    drawn[:10] = train[:10]
    write_png(tmp_path / "drawn", drawn)
    record = compare(tmp_path / "drawn", tmp_path / "real", tmp_path / "out", train=tmp_path / "train")
    found = value(record, "near_train")
    assert 0.25 <= found["value"] <= 0.3 and found["floor"] < 0.05
    assert {pair["synthetic"] for pair in record["details"]["copies"][:4]} <= {f"{number:03d}.png" for number in range(10)}
    assert record["details"]["copies"][0]["real"].startswith("train/")


def boxes(count: int, seed: int, grow: int = 0) -> np.ndarray:
    """One square lesion an image, of 4 to 15 pixels a side."""
    generator = np.random.default_rng(seed)
    found = np.zeros((count, SIZE, SIZE), np.float32)
    for mask in found:
        side, row, column = generator.integers(4, 16), generator.integers(1, 15), generator.integers(1, 15)
        mask[row : row + side + grow, column : column + side] = 1
    return found


def write_nifti(folder: Path, images: np.ndarray, spacing_mm: float) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        nibabel.save(nibabel.Nifti1Image(image.T[::-1, ::-1, None], np.diag([spacing_mm, spacing_mm, 5, 1])), folder / f"{number:03d}.nii.gz")
    return folder


def test_folders_of_masks_are_compared_by_overlap_and_distance(tmp_path: Path) -> None:
    truth, found = boxes(12, 1), boxes(12, 1, grow=2)
    write_nifti(tmp_path / "truth", truth, 2.0)
    write_nifti(tmp_path / "found", found, 2.0)
    record = compare(tmp_path / "found", tmp_path / "truth", tmp_path / "out", pair="name", measures={"metrics": ["dice", "iou", "hd95"]})
    common = (truth * found).sum((1, 2))
    assert value(record, "dice")["value"] == pytest.approx((2 * common / (truth.sum((1, 2)) + found.sum((1, 2)))).mean())
    assert value(record, "iou")["value"] == pytest.approx((common / np.maximum(truth, found).sum((1, 2))).mean())
    assert value(record, "hd95")["value"] == pytest.approx(4.0), "two rows of 2 mm"
    assert value(record, "dice")["floor"] < 0.6 and value(record, "hd95")["unit"] == "mm"
    assert value(record, "dice")["n"] == 12
    pictures = compare(write_png(tmp_path / "a", truth), write_png(tmp_path / "b", found), tmp_path / "x", pair="name", measures={"metrics": ["dice", "hd95"]})
    assert value(pictures, "dice")["value"] == pytest.approx(value(record, "dice")["value"]) and "how large a pixel is" in pictures["skipped"]["hd95"]
    with pytest.raises(InputError, match="not a mask"):
        compare(write_png(tmp_path / "photographs", textured(12, 1)), tmp_path / "b", tmp_path / "y", pair="name", measures={"metrics": ["dice"]})


def test_scores_by_the_size_of_the_lesion(tmp_path: Path) -> None:
    """Sides of 4 to 15 px of 1.5 mm: lesions of 8 to 32 mm; small ones get an error of their own."""
    images, masks = textured(80, 1), boxes(80, 2)
    diameters = 1.5 * np.sqrt(2 * masks.sum((1, 2)))
    worse = images + np.where((diameters < 10)[:, None, None], 0.2, 0.05) * np.where(images > 0.5, -1, 1)
    for name, values in (("real", images), ("drawn", worse.astype(np.float32)), ("masks", masks)):
        write_nifti(tmp_path / name, values, 1.5)
    options = {"masks": (tmp_path / "masks", tmp_path / "masks", None), "pair": "name", "measures": {"metrics": ["mae", "psd"], "by": "lesion_size"}}
    record = compare(tmp_path / "drawn", tmp_path / "real", tmp_path / "out", **options)
    found = {item["group"]: item for item in record["scores"] if item["metric"] == "mae"}
    assert set(found) == {None, "<10 mm", "10-20 mm", "20-30 mm", ">=30 mm"} & set(found) and {"<10 mm", "10-20 mm", "20-30 mm"} <= set(found)
    assert found["<10 mm"]["value"] == pytest.approx(0.2, rel=1e-3) and found["20-30 mm"]["value"] == pytest.approx(0.05, rel=1e-3)
    assert found["<10 mm"]["n"] == int((diameters < 10).sum()) and record["positive_only"]
    for name, values in (("p_real", images), ("p_drawn", images), ("p_masks", masks)):
        write_png(tmp_path / name, values)
    with pytest.raises(InputError, match="pictures do not say how large a pixel is"):
        compare(tmp_path / "p_drawn", tmp_path / "p_real", tmp_path / "x", **options | {"masks": (tmp_path / "p_masks", tmp_path / "p_masks", None)})


def test_the_data_of_a_job_are_a_real_side_too(tmp_path: Path, write_spec: Callable[[dict[str, Any]], Path], monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Its windows, patients and splits: copies of its training slices are found, without naming a folder of them."""
    monkeypatch.setenv("MEDGEN_CACHE", str(cache))
    written = tiny_spec()
    written["data"] |= {"patients": 24, "size": SIZE, "positive_only": False, "every": 1}
    path = write_spec(written)
    store = open_store(spec.load(path).data, 42, cache, print)  # type: ignore[arg-type]
    train, test = store.select("train"), store.select("test")
    drawn = np.concatenate([store.images("bravo", train[:10]), store.images("bravo", test[::3])])
    (tmp_path / "drawn").mkdir()
    for number, image in enumerate(drawn):
        np.save(tmp_path / "drawn" / f"{number:03d}.npy", image)
    record = compare(tmp_path / "drawn", path, tmp_path / "out", channel="bravo")
    assert record["counts"]["real"] == len(test) and record["counts"]["train"] == len(train) and record["against"] == "test"
    assert value(record, "near_train")["value"] >= 10 / len(drawn)
    assert {pair["synthetic"] for pair in record["details"]["copies"][:8]} <= {f"{number:03d}.npy" for number in range(10)}
    assert (tmp_path / "out" / "report.html").is_file()
    for options, message in (
        ({}, "several channels: bravo, t1_pre, t1_gd; say which one"),
        ({"channel": "t2"}, "--channel t2: the channels of .* are: bravo, t1_pre, t1_gd"),
        ({"channel": "bravo", "train": tmp_path / "drawn"}, "--train has no effect beside the data of a job"),
        ({"channel": "bravo", "size": 16}, "images of 16 px, but the data of .* have 32 px; bring them to that with --size 32"),
    ):
        with pytest.raises(InputError, match=message):
            compare(tmp_path / "drawn", path, tmp_path / "x", **options)
    with pytest.raises(InputError, match="--channel bravo: only the data of a job have channels"):
        compare(tmp_path / "drawn", tmp_path / "drawn", tmp_path / "x", channel="bravo")


def test_slices_of_mask_volumes_all_count_however_small_the_lesion(tmp_path: Path) -> None:
    """And label values need no window: a mask has none."""
    masks = np.zeros((6, SIZE, SIZE), np.float32)
    masks[1:5, 4:6, 4:6] = 3
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
        nibabel.save(nibabel.Nifti1Image(masks.transpose(2, 1, 0), np.eye(4)), tmp_path / side / "p.nii.gz")
    record = compare(tmp_path / "a", tmp_path / "b", tmp_path / "out", pair="name", measures={"metrics": ["dice", "hd95"]})
    assert value(record, "dice")["n"] == 6 and value(record, "dice")["value"] == 1 and value(record, "hd95")["n"] == 4


def test_names_change_nothing_and_leaked_images_are_refused(tmp_path: Path) -> None:
    real, drawn = textured(24, 1), textured(30, 2)
    write_png(tmp_path / "real", real)
    write_png(tmp_path / "drawn", drawn)
    write_png(tmp_path / "renamed", drawn[::-1])
    measures = {"metrics": ["kid", "psd", "prdc", "ms_ssim_diversity"], "extractor": "random_conv"}
    first, second = (compare(tmp_path / side, tmp_path / "real", tmp_path / f"out_{side}", measures=measures) for side in ("drawn", "renamed"))
    assert [item["value"] for item in first["scores"]] == pytest.approx([item["value"] for item in second["scores"]], rel=1e-5)
    write_png(tmp_path / "train", np.concatenate([textured(20, 3), real[3:5]]))
    with pytest.raises(InputError, match=r"2 of the 24 files of .*real are also in --train .*: 003.png is 020.png"):
        compare(tmp_path / "drawn", tmp_path / "real", tmp_path / "x", train=tmp_path / "train")


def test_a_full_disk_under_the_cache_is_told(tmp_path: Path, private_mounts: list[str], environment: dict[str, str]) -> None:
    """The features are mapped from a file: without room the process would be ended by a signal at the first write."""
    write_png(tmp_path / "real", textured(24, 1))
    write_png(tmp_path / "drawn", textured(24, 2))
    (tmp_path / "small").mkdir()
    command = f"mount -t tmpfs -o size=40k none {tmp_path}/small && {sys.executable} -m medgen evaluate drawn real --metrics kid --extractor random_conv"
    done = subprocess.run([*private_mounts, "bash", "-c", command], cwd=tmp_path, env={**environment, "MEDGEN_CACHE": str(tmp_path / "small")}, capture_output=True, text=True)
    assert done.returncode == 2 and "the disk is full" in done.stderr and "small" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "evaluation").exists()
