"""Memorisation and membership: planted copies are found and none invented, training images are told from others only if they are remembered."""

from __future__ import annotations

import ast
import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import fake_run
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from medgen import checkpoint, files, models
from medgen.context import Context
from medgen.data.store import SliceStore, open_store
from medgen.dist import Ranks
from medgen.dp.card import issue
from medgen.dp.mechanism import Mechanism
from medgen.evaluate import copies, membership, privacy
from medgen.evaluate.copies import Rows, Whitening
from medgen.evaluate.run import evaluate_run
from medgen.models.base import Batch, DataShape
from medgen.roc import binary_area
from medgen.rundir import RunDir
from medgen.spec_data import DataSpec
from medgen.training import build_model

SIZE = 32
REPOSITORY = Path(__file__).parent.parent


# --- copies, on rows --------------------------------------------------------------------------------------------------


def test_nearest_is_what_a_full_matrix_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "ITEM_BLOCK", 7)
    monkeypatch.setattr(copies, "TRAIN_BLOCK", 5)
    generator = np.random.default_rng(0)
    items, train = generator.normal(size=(23, 4)).astype(np.float32), generator.normal(size=(61, 4)).astype(np.float32)
    patients = generator.integers(0, 6, size=61).astype(str)
    found = copies.nearest(items, train, patients)
    distances = np.linalg.norm(items[:, None].astype(float) - train[None], axis=2)
    place = distances.argmin(axis=1)
    others = np.where(patients[None] == patients[place][:, None], np.inf, distances).min(axis=1)
    assert (found.place == place).all()
    assert found.distance == pytest.approx(distances.min(axis=1))
    assert found.other_distance == pytest.approx(others)
    assert np.isinf(copies.nearest(items, train, np.zeros(61)).other_distance).all()


def test_two_blank_images_are_no_copy_and_an_exact_copy_has_the_ratio_0() -> None:
    images = np.random.default_rng(0).uniform(size=(4, 1, 8, 8)).astype(np.float32)
    images[2:] = 0.3
    rows = copies.pixel_rows(images)
    assert (rows[2:] == 0).all()
    ratios = copies.nearest(rows[[0, 2]], rows, np.array(["a", "b", "c", "d"])).ratios
    assert ratios == pytest.approx([0, 1], abs=1e-6)


def test_pixel_rows_do_not_know_place_brightness_or_contrast() -> None:
    image = np.zeros((1, 1, 64, 64), np.float32)
    image[0, 0, 20:40, 22:38] = np.random.default_rng(0).uniform(0.4, 0.6, size=(20, 16))
    same = np.roll(image, (7, -5), axis=(2, 3)) * 1.4
    rows = copies.pixel_rows(copies.centred(np.concatenate([image, same])))
    assert rows[1] == pytest.approx(rows[0], abs=1e-5)
    assert (copies.centred(np.zeros((1, 2, 6, 6), np.float32)) == 0).all()


def test_patients_who_share_a_slice_are_one_person() -> None:
    images = np.random.default_rng(0).uniform(size=(6, 1, 8, 8)).astype(np.float32)
    images[3] = images[0]  # of a and b
    images[4] = images[2]  # of b and c
    images[[1, 5]] = 0.5  # blank, of a and d: says nothing
    prints = copies.fingerprints(images)
    assert copies.people(np.array(["a", "a", "b", "b", "c", "d"]), prints).tolist() == ["a", "a", "a", "a", "a", "d"]


def test_the_floor_judges_each_held_out_patient_by_the_others() -> None:
    ratios = np.concatenate([np.linspace(0.8, 1, 100), np.full(20, 0.1)])
    nearest = copies.Nearest(np.zeros(120, int), ratios, np.ones(120))
    found = copies.Copies(nearest, nearest, np.repeat(["a", "b"], [100, 20]), ratios, ratios)
    # all of b are below the first percentile of a; of a, none is below that of b
    assert found.floor == pytest.approx(20 / 120)


def test_whitened_features_vary_equally_in_few_directions() -> None:
    generator = np.random.default_rng(0)
    features = (generator.normal(size=(400, 5)) @ (np.eye(5) + 0.2) * [1, 10, 1, 1, 1] + 3).astype(np.float32)
    whitened = Whitening.fitted(features)(features)
    assert np.cov(whitened.T) == pytest.approx(np.eye(5), abs=0.06)
    assert Whitening.fitted(features[:9])(features).shape == (400, 2)
    assert np.isfinite(Whitening.fitted(np.ones((8, 3), np.float32))(features[:, :3])).all()


