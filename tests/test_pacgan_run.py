"""PACGAN as a user runs it: a folder of labelled slices through phases, selection, kills and images per class."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from conftest import tiny_spec

SIZES = (4, 8, 16)
CLASSES = {"CN": 0, "AD": 1}
NET: dict[str, Any] = {
    "model": "pacgan", "in_channels": 8, "factors": [1, 1, 0.5], "latent": 8, "epochs": 2, "batch_sizes": 8, "critic_iterations": [1, 1, 2], "std_group": 2, "select_from": 0.3,
    "loop": {"log_steps": 1, "preview_images": 2, "validate_epochs": 0.5, "checkpoint_steps": 2},
}  # fmt: skip

Medgen = Callable[..., Any]
WriteSpec = Callable[[dict[str, Any]], Path]


def write_side(folder: Path, subjects: range, per_subject: int = 2) -> None:
    """Slices with a bright spot on the right in one class and on the left in the other, at every size."""
    rows = [(subject, subject % 2) for subject in subjects for _ in range(per_subject)]
    generator = np.random.default_rng(subjects.start)
    images = generator.uniform(-1.0, -0.6, (16, 16, 1, len(rows)))  # [W, H, C, N]
    for number, (_, label) in enumerate(rows):
        images[2 + 8 * label : 6 + 8 * label, 5:11, 0, number] += 1.4
    folder.mkdir(parents=True)
    for size in SIZES:
        factor = 16 // size
        small = images.reshape(size, factor, size, factor, 1, len(rows)).mean(axis=(1, 3)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(small, np.eye(4)), folder / f"Real{size}x{size}.nii.gz")
    with open(folder / "labels.csv", "w", newline="") as handle:
        csv.writer(handle).writerows([("ID", "Label", "Subject_ID"), *((number, label, f"S{subject:03d}") for number, (subject, label) in enumerate(rows))])
    (folder / "classes.json").write_text(json.dumps(CLASSES))


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    write_side(tmp_path / "cohort" / "adni_train", range(24))
    write_side(tmp_path / "cohort" / "adni_test", range(24, 32))
    return tmp_path / "cohort"


def spec_of(cohort: Path, name: str, **stages: Any) -> dict[str, Any]:
    data = {"format": "stack", "root": str(cohort), "size": 16, "splits": {"train": 0.75, "val": 0.25, "test": 0}}
    return {**tiny_spec(name=name), "data": data, "stages": {"train": {"kind": "train", "config": NET, "resources": {"cpus": 1}}, **stages}}


def only_run(tmp_path: Path, name: str) -> Path:
    (found,) = (tmp_path / "runs").glob(f"{name}-*")
    return found


def weights(run: Path) -> dict[str, Any]:
    newest = max((run / "train" / "ckpt").glob("step-*"))
    return {path.name: torch.load(path, weights_only=True) for path in newest.glob("*.pt")}


def test_phases_selection_and_images_per_class(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, cohort: Path) -> None:
    images = {"kind": "generate", "from": "train", "per_class": [17, 16], "chunk": 6}
    grown = {"kind": "generate", "from": "train", "count": 3, "checkpoint": "best-auc_8px"}
    evaluate = {"kind": "evaluate", "of": "images", "metrics": ["fid", "kid", "ssim_pairs"], "extractor": "random_conv", "allow_small_n": True}
    medgen("submit", write_spec(spec_of(cohort, "pacgan", images=images, smaller=grown, evaluate=evaluate, report={"kind": "report"})), "--local")
    run = only_run(tmp_path, "pacgan")
    lines = [json.loads(line) for line in (run / "train" / "log.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["val_auc"] for line in lines if "val_auc" in line}
    assert max(scores.values()) > 0.7, "the classes differ plainly"

    checkpoints = json.loads((run / "outcome" / "train.0.json").read_text())["facts"]["checkpoints"]
    assert {f"best-auc_{size}px" for size in SIZES} <= set(checkpoints)
    steps_of = {path.name: json.loads((path / "commit.json").read_text()) for path in (run / "train" / "ckpt").glob("step-*")}
    for size in SIZES:
        name = f"auc_{size}px"
        [best] = [commit for commit in steps_of.values() if name in commit["metrics"] and commit["metrics"][name]["value"] == max(
            other["metrics"][name]["value"] for other in steps_of.values() if name in other["metrics"])][:1]  # fmt: skip
        assert best["metrics"][name]["value"] == scores[best["step"]]
    assert checkpoints["last"] == checkpoints["best-auc_16px"], "what a phase hands on is its best, the last phase too"

    with open(run / "images" / "dataset" / "index.csv") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["label"] for row in rows] == ["CN"] * 17 + ["AD"] * 16
    assert nibabel.load(run / "images" / "dataset" / rows[0]["image"]).shape[:2] == (16, 16)
    with open(run / "smaller" / "dataset" / "index.csv") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["label"] for row in rows] == ["CN", "CN", "AD"]
    small = nibabel.load(run / "smaller" / "dataset" / rows[0]["image"])
    assert small.shape[:2] == (8, 8) and small.header.get_zooms()[:2] == (2.0, 2.0), "the same field of view in fewer pixels"

    metrics = json.loads((run / "evaluate" / "metrics.json").read_text())
    compared = {(score["metric"], score["group"], score["comparison"]) for score in metrics["scores"] if score["comparison"]}
    assert len(compared) == 3 * 3 * 3 and {group for _, group, _ in compared} == {None, *CLASSES}
    facts = json.loads((run / "outcome" / "evaluate.0.json").read_text())["facts"]
    assert {"fd_small_n image", "kid image", "ssim_pairs image"} <= set(facts), "of the whole set"
    page = (run / "report" / "index.html").read_text()
    assert '<table class="comparisons">' in page and 'scope="row">AD</th>' in page


def test_cut_anywhere_it_gives_the_same_bits(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, cohort: Path, environment: dict[str, str]) -> None:
    """Killed in the first phase, in the middle of a fade-in, and at the end of a phase before its best was taken up."""
    medgen("submit", write_spec(spec_of(cohort, "whole")), "--local")
    expected = weights(only_run(tmp_path, "whole"))
    last = [json.loads(line)["step"] for line in (only_run(tmp_path, "whole") / "train" / "log.jsonl").read_text().splitlines()][-1]
    per_phase = last // len(SIZES)
    kills = [f"site=step,step={step},attempt={attempt},action=kill9" for attempt, step in enumerate((3, per_phase + 3))]
    environment["MEDGEN_FAULT"] = ";".join([*kills, f"site=ckpt.commit,attempt=2,nth={(per_phase - 2) // 2},action=kill9"])
    command = [sys.executable, "-m", "medgen", "submit", str(write_spec(spec_of(cohort, "cut"))), "--local"]
    for _ in range(4):  # a crash is tried again once by itself
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        if ended.returncode == 0:
            break
    run = only_run(tmp_path, "cut")
    assert json.loads((run / "outcome" / "train.0.json").read_text())["status"] == "done"
    starts = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines() if '"task_started"' in line]
    assert len(starts) >= 3, "every kill fell"
    found = weights(run)
    assert found.keys() == expected.keys()
    for name, state in expected.items():
        torch.testing.assert_close(found[name], state, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_sizes": [8, 8]}, "batch_sizes has 2 entries, factors has 3"), ({"std_group": 3}, "8 at 4 px is no multiple of std_group: 3"),
        ({"factors": [1, 0.3, 1]}, "0.3 x in_channels 8 is 2.4 channels at 8 px"), ({"factors": [1, 1]}, "end at 8 px, but data.size is 16"),
        ({"select": False}, "select_from has no effect with select: false"), ({"epochs": 0}, "epochs: 0 is not above 0"), ({"channels": ["t1"]}, "needs data.images.t1; the data have: image"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_its_name(medgen: Medgen, write_spec: WriteSpec, cohort: Path, change: dict[str, Any], words: str) -> None:
    spec = spec_of(cohort, "wrong")
    spec["stages"]["train"]["config"] = {**NET, "critic_iterations": 1, **change}
    assert words in medgen("submit", write_spec(spec), "--local", "--dry-run", expect=2).stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 32}, "has no slices of 32 px; the sizes there are: 4, 8, 16"), ({"content": 0.1}, "content has no effect with format: stack"),
        ({"images": {"red": "0", "green": "1", "blue": "2"}}, "names 3 channels, the slices of"), ({"images": {"image": "1"}}, "names the channels of a stack by their places"),
        ({"root": None}, "format: stack needs root: the folder with labels.csv"), ({"root": "nowhere"}, "nowhere is missing"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit(medgen: Medgen, write_spec: WriteSpec, cohort: Path, change: dict[str, Any], words: str) -> None:
    spec = spec_of(cohort, "wrong")
    spec["data"] |= change
    spec["stages"]["train"]["config"] = {**NET, "critic_iterations": 1, "factors": [1] * (4 if change.get("size") == 32 else 3)} | ({"channels": list(change["images"])} if "images" in change else {})
    told = medgen("submit", write_spec(spec), "--local", expect=2).stderr
    assert words in told, told


def test_classes_are_counted_in_their_order(medgen: Medgen, write_spec: WriteSpec, cohort: Path, tmp_path: Path) -> None:
    images = {"kind": "generate", "from": "train", "per_class": [1, 1, 1]}
    medgen("submit", write_spec(spec_of(cohort, "three", images=images)), "--local", expect=1)
    cause = json.loads((only_run(tmp_path, "three") / "outcome" / "images.0.json").read_text())["cause"]
    assert cause == "per_class: [1, 1, 1] counts 3 classes, the data have 2: CN, AD"
