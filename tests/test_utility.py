"""Structure consistency and usefulness: planted cases with known answers, refusals, and trials that are cut and go on."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import pytest
import torch
import yaml
from conftest import TINY_NET, tiny_spec
from scipy.ndimage import gaussian_filter
from torch.nn import functional

from medgen import checks, document, planning, roc, spec, task
from medgen.data.image_files import write_slice
from medgen.data.store import SliceStore, open_store
from medgen.errors import InputError
from medgen.evaluate import intervals
from medgen.evaluate.scores import Score, from_json
from medgen.launch import space, submit
from medgen.launch.script import render_script, whole_stage
from medgen.rundir import RunDir
from medgen.site import Site
from medgen.spec_data import DataSpec
from medgen.spec_utility import Arm, UtilityStage
from medgen.utility import arms, augment, networks, resampling, sides

SIZE = 16
CLASSES = ("AD", "CN")
FEW = {"batch_size": 8, "seeds": 3, "steps": 70, "lr": 1.0e-2, "allow_few_seeds": False, "parallel": None}
STRUCTURE = {"of": "images", "against": "test", "channels": [8, 16], **FEW}
SEGMENTATION = {"of": "images", "task": "segmentation", "network": None, "channels": [8, 16], **FEW}

Pictures = tuple[np.ndarray, np.ndarray, list[str]]


def pictures(count: int, seed: int) -> Pictures:
    """Textured disks with a bright lesion (but every fourth without) and its mask; the lesion is on the left of one class, on the right of the other."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    disk = (rows - 8) ** 2 + (columns - 8) ** 2 < 7.5**2
    texture = 0.35 + 0.8 * np.stack([gaussian_filter(noise, 1) for noise in generator.normal(size=(count, SIZE, SIZE))]) * 0.3
    labels = [CLASSES[number % 2] for number in range(count)]
    centres = [(generator.uniform(5, 11), generator.uniform(4, 6) + (0 if label == "AD" else 6)) for label in labels]
    radii = generator.uniform(1.9, 3.1, size=count)
    masks = np.stack([(rows - r) ** 2 + (columns - c) ** 2 < radius**2 for (r, c), radius in zip(centres, radii, strict=True)])
    masks[3::4] = False
    return np.clip((texture + 0.5 * masks) * disk, 0, 1).astype(np.float32), (masks & disk).astype(np.uint8), labels


