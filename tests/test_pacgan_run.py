"""PACGAN as a user runs it: a folder of labelled slices through phases, selection, kills and images per class."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import nibabel
import numpy as np
import pytest
import torch
from conftest import tiny_spec

from medgen import health, training
from medgen.errors import MedgenError
from medgen.models.pacgan.config import Config

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
    images = {"kind": "generate", "from": "train", "per_class": [17, 16], "chunk": 6, "shards": 2, "stack": True}
    grown = {"kind": "generate", "from": "train", "count": 3, "checkpoint": "best-auc_8px"}
    evaluate = {"kind": "evaluate", "of": "images", "metrics": ["auc", "fid", "kid", "ssim_pairs"], "extractor": "random_conv", "allow_small_n": True}
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
    stack = nibabel.load(run / "images" / "dataset" / "Generated16x16.nii.gz")
    assert stack.shape == (16, 16, 1, 33) and stack.get_data_dtype() == np.float32
    for number, row in enumerate(rows):
        np.testing.assert_allclose(stack.get_fdata()[:, :, 0, number], nibabel.load(run / "images" / "dataset" / row["image"]).get_fdata()[:, :, 0].T * 2 - 1, atol=1e-6)
    with open(run / "images" / "dataset" / "labels_syn.csv") as handle:
        labels = list(csv.DictReader(handle))
    assert [(row["ID"], row["Label"]) for row in labels] == [(str(number), "01"[number >= 17]) for number in range(33)]
    generated = run / "images" / "dataset"
    told = medgen("classify", run, generated / "Generated16x16.nii.gz", "--labels", generated / "labels_syn.csv").stdout
    assert "33 images of" in told and "over 33 subjects" in told
    told = medgen("classify", run, cohort / "adni_test", "--checkpoint", "best-auc_8px", "--out", "of_test").stdout
    assert "Real8x8.nii.gz" in told and "8 subjects" in told
    medgen("classify", run, cohort / "adni_test", "--out", "of_test_16")

    with open(run / "smaller" / "dataset" / "index.csv") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["label"] for row in rows] == ["CN", "CN", "AD"]
    small = nibabel.load(run / "smaller" / "dataset" / rows[0]["image"])
    assert small.shape[:2] == (8, 8) and small.header.get_zooms()[:2] == (2.0, 2.0), "the same field of view in fewer pixels"

    metrics = json.loads((run / "evaluate" / "metrics.json").read_text())
    compared = {(score["metric"], score["group"], score["comparison"]) for score in metrics["scores"] if score["comparison"]}
    of_test = json.loads((tmp_path / "of_test_16" / "performance.json").read_text())["auc"]
    (auc,) = (score for score in metrics["scores"] if score["metric"] == "auc_real")
    assert auc["value"] == pytest.approx(of_test["value"]) and auc["ci"] == pytest.approx(of_test["interval"], abs=0.1) and auc["n"] == 16
    assert {"auc_synthetic"} <= {score["metric"] for score in metrics["scores"]}
    assert len(compared) == 3 * 3 * 3 and {group for _, group, _ in compared} == {None, *CLASSES}
    facts = json.loads((run / "outcome" / "evaluate.0.json").read_text())["facts"]
    assert {"fd_small_n image", "kid image", "ssim_pairs image"} <= set(facts), "of the whole set"
    page = (run / "report" / "index.html").read_text()
    assert all(f"<figcaption>{title}</figcaption>" in page for title in ("Scores of the critic", "Classes told apart on the val split")) and "6 of 15 grids of train/previews" in page
    assert '<table class="comparisons of3">' in page and 'scope="row">AD</th>' in page


def test_what_was_chosen_is_trained_again_on_train_and_val(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, cohort: Path) -> None:
    """The published VALIDATE, then TESTING with the best epochs. Smaller sizes can be drawn from the end of their phase."""
    images = {"kind": "generate", "from": "final", "count": 2, "checkpoint": "last-8px"}
    stages = {"final": {"kind": "train", "repeat": "train", "resources": {"cpus": 1}}, "smaller": images}
    stages["evaluate"] = {"kind": "evaluate", "of": "whole", "metrics": ["auc", "ms_ssim_diversity"]}
    stages["whole"] = {"kind": "generate", "from": "final", "count": 10}
    medgen("submit", write_spec(spec_of(cohort, "again", **stages)), "--local")
    run = only_run(tmp_path, "again")
    search, final = (json.loads((run / "outcome" / f"{name}.0.json").read_text())["facts"] for name in ("train", "final"))
    counts = json.loads((run / "evaluate" / "metrics.json").read_text())["counts"]
    assert (counts["train"], counts["train_patients"]) == (48, 24), "copies are looked for among all that it was trained on"
    assert final["training_slices"] == 48 and search["training_slices"] == 36
    commits = [json.loads(path.read_text()) for path in (run / "train" / "ckpt").glob("step-*/commit.json")]
    per_phase = search["steps"] // len(SIZES)
    steps = 0
    for phase, size in enumerate(SIZES):
        name = f"auc_{size}px"
        scored = sorted((-commit["metrics"][name]["value"], commit["step"]) for commit in commits if name in commit["metrics"])
        assert search["best_epochs"][f"{size}px"] == (scored[0][1] - phase * per_phase) * 8 / 36, "of the earliest of the best"
        steps += math.ceil(search["best_epochs"][f"{size}px"] * 48 / 8)
    assert final["steps"] == steps
    assert (run / "final" / "previews" / f"step-{steps:06d}.png").exists(), "for the classes of what it is trained on, as nothing is held out"
    assert set(final["checkpoints"]) == {"last", "last-4px", "last-8px", "last-16px"}, "nothing is chosen where nothing is held out"
    (small,) = (run / "smaller" / "dataset" / "images").glob("000000/image.nii.gz")
    assert nibabel.load(small).shape[:2] == (8, 8)


def test_a_training_goes_on_from_another_ones_size(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, cohort: Path) -> None:
    """The published LOAD_MODEL with START_TRAIN_AT_IMG_SIZE; with nothing left to train the weights are taken over as they are."""
    medgen("submit", write_spec(spec_of(cohort, "first")), "--local")
    first = only_run(tmp_path, "first")
    commits = [json.loads(path.read_text()) | {"folder": path.parent} for path in (first / "train" / "ckpt").glob("step-*/commit.json")]
    grown = max((commit for commit in commits if "auc_8px" in commit["metrics"]), key=lambda commit: (commit["metrics"]["auc_8px"]["value"], -commit["step"]))["folder"]

    spec = spec_of(cohort, "second")
    spec["stages"]["train"]["config"] = {**NET, "epochs": [0, 0, 2], "start_from": str(grown)}
    medgen("submit", write_spec(spec), "--local")
    spec["name"], spec["stages"]["train"]["config"] = "slower", {**spec["stages"]["train"]["config"], "lr": 1e-5, "betas": [0.0, 0.9], "epochs": [0, 0, 0.2]}
    medgen("submit", write_spec(spec), "--local")
    spec["stages"]["train"]["config"] = {**NET, "start_from": str(grown)}
    whole, second = weights(first), weights(only_run(tmp_path, "second"))
    last_phase = (json.loads((first / "outcome" / "train.0.json").read_text())["facts"]["steps"]) // len(SIZES)
    assert json.loads((only_run(tmp_path, "second") / "outcome" / "train.0.json").read_text())["facts"]["steps"] == last_phase
    assert whole.keys() == second.keys()
    for name, state in whole.items():
        torch.testing.assert_close(second[name], state, rtol=0, atol=0, msg=f"{name}: the same as if it had never been left")

    slower = only_run(tmp_path, "slower")
    for player in ("generator", "critic"):
        state = torch.load(min((slower / "train" / "ckpt").glob("step-*")) / f"optimizers.{player}.pt", weights_only=True)
        assert (state["param_groups"][0]["lr"], state["param_groups"][0]["betas"]) == (1e-5, (0.0, 0.9)), "moments are taken over, settings are not"
        assert state["state"][0]["step"] > 0

    spec["name"], spec["stages"]["train"]["config"]["epochs"] = "third", [0, 0, 0]
    medgen("submit", write_spec(spec), "--local", expect=1)
    cause = json.loads((only_run(tmp_path, "third") / "outcome" / "train.0.json").read_text())["cause"]
    assert "start_from: it is grown to 8 px, but epochs has 0 for the sizes up to 16 px; give 16 px and what follows their epochs" in cause
    spec["name"], spec["stages"]["train"]["config"]["start_from"] = "fourth", str(max((first / "train" / "ckpt").glob("step-*")))
    medgen("submit", write_spec(spec), "--local")
    fourth = weights(only_run(tmp_path, "fourth"))
    for name, state in whole.items():
        torch.testing.assert_close(fourth[name], state, rtol=0, atol=0, msg=name)

    spec["name"], spec["stages"]["train"]["config"]["in_channels"] = "fifth", 16
    assert "is of a network of another shape: in_channels 8 there, 16 here; give the same" in medgen("submit", write_spec(spec), "--local", expect=2).stderr
    spec["stages"]["train"]["config"]["start_from"] = "elsewhere"
    assert "elsewhere is no checkpoint; name a folder such as" in medgen("submit", write_spec(spec), "--local", expect=2).stderr


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
    drawn = [{path.name: path.read_bytes() for path in (folder / "train" / "previews").iterdir()} for folder in (run, only_run(tmp_path, "whole"))]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 5 * len(SIZES), "the same pictures: every two of nine steps, and the last"
    found = weights(run)
    assert found.keys() == expected.keys()
    for name, state in expected.items():
        torch.testing.assert_close(found[name], state, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_sizes": [8, 8]}, "batch_sizes has 2 entries, factors has 3"), ({"std_group": 3}, "8 at 4 px is no multiple of std_group: 3"),
        ({"factors": [1, 0.3, 1]}, "0.3 x in_channels 8 is 2.4 channels at 8 px"), ({"factors": [1, 1]}, "end at 8 px, but data.size is 16"),
        ({"loop": {"divergence_factor": 9}}, "loop.divergence_factor has no effect"),
        ({"select": False}, "select_from has no effect with select: false"), ({"epochs": 0}, "epochs: 0 at 4 px leaves that size to start_from, which is not given"),
        ({"epochs": [1, 0, 1], "start_from": "elsewhere"}, "only the first sizes can be left to start_from"), ({"channels": ["t1"]}, "needs data.images.t1; the data have: image"),
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
        ({"images": {"red": 0, "green": 1, "blue": 2}}, "names 3 channels, the slices of"), ({"images": {"image": "1"}}, "names the channels of a stack by their places"),
        ({"root": None}, "format: stack needs root: the folder with labels.csv"), ({"root": "nowhere"}, "nowhere is missing"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit(medgen: Medgen, write_spec: WriteSpec, cohort: Path, change: dict[str, Any], words: str) -> None:
    spec = spec_of(cohort, "wrong")
    spec["data"] |= change
    spec["stages"]["train"]["config"] = {**NET, "critic_iterations": 1, "factors": [1] * (4 if change.get("size") == 32 else 3)} | ({"channels": list(change["images"])} if "images" in change else {})
    told = medgen("submit", write_spec(spec), "--local", expect=2).stderr
    assert words in told, told


def test_losses_of_players_do_not_stop_a_training() -> None:
    """They fall below zero and rise again; one that is no number still stops it."""
    stopping = cast(training.Training, SimpleNamespace(clock=training.Clock(step=600), config=Config.model_validate(Config.examples()["grey"])))
    for loss in (-0.5, 3.0):
        health.stop_if_hopeless(stopping, {"loss": loss}, 550)
    with pytest.raises(MedgenError, match="the loss became nan"):
        health.stop_if_hopeless(stopping, {"loss": math.nan}, 10)


def test_classes_are_counted_in_their_order(medgen: Medgen, write_spec: WriteSpec, cohort: Path, tmp_path: Path) -> None:
    images = {"kind": "generate", "from": "train", "per_class": [1, 1, 1]}
    told = medgen("submit", write_spec(spec_of(cohort, "three", images=images)), "--local", expect=2).stderr
    assert "stages.images.per_class: [1, 1, 1] counts 3 classes, the data have 2: CN, AD" in told and not list((tmp_path / "runs").glob("three-*"))


def test_nothing_is_chosen_where_nothing_is_held_out(medgen: Medgen, write_spec: WriteSpec, cohort: Path) -> None:
    """Known before anything is trained; and what was trained on val is not compared with val."""
    stages = {"final": {"kind": "train", "repeat": "train"}, "images": {"kind": "generate", "from": "final", "count": 2},
              "evaluate": {"kind": "evaluate", "of": "images", "against": "val", "metrics": ["auc"]}}  # fmt: skip
    spec = spec_of(cohort, "seen", **stages)
    assert "final was trained on the val split too; compare its images with the test split" in medgen("submit", write_spec(spec), "--local", expect=2).stderr
    spec["stages"]["evaluate"]["against"], spec["data"]["splits"] = "test", {"train": 1, "val": 0, "test": 0}
    assert "stages.final.repeat: train would have no val split to choose its epochs by" in medgen("submit", write_spec(spec), "--local", expect=2).stderr
    spec["stages"]["final"]["repeat"] = "final"
    assert "final repeats final itself" in medgen("submit", write_spec(spec), "--local", expect=2).stderr
    spec["stages"]["final"] |= {"repeat": "train", "config": NET}
    assert "config has no effect beside repeat: train" in medgen("submit", write_spec(spec), "--local", expect=2).stderr
