"""Classes of images by a trained model: the verb through the command line on real files, and its numbers against their definitions."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from medgen import checkpoint
from medgen.classify import classify
from medgen.errors import InputError
from medgen.evaluate import classification
from medgen.models import model_class
from medgen.models.base import DataShape
from medgen.spec import family_config

CLASSES = ("CN", "AD", "MCI")
SIZE = 8
CONFIG: dict[str, Any] = {"in_channels": 8, "factors": [1, 1], "latent": 8, "epochs": 1, "batch_sizes": 4, "std_group": 2}

Medgen = Callable[..., Any]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "ckpt", {"model": "pacgan", **CONFIG}, CLASSES)


def write_checkpoint(folder: Path, config: dict[str, Any], classes: tuple[str, ...]) -> Path:
    """Of a network with random weights that tells its inputs apart plainly."""
    checked = family_config(config)
    torch.manual_seed(3)
    model = model_class(config["model"])(checked, DataShape(checked.input_channels, SIZE, classes))
    modules = model.modules()
    if "grown" in modules:
        modules["grown"].level.fill_(1)
        modules["critic"].typical_difference.fill_(0.4)
    objects = {f"modules.{name}": module.state_dict() for name, module in modules.items()}
    state = {"config": {"model": config["model"], **checked.model_dump(mode="json")}, "size": SIZE, "classes": list(classes)}
    return checkpoint.save(folder, 7, objects, state, {}).folder


def write_stack(path: Path, count: int, size: int = SIZE, channels: int = 1, scale: float = 1.0) -> np.ndarray:
    images = np.random.default_rng(count).uniform(-scale, scale, (size, size, channels, count)).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(images, np.eye(4)), path)
    return images


def write_labels(path: Path, labels: list[int]) -> None:
    with open(path, "w", newline="") as handle:
        csv.writer(handle).writerows([("ID", "Label", "Subject_ID"), *((number, label, f"S{number // 2}") for number, label in enumerate(labels))])


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def test_one_image_gets_what_it_gets_among_others(tmp_path: Path, medgen: Medgen, trained: Path) -> None:
    """The published verb gives NaN for one image and other probabilities for every other company."""
    images = write_stack(tmp_path / "many.nii.gz", 70)
    nibabel.save(nibabel.Nifti1Image(images[..., 69:], np.eye(4)), tmp_path / "one.nii.gz")
    told = medgen("classify", trained, "many.nii.gz").stdout
    assert "70 images of many.nii.gz" in told and "predictions: predictions.csv" in told
    medgen("classify", trained, "one.nii.gz", "--out", "alone")
    many, one = read(tmp_path / "predictions" / "predictions.csv"), read(tmp_path / "alone" / "predictions.csv")
    assert list(many[0]) == ["index", "prediction", *CLASSES] and [row["index"] for row in many] == [str(number) for number in range(70)]
    assert {**many[69], "index": "0"} == one[0]
    probabilities = np.array([[float(row[name]) for name in CLASSES] for row in many])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=2e-6)
    assert [row["prediction"] for row in many] == [CLASSES[number] for number in probabilities.argmax(axis=1)]
    assert probabilities.std(axis=0).min() > 1e-3, "the images do differ for this model"
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == ["predictions.csv"]


def test_labels_beside_the_images_tell_how_right_it_is(tmp_path: Path, medgen: Medgen, trained: Path) -> None:
    folder = tmp_path / "stack"
    write_stack(folder / "Real8x8.nii.gz", 40)
    write_stack(folder / "Real4x4.nii.gz", 40, size=4)
    medgen("classify", trained, folder, "--out", "unlabelled")
    assert [path.name for path in (tmp_path / "unlabelled").iterdir()] == ["predictions.csv"]
    labels = [number * 7 % 3 for number in range(40)]
    write_labels(folder / "labels.csv", labels)
    told = medgen("classify", trained, folder, "--out", "scored").stdout
    rows = read(tmp_path / "scored" / "predictions.csv")
    probabilities = np.array([[float(row[name]) for name in CLASSES] for row in rows])
    record = json.loads((tmp_path / "scored" / "performance.json").read_text())
    assert [row["label"] for row in rows] == [CLASSES[label] for label in labels]
    assert record["auc"]["value"] == pytest.approx(roc_auc_score(labels, probabilities, multi_class="ovr"), abs=1e-4)
    assert record["balanced_accuracy"]["value"] == pytest.approx(balanced_accuracy_score(labels, probabilities.argmax(axis=1)))
    low, high = record["auc"]["interval"]
    assert low < record["auc"]["value"] < high and record["subjects"] == 20
    assert [sum(row) for row in record["confusion"]] == [labels.count(label) for label in range(3)]
    assert record["brier"] == pytest.approx(((probabilities - np.eye(3)[labels]) ** 2).sum(axis=1).mean(), abs=1e-4)
    assert f"AUC {record['auc']['value']:.3f} [{low:.3f}, {high:.3f}]" in told and "20 subjects" in told
    assert (tmp_path / "scored" / "performance.png").stat().st_size > 20_000


def test_what_cannot_be_classified_is_told(tmp_path: Path, medgen: Medgen, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def refused(which: Path | str, images: str, words: str, labels: str | None = None) -> None:
        with pytest.raises(InputError, match=words):
            classify(str(which), Path(images), None, "last", Path(labels) if labels else None, Path("predictions"))
        assert not Path("predictions").exists() and not list(tmp_path.glob(".predictions*"))

    write_stack(tmp_path / "large.nii.gz", 3, size=16)
    told = medgen("classify", trained, "large.nii.gz", expect=2).stderr
    assert "holds images of 16 x 16 px" in told and "give Real8x8.nii.gz" in told and "Traceback" not in told
    write_stack(tmp_path / "colour.nii.gz", 3, channels=3)
    refused(trained, "colour.nii.gz", "has 3 channels, the model takes 1: image")
    write_stack(tmp_path / "bright.nii.gz", 3, scale=200)
    refused(trained, "bright.nii.gz", "slice 0 holds values from .* allowed is -1 to 1")
    refused(trained, "nowhere.nii.gz", "nowhere.nii.gz: no such file")
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "large.nii.gz").read_bytes()[:200])
    refused(trained, "cut.nii.gz", "cut.nii.gz")
    write_stack(tmp_path / "fine.nii.gz", 3)
    write_labels(tmp_path / "four.csv", [0, 1, 2, 0])
    refused(trained, "fine.nii.gz", "four.csv: has 4 rows for the 3 images", labels="four.csv")
    write_labels(tmp_path / "high.csv", [0, 1, 3])
    refused(trained, "fine.nii.gz", "has the Label 3, but the model knows 3 classes: 0 CN, 1 AD, 2 MCI", labels="high.csv")
    write_labels(tmp_path / "labels.csv", [0, 1, 2])
    (tmp_path / "classes.json").write_text(json.dumps({"AD": 0, "CN": 1, "MCI": 2}))
    refused(trained, "fine.nii.gz", "number them alike")
    diffusion = {"model": "diffusion", **next(iter(model_examples("diffusion").values()))}
    refused(write_checkpoint(tmp_path / "other", diffusion, ()), "fine.nii.gz", "does not tell classes apart")
    (trained / "state.json").write_text("{}")
    refused(trained, "fine.nii.gz", "this checkpoint cannot be used: state.json")
    refused("nobody", "fine.nii.gz", "no such run")
    (tmp_path / "there").mkdir()
    assert "there exists; name a new folder" in medgen("classify", trained, "fine.nii.gz", "--out", "there", expect=2).stderr


def model_examples(family: str) -> dict[str, dict[str, Any]]:
    from medgen.models import config_class

    return {name: example for name, example in config_class(family).examples().items() if "seg" in name}


def test_more_images_of_the_same_subjects_are_no_more_evidence() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(20) % 2, 3)
    scores = 1 / (1 + np.exp(-(labels + generator.normal(0, 1.5, 60))))
    probabilities, subjects = np.stack([1 - scores, scores], axis=1), np.repeat(np.arange(20), 3)
    once = classification.performance(labels, probabilities, subjects, seed=1)
    twice = classification.performance(np.tile(labels, 2), np.tile(probabilities, (2, 1)), np.tile(subjects, 2), seed=1)
    assert once.auc == twice.auc and once.balanced_accuracy == twice.balanced_accuracy and twice.subjects == 20
    independent = classification.performance(np.tile(labels, 2), np.tile(probabilities, (2, 1)), np.arange(120), seed=1)
    assert independent.auc.value == once.auc.value and once.auc.interval is not None and independent.auc.interval is not None
    assert np.ptp(independent.auc.interval) < 0.8 * np.ptp(once.auc.interval)
    few = classification.performance(labels[:12], probabilities[:12], subjects[:12], seed=1)
    assert few.auc.value is not None and few.auc.interval is None, "four subjects make no interval"
    assert classification.performance(np.zeros(12, int), probabilities[:12], subjects[:12], seed=1).auc.value is None


def test_the_calibration_error_of_known_cases() -> None:
    sure = np.array([[0.75, 0.25]] * 100)
    assert classification.expected_calibration_error(np.array([0] * 75 + [1] * 25), sure) == pytest.approx(0)
    assert classification.expected_calibration_error(np.zeros(100, int), sure) == pytest.approx(0.25)
    assert classification.expected_calibration_error(np.ones(100, int), np.array([[1.0, 0.0]] * 100)) == pytest.approx(1)
