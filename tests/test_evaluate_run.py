"""The evaluate stage on a run folder with phantoms and blurred phantoms as the synthetic side."""

import json
import shutil
from pathlib import Path

import fake_run
import numpy as np
import pytest

from medgen import files
from medgen.data.store import SliceStore, open_store
from medgen.errors import MedgenError
from medgen.evaluate.run import evaluate_run
from medgen.rundir import RunDir
from medgen.spec_data import DataSpec

COUNT = 12


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[RunDir, SliceStore]:
    return fake_run.full_run(tmp_path_factory.mktemp("fake"), cache, patients=8, size=32, count=COUNT)


@pytest.fixture
def run(fake: tuple[RunDir, SliceStore], tmp_path: Path) -> RunDir:
    """A copy that a test may damage."""
    return RunDir(shutil.copytree(fake[0].root, tmp_path / fake[0].run_id))


def evaluated(run: RunDir, stage: str, cache: Path) -> dict:
    progress: list[int] = []
    written = evaluate_run(run, stage, cache, fake_run.quiet, lambda step, total, unit: progress.append(step))
    assert written == [run.metrics(stage), run.suspects(stage)]
    assert progress == sorted(progress)
    return json.loads(written[0].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def value_of(record: dict, metric: str, channel: str = "bravo") -> dict:
    return next(score for score in record["scores"] if (score["metric"], score["channel"]) == (metric, channel))


def test_pairs_get_every_metric_beside_its_floor(run: RunDir, cache: Path) -> None:
    record = evaluated(run, "evaluate_pairs", cache)
    metrics = [score["metric"] for score in record["scores"]]
    assert metrics == ["mae", "mae_foreground", "mae_lesion", "psnr", "ssim", "ms_ssim", "ms_ssim_diversity", "swd"]
    assert all(score["floor"] is not None and score["protocol"] for score in record["scores"])
    # a blurred slice of the same patient is nearer than a sharp slice of a stranger
    assert value_of(record, "mae")["value"] < 0.5 * value_of(record, "mae")["floor"]
    assert value_of(record, "ssim")["value"] > value_of(record, "ssim")["floor"] + 0.2
    # and its patches are not those of real images
    finest = record["details"]["swd_levels"]["bravo"][0]
    assert finest["pixels"] == 32
    assert finest["value"] > 1.3 * finest["floor"]
    assert record["counts"]["pairs"] == COUNT
    assert record["positive_only"] is True


def test_few_patients_give_no_interval_and_say_so(run: RunDir, cache: Path) -> None:
    record = evaluated(run, "evaluate_pairs", cache)
    patients = record["counts"]["real_patients"]
    assert patients < 5
    assert value_of(record, "mae")["ci"] is None
    assert f"no interval: {patients} patient" in value_of(record, "mae")["protocol"]


def test_metrics_that_do_not_apply_are_listed_with_their_reason(run: RunDir, cache: Path) -> None:
    masks = evaluated(run, "evaluate_masks", cache)
    assert set(masks["skipped"]) >= {"mae", "psnr", "ssim", "ms_ssim"}
    assert "masks are drawn from nothing" in masks["skipped"]["mae"]
    assert [score["metric"] for score in masks["scores"]] == ["ms_ssim_diversity", "swd"]
    images = evaluated(run, "evaluate_images", cache)
    assert "conditions were not real slices" in images["skipped"]["psnr"]


def test_copied_training_slices_head_the_list_of_nearest_pairs(run: RunDir, fake: tuple[RunDir, SliceStore], cache: Path) -> None:
    record = evaluated(run, "evaluate_images", cache)  # its images are blurred training slices
    assert "held-out slices" in record["skipped"]["near_train"]
    rows = fake[1].rows.assign(alias=fake[1].aliases).set_index("alias")
    for pair in record["details"]["copies"]:
        assert pair["ratio"] < 0.6
        assert rows.loc[pair["real"], "split"] == "train"


def test_generation_facts_and_inputs_are_recorded(run: RunDir, fake: tuple[RunDir, SliceStore], cache: Path) -> None:
    record = evaluated(run, "evaluate_masks", cache)
    assert record["generation"] == {"accepted": COUNT, "rejected_empty": 3, "rejected_large": 1}
    assert record["inputs"]["data_fingerprint"] == fake[1].fingerprint
    assert record["inputs"]["dataset_index_sha256"] == files.sha256_file(run.dataset("masks") / "index.csv")
    assert record["counts"]["synthetic"] == COUNT


def test_the_same_run_gives_the_same_bytes(run: RunDir, cache: Path) -> None:
    first = evaluated(run, "evaluate_images", cache)
    assert evaluated(run, "evaluate_images", cache) == first


def test_an_empty_mask_among_the_samples_widens_the_reference(run: RunDir, fake: tuple[RunDir, SliceStore], cache: Path) -> None:
    store = fake[1]
    masks = store.masks(store.select("train", positive_only=True)[:COUNT])
    masks[0] = 0
    shutil.rmtree(run.dataset("masks"))
    fake_run.write_dataset(run, "masks", {"seg": masks}, None, "none")
    record = evaluated(run, "evaluate_masks", cache)
    assert record["positive_only"] is False
    assert record["counts"]["real"] == len(store.select("test"))


def test_dual_images_are_scored_per_channel_and_for_their_difference(tmp_path: Path, cache: Path) -> None:
    data = DataSpec(format="phantom", patients=8, size=16, images={"t1_pre": "t1_pre.nii.gz", "t1_gd": "t1_gd.nii.gz"}, mask="seg.nii.gz")
    store = open_store(data, fake_run.SEED, cache, fake_run.quiet)
    run = fake_run.make_run(tmp_path, data, [
        fake_run.planned("train", "train", [], {"config": {"model": "diffusion"}, "repeat": None}),
        fake_run.planned("dual", "generate", [], {"from": "train", "count": 20, "condition": "test"}, 20),
        fake_run.planned("evaluate", "evaluate", [], {"of": "dual", "against": "test", "metrics": ["mae", "swd"], "extractor": None}),
    ])
    rows = store.select("test", positive_only=True)[np.arange(20) % 10]
    pre, gd = store.images("t1_pre", rows), store.images("t1_gd", rows)
    (run.root / "fingerprint").write_text(store.fingerprint)
    conditions = [str(name) for name in store.aliases[rows]]

    def difference(images: dict[str, np.ndarray]) -> float:
        shutil.rmtree(run.dataset("dual"), ignore_errors=True)
        fake_run.write_dataset(run, "dual", {**images, "seg": store.masks(rows)}, conditions, "real")
        record = evaluated(run, "evaluate", cache)
        assert value_of(record, "mae", "t1_gd")["value"] >= 0
        return value_of(record, "swd", "t1_gd - t1_pre")["value"]

    # channels that are each perfect, but of different slices
    assert difference({"t1_pre": pre, "t1_gd": np.roll(gd, 5, axis=0)}) > 2 * difference({"t1_pre": pre, "t1_gd": gd})


def test_a_changed_image_is_named_and_not_scored(run: RunDir, cache: Path) -> None:
    victim = run.dataset("images") / "bravo" / "000003.nii.gz"
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(MedgenError, match=r"sample images-000003: .*000003\.nii\.gz has changed since it was collected"):
        evaluated(run, "evaluate_images", cache)
    assert not run.metrics("evaluate_images").exists()


def test_a_missing_image_is_named(run: RunDir, cache: Path) -> None:
    (run.dataset("images") / "bravo" / "000005.nii.gz").unlink()
    with pytest.raises(MedgenError, match=r"sample images-000005: .* cannot be read: .*submit the spec again, it is collected anew"):
        evaluated(run, "evaluate_images", cache)


def test_a_stage_that_was_not_collected_is_told(run: RunDir, cache: Path) -> None:
    shutil.rmtree(run.dataset("images"))
    with pytest.raises(MedgenError, match="images has not been collected yet"):
        evaluated(run, "evaluate_images", cache)


def test_conditions_that_the_data_do_not_know_are_told(run: RunDir, cache: Path) -> None:
    index = run.dataset("pairs") / "index.csv"
    index.write_text(index.read_text().replace("real_", "someone_"))
    manifest = run.dataset("pairs") / "manifest.json"
    files.write_json(manifest, {**files.read_json(manifest), "index_sha256": files.sha256_file(index)})
    with pytest.raises(MedgenError, match=r"the condition someone_.* is no slice of the data"):
        evaluated(run, "evaluate_pairs", cache)


def test_images_of_another_size_are_refused(run: RunDir, cache: Path) -> None:
    shutil.rmtree(run.dataset("masks"))
    fake_run.write_dataset(run, "masks", {"seg": np.ones((4, 24, 24), np.uint8)}, None, "none")
    with pytest.raises(MedgenError, match="masks: images of 24x24, but the data have 32x32 pixels"):
        evaluated(run, "evaluate_masks", cache)


def test_images_of_one_patient_say_nothing_about_diversity(run: RunDir, fake: tuple[RunDir, SliceStore], cache: Path) -> None:
    store = fake[1]
    tested = store.select("test", positive_only=True)
    one = tested[store.rows["patient"].to_numpy()[tested] == store.rows["patient"].to_numpy()[tested[0]]]
    rows = one[np.arange(10) % len(one)]
    shutil.rmtree(run.dataset("pairs"))
    fake_run.write_dataset(run, "pairs", {"bravo": store.images("bravo", rows)}, [str(name) for name in store.aliases[rows]], "real")
    record = evaluated(run, "evaluate_pairs", cache)
    assert "one patient" in record["skipped"]["ms_ssim_diversity"]
    # identical images: no infinity in the file
    assert value_of(record, "psnr")["value"] > 90