# --- copies, on phantoms ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[RunDir, SliceStore]:
    return fake_run.full_run(tmp_path_factory.mktemp("privacy"), cache, patients=20, size=SIZE, count=16)


@pytest.fixture(scope="module")
def heads(fake: tuple[RunDir, SliceStore]) -> SliceStore:
    return fake[1]


def rows_of(images: np.ndarray) -> Rows:
    plain = images[:, None]
    return Rows(*(copies.pixel_rows(copies.centred(side)) for side in (plain, copies.mirrored(plain))))


def each(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda images: np.clip(np.stack([change(image) for image in images]), 0, 1).astype(np.float32)


NOISE = np.random.default_rng(0)
PLANTED = {
    "exact": each(lambda image: image),
    "mirrored": each(lambda image: image[:, ::-1]),
    "shifted": each(lambda image: np.roll(image, (2, -1), axis=(0, 1))),
    "brighter": each(lambda image: 1.15 * image),
    "darker": each(lambda image: 0.8 * image),
    "other contrast": each(lambda image: image**0.8),
    "noisy": each(lambda image: image + NOISE.normal(scale=0.02, size=image.shape)),
    "blurred": each(lambda image: gaussian_filter(image, 0.4)),
    "all of it": each(lambda image: 0.92 * gaussian_filter(np.roll(image[:, ::-1], 1, axis=0), 0.3) + NOISE.normal(scale=0.01, size=image.shape)),
}


def test_planted_copies_are_found_and_none_are_invented(heads: SliceStore) -> None:
    train, val, test = (heads.select(split) for split in ("train", "val", "test"))
    patients, images = heads.rows["patient"].to_numpy(), heads.images("bravo", np.arange(len(heads.rows)))
    held_out, rows = rows_of(images[val]), rows_of(images[train]).plain
    taken = np.arange(0, len(train), 4)
    for name, change in PLANTED.items():
        found = copies.find_copies(rows_of(change(images[train][taken])), held_out, patients[val], rows, patients[train])
        assert found.suspects.mean() > 0.9, name
        assert (found.synthetic.place == taken).mean() > 0.9, name
        assert found.authentic.mean() < 0.1, name
    for change in (PLANTED["exact"], PLANTED["blurred"]):  # a blurred stranger is near to everything, and still no copy
        strangers = copies.find_copies(rows_of(change(images[test])), held_out, patients[val], rows, patients[train])
        assert strangers.suspects.mean() < 0.06
        assert abs(strangers.authentic.mean() - strangers.held_out_authentic.mean()) < 0.15


def test_copies_of_a_slice_that_two_names_share_are_found(heads: SliceStore) -> None:
    train, val = heads.select("train"), heads.select("val")
    names, images = heads.rows["patient"].to_numpy().astype(str), heads.images("bravo", np.arange(len(heads.rows)))
    twice, patients = np.concatenate([train, train]), np.concatenate([names[train], [f"{name} again" for name in names[train]]])
    rows, planted = rows_of(images[twice]).plain, rows_of(images[train[::5]])
    missed = copies.find_copies(planted, rows_of(images[val]), names[val], rows, patients)
    assert missed.suspects.sum() == 0, "without knowing it, the second name hides the first"
    people = copies.people(patients, copies.fingerprints(images[twice][:, None]))
    assert copies.find_copies(planted, rows_of(images[val]), names[val], rows, people).suspects.mean() > 0.9


# --- membership -------------------------------------------------------------------------------------------------------


def test_the_area_is_that_of_another_implementation() -> None:
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(0)
    for _ in range(20):
        scores, is_member, weights = generator.integers(0, 6, 40) / 5, generator.uniform(size=40) < 0.4, generator.integers(0, 3, 40).astype(float)
        assert binary_area(scores, is_member, weights) == pytest.approx(roc_auc_score(is_member, scores, sample_weight=weights))
    assert binary_area(np.arange(3.0), np.array([True, True, False]), np.array([1.0, 1, 0])) is None


def test_the_rate_counts_members_above_what_1_percent_of_the_others_exceed() -> None:
    scores = np.concatenate([np.arange(200) / 200, [0.9925, 0.994, 0.5, 2.0]])
    is_member = np.arange(204) >= 200
    # 2 of 200 others (0.99 and 0.995) may be exceeded: the threshold is 0.985
    assert membership.true_positive_rate(scores, is_member, np.ones(204)) == pytest.approx(3 / 4)
    twice = np.concatenate([np.full(200, 2.0), np.ones(4)])
    assert membership.true_positive_rate(scores, is_member, twice) == pytest.approx(3 / 4)
    assert membership.true_positive_rate(np.ones(204), is_member, np.ones(204)) == 0, "ties are no sign"
    assert membership.by_slice(scores, is_member, np.arange(204), 1).true_positive_rate is not None
    assert membership.by_slice(scores[101:], is_member[101:], np.arange(103), 1).true_positive_rate is None


def test_both_sides_have_equally_many_of_each_position_and_class() -> None:
    generator = np.random.default_rng(0)
    positions = generator.integers(0, 50, 300), generator.integers(20, 90, 200)
    labels = np.array(["a", "b"])[generator.integers(0, 2, 300)], np.array(["a", "b", "c"])[generator.integers(0, 3, 200)]
    kept = membership.matched(positions, labels, 60, 1, "test")
    assert len(kept[0]) == len(kept[1]) and 40 < len(kept[0]) < 80
    first, second = (side[places] for side, places in zip(labels, kept, strict=True))
    assert sorted(first) == sorted(second) and set(second) == {"a", "b"}
    assert abs(np.mean(positions[0][kept[0]]) - np.mean(positions[1][kept[1]])) < 3
    assert np.mean(positions[1]) - np.mean(positions[0]) > 20, "which they were not before"


def test_nobody_is_a_reference_for_himself() -> None:
    patients = np.repeat(np.arange(10), 4)
    folds = membership.folds(patients, 1, "test")
    assert all(len(set(folds[patients == name])) == 1 for name in range(10)) and folds.sum() == 20
    rows = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    scores = membership.image_scores(rows, folds, rows[:1] + 100, rows, folds)
    assert (scores > 0).all(), "a slice that is its own reference would lie at distance 0"


def attacked(store: SliceStore, synthetic: np.ndarray, seed: int = 1) -> membership.Inferred:
    """Training patients against those of val and test, with their pixels."""
    patients, images = store.rows["patient"].to_numpy(), store.images("bravo", np.arange(len(store.rows)))
    train, others = store.select("train"), np.concatenate([store.select("val"), store.select("test")])
    rows, folds = rows_of(images).plain, membership.folds(patients, seed, "test")
    both = np.concatenate([train, others])
    scores = membership.image_scores(rows[both], folds[both], rows_of(synthetic).plain, rows[others], folds[others])
    return membership.by_patient(scores, np.arange(len(both)) < len(train), patients[both], seed)


def test_a_set_of_training_images_gives_its_patients_away_and_one_of_strangers_does_not(heads: SliceStore, cache: Path) -> None:
    remembered = attacked(heads, PLANTED["blurred"](heads.images("bravo", heads.select("train"))))
    assert remembered.auc.value is not None and remembered.auc.value > 0.95
    assert (remembered.members, remembered.others, remembered.true_positive_rate) == (10, 10, None)
    others = open_store(DataSpec(format="phantom", patients=8, size=SIZE, every=3), fake_run.SEED + 1, cache, fake_run.quiet)
    strangers = attacked(heads, others.images("bravo", np.arange(len(others.rows))))
    assert strangers.auc.interval is not None and strangers.auc.interval[0] < 0.5 < strangers.auc.interval[1]


def test_a_diffusion_model_tells_the_images_that_it_was_overfitted_to(heads: SliceStore) -> None:
    config = models.config_class("diffusion").model_validate({
        "strategy": "rflow", "epochs": 1, "batch_size": 6, "channels": [16, 32], "attention": [False, False], "head_channels": 8, "lr": 3e-3,
        "warmup_epochs": 0, "ema": {"beta": 0.5, "update_after_step": 1, "update_every": 1},
    })  # fmt: skip
    middle = np.flatnonzero(heads.rows["slice"] == int(heads.rows["slice"].median()))
    channels = {name: torch.from_numpy(array[:, None, ::2, ::2].astype(np.float32)) for name, array in
                {"bravo": heads.images("bravo", middle), "seg": heads.masks(middle)}.items()}
    is_member = np.arange(20) < 6
    model = build_model("diffusion", config, DataShape(("bravo", "seg"), SIZE // 2), 1, "test")

    def area() -> float:
        found = binary_area(model.attack_scores(Batch(channels, list(range(20)), 1)).double().numpy(), is_member, np.ones(20))
        assert found is not None
        return found

    before = area()
    where = Context(Ranks(0, 1, 0, torch.device("cpu")), "fp32", None)
    where.total_steps, where.steps_per_epoch = 200, 200.0
    members = {name: tensor[:6] for name, tensor in channels.items()}
    for where.step in range(200):
        model.step(Batch(members, list(range(6 * where.step, 6 * where.step + 6)), 1), where)
    assert area() > 0.85
    assert 0.2 < before < 0.8


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(fake: tuple[RunDir, SliceStore], tmp_path: Path) -> RunDir:
    return RunDir(shutil.copytree(fake[0].root, tmp_path / fake[0].run_id))


def evaluated(run: RunDir, stage: str, cache: Path, say: Callable[[str], None] = fake_run.quiet) -> dict:
    record: dict = files.read_json(evaluate_run(run, stage, cache, say, lambda *_: None)[0])
    return record


def found(record: dict, metric: str) -> dict[str, dict]:
    return {score["channel"]: score for score in record["scores"] if score["metric"] == metric}


def test_a_set_of_copies_is_found_listed_and_told(run: RunDir, fake: tuple[RunDir, SliceStore], cache: Path) -> None:
    said: list[str] = []
    record = evaluated(run, "evaluate_images", cache, said.append)  # its images are blurred training slices
    near = found(record, "near_train")["bravo"]
    assert near["value"] == 1 and near["floor"] < 0.1 and near["ci"][0] > 0.7
    assert found(record, "near_train_features")["bravo"]["floor"] < 0.1
    assert found(record, "authentic")["bravo"]["value"] < found(record, "authentic")["bravo"]["floor"]
    assert found(record, "closer_to_train")["bravo"]["floor"] == 0.5
    assert found(record, "membership_auc")["bravo, from the images"]["value"] > 0.8
    with open(run.suspects("evaluate_images"), newline="") as handle:
        suspects = list(csv.DictReader(handle))
    in_pixels = [line for line in suspects if line["space"] == "pixels"]
    assert len({line["synthetic"] for line in in_pixels}) == 16
    train = fake[1].aliases[fake[1].select("train")]
    assert all(line["real"] in train and float(line["ratio"]) < float(line["threshold"]) for line in suspects)
    assert len(record["details"]["copies"]) == 16 and record["details"]["copies"][0]["is_suspect"]
    assert record["privacy"]["guarantee"] is None
    assert "is not there; generate anew" in record["skipped"]["membership from the model"]
    sentences = privacy.in_words(record["privacy"])
    assert sentences[0].startswith("16 suspected copies at threshold 0.") and sentences[-1] == "No DP guarantee."
    assert set(sentences) <= set(said)


def test_strangers_are_no_copies_and_the_words_name_the_threshold(run: RunDir, cache: Path) -> None:
    files.write_json(run.outcome_file("train_bravo", 0), {
        **files.read_json(run.outcome_file("train_bravo", 0)), "facts": {"privacy": issue("patient", 1000, 1, (Mechanism(0.02, 1.5, 1000),), 1.0, 1e-5).record()},
    })  # fmt: skip
    record = evaluated(run, "evaluate_pairs", cache)  # blurred slices of test patients, on their masks
    assert found(record, "near_train")["bravo"]["value"] == 0
    threshold = record["privacy"]["searches"][0]["threshold"]
    sentences = privacy.in_words(record["privacy"])
    assert sentences[0] == f"No copies found at threshold {threshold:.3f} (pixels) among 16 images."
    assert re.fullmatch(r"Trained with differential privacy: epsilon 1\.978 at delta 1e-05 per patient; no attack may reach an AUC above 0\.8\d+\.", sentences[-1]), sentences[-1]
    # whose masks were given is attacked on neither side: of the held-out patients too few are left
    assert "that no image was conditioned on" in record["skipped"]["membership"]
    assert found(record, "membership_auc") == {}


def test_an_attack_that_does_better_than_epsilon_allows_breaks_the_guarantee() -> None:
    """Planted: a card that promises what the model does not keep."""
    attack = {"unit": "patient", "attack": "model", "auc": {"value": 0.8, "interval": [0.7, 0.9]}}
    record = {"searches": [], "membership": [attack], "guarantee": {"epsilon": 0.3, "delta": 1e-5, "unit": "patient", "auc_at_most": 0.58}}
    assert privacy.in_words(record)[-1].endswith("AUC above 0.5800. One does, with 0.70 at the least: this guarantee does not hold. "
                                                 "Do not give the model or its images away, and look for the mistake in its training.")  # fmt: skip
    for kept in ({**attack, "auc": {"value": 0.6, "interval": [0.57, 0.7]}}, {**attack, "auc": {"value": 0.9, "interval": None}}):
        assert privacy.in_words({**record, "membership": [kept]})[-1].endswith("no attack may reach an AUC above 0.5800.")


def test_held_out_slices_that_were_trained_on_are_left_out_and_told(run: RunDir, fake: tuple[RunDir, SliceStore], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fake[1]
    val, train = store.select("val", positive_only=True), store.select("train", positive_only=True)
    shown = store.images("bravo", np.arange(len(store.rows)))
    shown[val[:3]] = shown[train[:3]]
    monkeypatch.setattr(SliceStore, "images", lambda self, channel, rows: shown[rows].copy())
    search = evaluated(run, "evaluate_images", cache)["privacy"]["searches"][0]
    assert search["held_out_slices_left_out"] == 3
    assert search["threshold"] > 0


def test_masks_are_searched_where_they_are_and_not_merged(run: RunDir, cache: Path) -> None:
    record = evaluated(run, "evaluate_masks", cache)
    assert found(record, "near_train_features") == {}
    assert "near_train" in record["skipped"] or record["privacy"]["searches"][0]["training_patients_taken_for_another"] == 0
    assert found(record, "membership_auc")["seg, from the images"]["n"] > 10


def test_the_model_that_drew_the_images_is_asked(run: RunDir, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "MOST_WITH_MODEL", 40)
    raw = {"model": "diffusion", **models.config_class("diffusion").examples()["rflow_bravo"]}
    config = models.config_class("diffusion").model_validate({key: value for key, value in raw.items() if key != "model"})
    model = build_model("diffusion", config, DataShape(config.input_channels, SIZE), 1, "test")
    objects = {f"modules.{name}": module.state_dict() for name, module in model.modules().items()}
    saved = checkpoint.save(run.checkpoints("train_bravo"), 5, objects, {"config": raw, "size": SIZE, "classes": []}, {})
    index, manifest = run.dataset("images") / "index.csv", run.dataset("images") / "manifest.json"
    index.write_text(index.read_text().replace("c0ffee" * 10, saved.sha256))
    files.write_json(manifest, {**files.read_json(manifest), "index_sha256": files.sha256_file(index)})
    record = evaluated(run, "evaluate_images", cache)
    asked = found(record, "membership_auc")["bravo, from the model"]
    assert asked["ci"][0] < 0.5 < asked["ci"][1], "it was not trained"
    assert "step-" in asked["protocol"]
    of_model = [item for item in record["privacy"]["membership"] if item["attack"] == "model"]
    assert [item["unit"] for item in of_model] == ["slice", "patient"] and 30 < of_model[0]["others"] < 60
    assert "cannot show 1% false positives" in record["skipped"]["membership_tpr from the model"]
    assert "bravo, from the model" not in found(record, "membership_tpr")


PROMISES = re.compile(r"\b(private|privately|safe|safely|anonymous|anonymi[sz]ed|privacy[- ]preserving)\b", re.IGNORECASE)


def test_nothing_that_is_said_promises_anything() -> None:
    """Distance tests that find nothing have been passed by sets that leak: the words are "no copies found at threshold t"."""
    sources = [*(REPOSITORY / "medgen" / "evaluate").glob("*.py"), *(REPOSITORY / "medgen" / "report").glob("*.py")]
    texts = {str(path): [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant) and isinstance(node.value, str)] for path in sources}
    texts |= {str(path): [path.read_text()] for path in [*(REPOSITORY / "medgen" / "report").glob("*.html"), REPOSITORY / "docs" / "privacy.md"]}
    assert len(texts) > 20
    assert {name: PROMISES.findall(text) for name, of_file in texts.items() for text in of_file if PROMISES.search(text)} == {}
    examples = [{"guarantee": None, "membership": [], "searches": [{"space": "pixels", "threshold": 0.5, "images": 10, "of_images": count, "suspects": suspects, "floor": 0.01}]}
                for count in (10, 20) for suspects in (0, 1, 2)]
    assert [sentence for record in examples for sentence in privacy.in_words(json.loads(json.dumps(record))) if PROMISES.search(sentence)] == []