def cohort(folder: Path, counts: dict[str, int]) -> DataSpec:
    """CSV data: patients of two slices."""
    lines = []
    for place, (split, count) in enumerate(counts.items()):
        for number, (image, mask, label) in enumerate(zip(*pictures(count, place), strict=True)):
            paths = {"t1": folder / f"{split}_{number:03d}.npy", "mask": folder / f"{split}_{number:03d}_mask.npy"}
            write_slice(paths["t1"], image, "image", np.eye(4))
            write_slice(paths["mask"], mask, "mask", np.eye(4))
            lines.append({"patient": f"{split} {number // 2}", "split": split, "label": label, **{name: str(path) for name, path in paths.items()}})
    with open(folder / "index.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return DataSpec(format="csv", root=folder / "index.csv", images={"t1": "t1"}, mask="mask", size=SIZE, window={"fixed": [0, 1]}, content=0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[DataSpec, SliceStore]:
    found = cohort(tmp_path_factory.mktemp("cohort"), {"train": 24, "val": 16, "test": 40})
    return found, open_store(found, fake_run.SEED, cache, fake_run.quiet)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Tasks are performed in this process, and listen for signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def made_run(folder: Path, data: tuple[DataSpec, SliceStore], drawn: Pictures, stages: dict[str, tuple[str, dict[str, Any], int]]) -> RunDir:
    """A run whose dataset `images` holds these, and stages: name -> kind, settings, number of trials."""
    images, masks, labels = drawn
    run = fake_run.make_run(folder, data[0], [
        fake_run.planned("train", "train", [], {"config": {"model": "diffusion"}, "repeat": None}),
        fake_run.planned("images", "generate", ["train"], {"from": "train", "count": len(images), "condition": "masks"}, len(images)),
        fake_run.planned("collect_images", "collect", ["images"], {"of": "images"}),
        *(fake_run.planned(name, kind, ["collect_images"], settings, tasks=trials) for name, (kind, settings, trials) in stages.items()),
        *(fake_run.planned(f"collect_{name}", "collect", [name], {"of": name}) for name in stages),
    ])
    (run.root / "fingerprint").write_text(data[1].fingerprint)
    fake_run.write_dataset(run, "images", {"t1": images, "seg": masks}, [f"mask {number}" for number in range(len(images))], "synthetic", labels)
    fake_run.finish(run, "collect_images", 0, 1)
    return run


def performed(run: RunDir, stage: str, kind: str, trials: int, monkeypatch: pytest.MonkeyPatch, cache: Path) -> dict[str, Any]:
    """All trials and their collection; what metrics.json then says."""
    monkeypatch.setenv("MEDGEN_CACHE", str(cache))
    for shard in range(trials):
        assert task.perform(run, kind, stage, shard, 0) == 0
    assert task.perform(run, "collect", f"collect_{stage}", 0, 0) == 0
    record: dict[str, Any] = json.loads(run.metrics(stage).read_text())
    return record


def scores_by_name(record: dict[str, Any]) -> dict[tuple[str, str | None], Score]:
    return {(item.metric, item.group): item for item in from_json(record["scores"])}


def test_images_that_ignore_their_masks_score_like_the_control_and_real_ones_reach_the_ceiling(
    tmp_path: Path, data: tuple[DataSpec, SliceStore], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    images, masks, labels = pictures(60, 9)
    obedient = made_run(tmp_path / "obedient", data, (images, masks, labels), {"structure": ("structure", STRUCTURE, 3)})
    record = performed(obedient, "structure", "structure", 3, monkeypatch, cache)
    found = scores_by_name(record)
    good, ceiling, control = (found[name, None] for name in ("structure_dice", "structure_dice_real", "structure_dice_shuffled"))
    assert ceiling.value > 0.7 and good.floor == ceiling.value and record["details"]["warnings"] == []
    assert good.value == pytest.approx(ceiling.value, abs=0.08) and control.value < 0.3
    assert good.n == 45 and ceiling.n == 30, "slices without a lesion are not part of Dice"
    assert good.ci is not None and good.ci[0] < good.value < good.ci[1]
    assert found["structure_dice_ratio", None].value == pytest.approx(1, abs=0.1)
    assert found["structure_false_positives", None].n == 15
    assert {group for metric, group in found if metric == "structure_dice"} == {None, "<10 mm"}
    assert len(record["details"]["seeds"]) == 3 and record["details"]["spread"]["structure_dice t1"] > 0
    quick = record["details"]["quick_look"]
    assert quick["label"] == "quick look, no segmenter" and not any("quick" in item["metric"] for item in record["scores"])
    lines = list(csv.DictReader(obedient.predictions("structure").open()))
    assert len(lines) == 3 * (40 + 60) and "train" not in obedient.predictions("structure").read_text()

    wrong = masks[np.random.default_rng(1).permutation(60)]  # each is said to be drawn on the mask of some other
    deaf = made_run(tmp_path / "deaf", data, (images, wrong, labels), {"structure": ("structure", STRUCTURE, 3)})
    shutil.copytree(obedient.stage("structure"), deaf.stage("structure"))  # as if cut and started again: nothing of it fits this task or these images
    for shard in range(3):
        deaf.task_result("structure", shard).unlink()
    found = scores_by_name(performed(deaf, "structure", "structure", 3, monkeypatch, cache))
    assert found["structure_dice_real", None].value == ceiling.value, "the segmenter has seen real images only, the same in both runs"
    assert found["structure_dice", None].value == pytest.approx(found["structure_dice_shuffled", None].value, abs=0.1)
    assert found["structure_dice", None].value < 0.3


def differences(record: dict[str, Any], metric: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(item["arm"], item["to"]): item for item in record["details"]["comparisons"] if item["metric"] == metric}


def test_more_real_images_are_no_worse_than_duplicates_and_noise_is_worse_than_real(
    tmp_path: Path, data: tuple[DataSpec, SliceStore], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    run = made_run(tmp_path / "more", data, pictures(60, 9), {"useful": ("utility", SEGMENTATION | {"arms": ["real", "duplicated", "mixed"], "ratios": [2.0]}, 9)})
    record = performed(run, "useful", "utility", 9, monkeypatch, cache)
    found = scores_by_name(record)
    assert {group for metric, group in found if metric == "utility_dice"} == {"real", "duplicated", "mixed 2"}
    assert found["utility_dice", "real"].value > 0.5
    compared = differences(record, "utility_dice")
    assert compared["mixed 2", "duplicated"]["verdict"] != "loss" and compared["mixed 2", "duplicated"]["value"] > -0.03
    assert compared["mixed 2", "real"]["value"] == pytest.approx(found["utility_dice", "mixed 2"].value - found["utility_dice", "real"].value)
    images = {item["arm"]: item["images"] for item in record["details"]["arms"]}
    assert images == {"real": {"real": 24, "synthetic": 0}, "duplicated": {"real": 72, "synthetic": 0}, "mixed 2": {"real": 24, "synthetic": 48}}
    assert abs(compared["duplicated", "real"]["value"]) < 0.05 and compared["duplicated", "real"]["detectable"] > 0
    lines = list(csv.DictReader(run.predictions("useful").open()))
    assert len(lines) == 9 * 40 and set(lines[0]) == {"id", "patient", "arm", "seed", "lesion_pixels", "found_pixels", "dice"}
    by_hand = np.mean([float(line["dice"]) for line in lines if line["arm"] == "real" and int(line["lesion_pixels"])])
    assert found["utility_dice", "real"].value == pytest.approx(by_hand)

    images_, masks, labels = pictures(60, 9)
    noise = np.random.default_rng(0).uniform(size=images_.shape).astype(np.float32)
    run = made_run(tmp_path / "noise", data, (noise, masks, labels), {"useful": ("utility", SEGMENTATION | {"arms": ["real", "synthetic"], "ratios": [1.0]}, 6)})
    worse = differences(performed(run, "useful", "utility", 6, monkeypatch, cache), "utility_dice")["synthetic", "real"]
    assert worse["verdict"] == "loss" and worse["value"] < -0.2


def test_arms_hold_what_they_say(tmp_path: Path, data: tuple[DataSpec, SliceStore], cache: Path) -> None:
    run = made_run(tmp_path, data, pictures(50, 9), {})
    opened = sides.read_sides(run, task.planning.read(run), "images", cache, fake_run.quiet, "masks")
    settings = UtilityStage.model_validate({"kind": "utility", **SEGMENTATION, "arms": ["real", "duplicated", "synthetic", "mixed"], "ratios": [0.5, 2.0]})
    assert [arm.name for arm in settings.all_arms] == ["real", "duplicated", "synthetic", "mixed 0.5", "mixed 2"]

    def held(arm: Arm, seed_number: int) -> list[bytes]:
        made = arms.training_set(opened, settings, arm, seed_number)
        images, masks = made.pick(np.arange(len(made)))
        assert images.shape == (len(made), 1, SIZE, SIZE) and masks.shape == (len(made), 1, SIZE, SIZE)
        backwards = made.pick(np.arange(len(made))[::-1])
        assert (backwards[0][::-1] == images).all() and (backwards[1][::-1] == masks).all(), "in the order that was asked for"
        return [image.tobytes() + mask.tobytes() for image, mask in zip(images, masks, strict=True)]

    real, twice, alone, some, more = (held(arm, 0) for arm in settings.all_arms)
    assert [len(found) for found in (real, twice, alone, some, more)] == [24, 72, 48, 36, 72]
    assert set(twice) == set(real) and sorted(twice.count(image) for image in set(twice)) == [3] * 24
    assert set(some) < set(more) == set(real) | set(alone) and not set(alone) & set(real)
    assert set(held(Arm("synthetic"), 1)) != set(alone), "other seeds, other images"


def test_augmentation_moves_a_mask_with_its_image_and_belongs_to_the_sample() -> None:
    masks = torch.zeros(6, 1, 32, 32)
    masks[:, :, 8:14, 10:22] = 1
    images = 0.2 + 0.6 * masks
    moved, moved_masks = augment.classical(images, masks, 3, "test", range(10, 16))
    assert moved_masks is not None and set(moved_masks.unique().tolist()) == {0, 1}
    for image, mask in zip(moved, moved_masks, strict=True):
        inside, outside = image[mask > 0], image[(functional.max_pool2d(mask[None], 3, 1, 1)[0] == 0) & (image > 0)]
        assert inside.median() > outside.max(), "what is bright lies in the mask"
    assert moved.min() >= 0 and moved.max() <= 1 and not torch.equal(moved[0], moved[1])
    again, _ = augment.classical(images[2:3], None, 3, "test", [12])
    assert torch.equal(again[0], moved[2])


def test_a_classifier_learns_the_classes_that_images_were_drawn_as(tmp_path: Path, data: tuple[DataSpec, SliceStore], monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    settings = {"of": "images", "task": "classification", "network": "resnet18", "channels": None, **FEW,
                "arms": ["real", "synthetic"], "ratios": [2.0], "seeds": 1, "allow_few_seeds": True, "steps": 40, "lr": 5.0e-4}  # fmt: skip
    run = made_run(tmp_path, data, pictures(48, 9), {"useful": ("utility", settings, 2)})
    record = performed(run, "useful", "utility", 2, monkeypatch, cache)
    found = scores_by_name(record)
    assert {metric for metric, _ in found} == {"utility_balanced_accuracy", "utility_macro_f1", "utility_auc"}
    assert found["utility_auc", "synthetic"].value > 0.7
    trial = json.loads(run.task_result("useful", 1).read_text())
    labels, probabilities = np.array(trial["test"]["label"]), np.array(trial["test"]["probabilities"])
    assert found["utility_auc", "synthetic"].value == pytest.approx(roc.area_under_curve(labels, probabilities))
    (line,) = [line for line in csv.DictReader(run.predictions("useful").open()) if line["seed"] == "0" and line["arm"] == "real" and line["id"] == trial["test"]["id"][5]]
    assert line["label"] == CLASSES[labels[5]] and float(line["probability_AD"]) + float(line["probability_CN"]) == pytest.approx(1, abs=1e-5)


def test_a_trial_that_is_cut_goes_on_bit_for_bit_and_a_lost_one_alone_is_made_again(
    tmp_path: Path, data: tuple[DataSpec, SliceStore], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    settings = SEGMENTATION | {"arms": ["real", "augmented"], "ratios": [0.5, 1.0, 2.0], "seeds": 1, "allow_few_seeds": True, "steps": 30}
    monkeypatch.setenv("MEDGEN_CACHE", str(cache))
    run = made_run(tmp_path, data, pictures(8, 9), {"useful": ("utility", settings, 2)})
    command = [sys.executable, "-m", "medgen", "utility", str(run.root), "--stage", "useful", "--shard", "1"]
    cut = subprocess.run(command, env={**environment, "MEDGEN_FAULT": "site=step,step=17,action=term"}, capture_output=True, text=True)
    assert cut.returncode == 3 and "stopped by SIGTERM after step 17" in cut.stderr, cut.stderr
    assert run.saved_step("useful", 1) == 17 and not run.task_result("useful", 1).exists()
    assert task.perform(run, "utility", "useful", 1, 1) == 0
    went_on = run.task_result("useful", 1).read_bytes()
    assert not run.trial("useful", 1).exists(), "its checkpoints have served"
    run.task_result("useful", 1).unlink()
    assert task.perform(run, "utility", "useful", 1, 2) == 0
    assert run.task_result("useful", 1).read_bytes() == went_on, "as if it had never been cut"

    assert task.perform(run, "utility", "useful", 0, 0) == 0
    run.task_result("useful", 1).write_bytes(went_on.replace(b'"seed": 0', b'"seed": 1'))
    assert task.perform(run, "collect", "collect_useful", 0, 0) == 1
    outcome = run.read_outcome("collect_useful", 0)
    assert outcome is not None and outcome.cause is not None and "1 of 2 trials of useful are missing or damaged and must be run again: 1" in outcome.cause
    done = [run.is_done("useful", shard, planned.hash) for shard, planned in enumerate(task.planning.read(run).stage("useful").tasks)]
    assert done == [True, False]


def written(**stage: Any) -> spec.Spec:
    """tiny_spec with one more stage, checked."""
    full = tiny_spec()
    full["stages"]["trained_on"] = {"kind": "generate", "from": "train_bravo", "condition": "test", "count": 4, "sampling": {"steps": 2}}
    full["stages"]["more"] = stage
    return spec.check(document.parse(yaml.safe_dump(full), "job.yaml"))


@pytest.mark.parametrize(("stage", "message"), [
    ({"kind": "structure", "of": "masks"}, "masks makes masks; name a generate stage of images"),
    ({"kind": "structure", "of": "train_bravo"}, "train_bravo is a train stage; name a generate stage"),
    ({"kind": "structure", "of": "images", "seeds": 2}, "seeds: 2: trainings differ by luck"),
    ({"kind": "structure", "of": "images", "allow_few_seeds": True}, "allow_few_seeds has no effect with seeds: 3"),
    ({"kind": "structure", "of": "images", "channels": [8, 8, 8, 8, 8]}, "5 levels halves its images 4 times, which 16 pixels do not allow"),
    ({"kind": "structure", "of": "images", "against": "train"}, "against"),
    ({"kind": "utility", "of": "images", "task": "classification"}, "the model of train_bravo knows no classes"),
    ({"kind": "utility", "of": "trained_on", "task": "segmentation"}, "drawn on masks of the test split, which the arms are tested on"),
    ({"kind": "utility", "of": "images", "task": "segmentation", "arms": ["synthetic", "mixed"]}, "every other arm is compared with real"),
    ({"kind": "utility", "of": "images", "task": "segmentation", "ratios": [1, 1]}, "ratios are synthetic images per real one"),
    ({"kind": "utility", "of": "images", "task": "segmentation", "arms": ["real", "augmented"], "ratios": [3]}, "ratios has no effect without one of the arms"),
    ({"kind": "utility", "of": "images", "task": "segmentation", "network": "resnet18"}, "network: resnet18 classifies"),
    ({"kind": "utility", "of": "images", "task": "classification", "channels": [8, 8]}, "channels are those of the U-Net of a segmentation"),
    ({"kind": "utility", "of": "images", "task": "segmentation", "batch_size": 1}, "batch_size"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused_before_anything_runs(stage: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        written(**stage)


def test_the_same_spec_is_an_array_with_a_collect_stage_here_and_on_slurm(tmp_path: Path) -> None:
    checked = written(kind="utility", of="images", task="segmentation", ratios=[0.5, 1], parallel=4)
    plans = [planning.make_plan(checked, site) for site in (Site(name="here", cpus=4, gpus=0), Site(name="there", cpus=64, gpus=4, scheduler="slurm"))]
    assert plans[0].run_id == plans[1].run_id
    for planned in plans:
        stage, collected = planned.stage("more"), planned.stage("collect_more")
        assert len(stage.tasks) == 18 == len({item.hash for item in stage.tasks}) and stage.parallel == 4
        assert stage.needs == ["collect_images"] and collected.needs == ["more"] and "collect_more" in planned.stage("report").needs
        assert stage.saves and stage.segments is None
    text = render_script(plans[1], plans[1].stage("more"), whole_stage(plans[1].stage("more"), 1), tmp_path, "python")
    assert "#SBATCH --array=0-17%4\n" in text and "#SBATCH --gres=gpu:1\n" in text and "/code utility" in text
    for network, parameters in ((networks.resnet("resnet18", 1, 2, 0), space.RESNET_PARAMETERS["resnet18"]), (networks.unet(1, [16, 32, 64], 0), space.UNET_PARAMETERS * (256 + 1024 + 4096))):
        assert 0.5 * parameters < sum(weight.numel() for weight in network.parameters()) < parameters, "what submit takes for the size of a snapshot"
    fewer = written(kind="utility", of="images", task="segmentation", ratios=[0.5, 1], parallel=2)
    assert planning.run_id_of(fewer) == planning.run_id_of(checked), "how many run at once is not part of the result"


def test_too_few_synthetic_images_and_missing_classes_are_told(tmp_path: Path, data: tuple[DataSpec, SliceStore], monkeypatch: pytest.MonkeyPatch, cache: Path,
                                                               medgen: Callable[..., Any], write_spec: Callable[..., Path]) -> None:
    monkeypatch.setenv("MEDGEN_CACHE", str(cache))
    run = made_run(tmp_path, data, pictures(30, 9), {"useful": ("utility", SEGMENTATION | {"arms": ["real", "mixed"], "ratios": [1.0, 2.0]}, 9)})
    assert task.perform(run, "utility", "useful", 0, 0) == 2, "the arm real as well: half an experiment is none"
    outcome = run.read_outcome("useful", 0)
    assert outcome is not None and outcome.cause is not None
    assert outcome.cause == "ratios: 2 synthetic images for each of 24 real training slices are 48, and images has 30; write ratios up to 1.25, or generate more"

    full = tiny_spec()
    full["stages"]["useful"] = {"kind": "utility", "of": "images", "task": "segmentation"}
    prepared = submit.prepare(write_spec(full), [], None, tmp_path / "runs", True)
    phantoms = open_store(prepared[0].spec.data, prepared[0].spec.seed, cache, fake_run.quiet)  # type: ignore[arg-type]
    (finding,) = checks.shortages(prepared, {checks.data_key(prepared[0].spec): phantoms})
    slices = len(phantoms.select("train"))
    assert (finding.topic, finding.mark) == ("useful", "wrong") and f"for each of {slices} real training slices are {2 * slices}, and images has 14" in finding.text

    full = tiny_spec(data={"format": "phantom", "patients": 6, "size": 16, "positive_only": True, "every": 2, "splits": {"train": 0.8, "val": 0.2, "test": 0}})
    full["stages"] = {name: full["stages"][name] for name in ("train_seg", "train_bravo", "masks", "images")} | {"useful": {"kind": "utility", "of": "images", "task": "segmentation"}}
    assert "stages.useful uses the test split, which has no patients" in medgen("submit", write_spec(full), "--local", expect=2).stderr


def test_resampled_scores_are_those_of_the_definitions() -> None:
    generator = np.random.default_rng(4)
    labels, patients = generator.integers(0, 3, 60), generator.integers(0, 9, 60)
    probabilities = np.round(generator.dirichlet(np.ones(3), 60), 1)  # with ties
    weights = intervals.draw_weights(9, 5, 1, "test")
    drawn = [np.repeat(np.arange(60), row[patients]) for row in weights]
    from sklearn.metrics import balanced_accuracy_score, f1_score

    taken = probabilities.argmax(axis=1)
    for statistic, expected in (
        (resampling.area_under_curve(labels, probabilities, patients, 9), lambda rows: roc.area_under_curve(labels[rows], probabilities[rows])),
        (resampling.balanced_accuracy(labels, probabilities, patients, 9), lambda rows: balanced_accuracy_score(labels[rows], taken[rows])),
        (resampling.macro_f1(labels, probabilities, patients, 9), lambda rows: f1_score(labels[rows], taken[rows], average="macro")),
    ):
        assert statistic.of(weights.astype(float)) == pytest.approx([expected(rows) for rows in drawn])


def test_what_is_said_of_a_difference() -> None:
    generator = np.random.default_rng(2)
    weights = intervals.draw_weights(80, 1000, 1, "test")
    everyone = np.ones(80, dtype=bool)

    def arm(means: list[float], noise: float) -> resampling.Resampled:
        return resampling.resampled([resampling.mean_where(mean + noise * generator.normal(size=80), everyone, np.arange(80), 80) for mean in means], weights)

    base = arm([0.5, 0.5, 0.5], 0.01)
    gain = resampling.difference(arm([0.6, 0.6, 0.61], 0.01), base, "real", "higher")
    assert gain.verdict == "gain" and gain.value == pytest.approx(0.103, abs=0.005) and gain.words.startswith("a gain of 0.10")
    assert resampling.difference(arm([0.6, 0.6, 0.61], 0.01), base, "real", "lower").verdict == "loss"
    luck = resampling.difference(arm([0.5, 0.5, 0.8], 0.01), base, "real", "higher")
    assert luck.verdict == "not shown" and "the seeds differ by as much" in luck.words
    nothing = resampling.difference(arm([0.5, 0.5, 0.5], 0.3), base, "real", "higher")
    assert nothing.verdict == "not shown" and nothing.words == f"no gain over real shown; a gain below {nothing.detectable:.3f} could not have been seen"
    standard_error = 0.3 / np.sqrt(80 * 3)  # of the mean over three seeds and 80 patients
    assert nothing.detectable == pytest.approx(2.8 * standard_error, rel=0.25), "closed form: (1.96 + 0.84) standard errors"
    few = resampling.resampled([resampling.mean_where(np.ones(3), np.ones(3, dtype=bool), np.arange(3), 3)], intervals.draw_weights(3, 100, 1, "test"))
    assert resampling.difference(few, few, "real", "higher").verdict == "too few patients"


def test_the_whole_job_through_the_command_line(tmp_path: Path, medgen: Callable[..., Any], write_spec: Callable[..., Path]) -> None:
    """Two arms on images of an untrained model; the same submit again does nothing, and makes only what is lost."""
    full = tiny_spec()
    full["stages"] = {
        "train_bravo": {"kind": "train", "config": {**TINY_NET, "mode": "bravo", "loop": {"preview_images": 0}}, "resources": {"cpus": 1}},
        "images": {"kind": "generate", "from": "train_bravo", "condition": "train", "count": 8, "chunk": 8, "sampling": {"steps": 2}},
        "useful": {"kind": "utility", "of": "images", "task": "segmentation", "channels": [4, 8], "arms": ["real", "synthetic"], "ratios": [0.1],
                   "seeds": 1, "allow_few_seeds": True, "steps": 5, "batch_size": 4},
    }  # fmt: skip
    path = write_spec(full)
    medgen("submit", path, "--local")
    (run,) = (RunDir(found.parent) for found in (tmp_path / "runs").glob("*/plan.json"))
    state = json.loads(medgen("watch", "tiny", "--once", "--json").stdout)
    assert state["verdict"] == "done" and {stage["name"]: len(stage["tasks"]) if "tasks" in stage else None for stage in state["stages"]}.keys() >= {"useful", "collect_useful"}
    assert {item["group"] for item in json.loads(run.metrics("useful").read_text())["scores"]} == {"real", "synthetic"}
    before = {shard: run.outcome_file("useful", shard).stat().st_mtime_ns for shard in (0, 1)}
    run.task_result("useful", 1).unlink()
    run.metrics("useful").unlink()
    medgen("submit", path, "--local")
    assert run.metrics("useful").is_file() and run.outcome_file("useful", 0).stat().st_mtime_ns == before[0]
    assert run.outcome_file("useful", 1).stat().st_mtime_ns > before[1]
    left = run.trial("useful", 0) / "step-000002"
    left.mkdir(parents=True)  # as if killed between its result and its outcome
    told = medgen("fsck", "tiny", "--clean").stdout
    assert "checkpoints of a trial whose result verifies" in told and not left.exists()
