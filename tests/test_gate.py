"""The quality gate: closed forms of its measures, planted distortions, refusals, and a job whose model draws good and bad images."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
from conftest import TINY_NET, tiny_spec
from scipy.ndimage import gaussian_filter
from test_pipeline import Medgen, WriteSpec, only_run, tree

from medgen import files, spec
from medgen.data.store import SliceStore, open_store
from medgen.errors import InputError
from medgen.gate import accounts, fit, measures, subspace
from medgen.gate.bounds import Bounds, Column, Quantiles
from medgen.gate.judge import Gate
from medgen.gate.measures import Measured
from medgen.spec_accept import RULES, AcceptImages
from medgen.spec_data import DataSpec, Window

LEVEL = 0.1


# measures


def disc(size: int = 64, radius: float = 20, row: float = 31.5, column: float = 31.5) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    return ((rows - row) ** 2 + (columns - column) ** 2 <= radius**2).astype(np.float64)


def of(name: str, image: np.ndarray) -> float:
    return next(item for item in measures.MEASURES if item.name == name).of(Measured.of(image, LEVEL))


def test_measures_of_shape_have_closed_forms() -> None:
    whole = disc()
    pixels = whole.sum()
    assert of("foreground_share", 0.8 * whole) == pytest.approx(np.log10(pixels / 64**2 + 1e-4))
    assert of("mean_inside", 0.8 * whole) == pytest.approx(0.8) and of("spread_inside", 0.8 * whole) == pytest.approx(0)
    ring = whole - disc(radius=8)
    assert of("hole_share", ring) == pytest.approx(disc(radius=8).sum() / pixels) and of("hole_share", whole) == 0
    bitten = whole.copy()
    bitten[:, 31:33] = 0
    assert of("hole_share", bitten) == 0, "what is open to the outside is no hole"
    assert of("beside_largest", bitten) == pytest.approx(0.5)
    two = disc(radius=10, column=16) + disc(radius=5, column=48)
    assert of("beside_largest", two) == pytest.approx(disc(radius=5).sum() / two.sum(), rel=0.1)
    assert of("asymmetry", whole) == 0 and of("asymmetry", np.where(np.arange(64) < 32, whole, 0)) == pytest.approx(1)
    assert of("off_centre_rows", disc(row=31.5 + 6.4)) == pytest.approx(0.1, abs=0.005) and of("off_centre_columns", disc(column=31.5 - 6.4)) == pytest.approx(-0.1, abs=0.005)
    assert of("border_share", np.ones((8, 8))) == 1 and of("border_share", whole) == 0
    assert 0.8 < of("rough_outline", whole) < 1.1 < of("rough_outline", np.where(np.arange(64)[:, None] % 4 < 2, whole, 0))
    assert of("white_share", whole) == pytest.approx(pixels / 64**2)


def test_measures_of_texture_have_closed_forms() -> None:
    generator = np.random.default_rng(3)
    inside = disc(radius=28) * 0.5
    for sigma in (0.02, 0.08):
        assert of("grain", inside + sigma * generator.normal(size=(64, 64)) * (inside > 0)) == pytest.approx(sigma, rel=0.1), "the standard deviation that was planted"
    steep = np.tile(np.linspace(0.2, 0.9, 64), (64, 1))
    assert of("grain", steep) == pytest.approx(0, abs=1e-12), "a slope is no noise"
    salt = inside.copy()
    salt[10::9, 10::9] = 1
    assert of("spikes", salt) == pytest.approx((salt[10::9, 10::9] - inside[10::9, 10::9] > 0.25).sum() / 64**2)
    # two waves of equal power, one below and one above half the Nyquist frequency, of 4 pixels
    row = np.arange(64)
    waves = 0.5 + 0.1 * np.sin(2 * np.pi * row / 16)[:, None] + 0.1 * np.sin(2 * np.pi * row / 3.2)[None]
    assert of("fine_share", waves) == pytest.approx(np.log10(0.5), abs=0.02)
    assert of("fine_share", np.full((64, 64), 0.5)) == pytest.approx(0, abs=1e-6), "an image without any power is not called blurred"
    assert of("direction", np.tile(row[:, None] / 63, (1, 64))) > 5 and of("direction", np.tile(row / 63, (64, 1))) < -5
    smooth = gaussian_filter(generator.random((64, 64)), 3)
    smooth = (smooth - smooth.min()) / np.ptp(smooth) * 0.3 + 0.3
    broken = np.concatenate([smooth[:32], smooth[32:] + 0.3])
    assert of("seam", broken) > 5 * of("seam", smooth) and of("seam", broken.T) == of("seam", broken)


def test_edges_agree_where_channels_are_registered() -> None:
    generator = np.random.default_rng(4)
    anatomy = np.stack([gaussian_filter(generator.normal(size=(64, 64)), 3) for _ in range(3)])
    other_contrast = 0.7 - 2 * anatomy
    assert measures.edges_agree(anatomy, other_contrast) == pytest.approx(1)
    moved = measures.edges_agree(anatomy, np.roll(other_contrast, 4, axis=2))
    assert (moved < 0.6).all()
    assert (measures.edges_agree(anatomy, anatomy[[1, 2, 0]]) < 0.3).all()
    assert measures.edges_agree(anatomy, np.zeros_like(anatomy)).tolist() == [1, 1, 1], "nothing to compare: other rules tell that"


def test_the_subspace_shows_what_it_was_fitted_to_and_nothing_else() -> None:
    generator = np.random.default_rng(5)
    shapes = np.stack([gaussian_filter(generator.normal(size=(16, 16)), 2).ravel() for _ in range(3)])
    known = (generator.normal(size=(200, 3)) @ shapes + 0.5).astype(np.float32)
    fitted = subspace.fit(known)
    assert fitted.components.shape[1] <= 3
    strange = known[:1] + 0.0
    strange.reshape(16, 16)[4:6, 4:6] += 0.4
    whole, part = fitted.unlike(strange)[0]
    assert part == pytest.approx(0.4, rel=0.25), "the part where it differs"
    assert whole == pytest.approx(0.4 * 2 / 16, rel=0.25) and fitted.unlike(known)[:, 0].max() < whole / 2


def test_bounds_are_quantiles_moved_outwards() -> None:
    item = measures.MEASURES[1]
    columns = [Column("t1", measures.MEASURES[0]), Column("t1", item)]
    values = np.stack([np.zeros(100), np.linspace(0, 1, 100)], axis=1)
    low, middle, high = np.percentile(values[:, 1], [0.5, 50, 99.5])
    bounds = Quantiles.of(values, values[:, 0], columns).widened(0.5, columns)
    assert bounds.low[0, 1] == pytest.approx(low - 0.5 * (middle - low)) and bounds.high[0, 1] == pytest.approx(high + 0.5 * (high - middle))
    assert bounds.high[0, 0] == pytest.approx(0.05), "where slices do not vary, what nobody would see still passes"
    wide = Quantiles.of(np.linspace(-4, 0, 100)[:, None], np.zeros(100), columns[:1]).widened(4.0, columns[:1])
    assert wide.low[0, 0] == pytest.approx(np.percentile(np.linspace(-4, 0, 100), 0.5) - 0.5), "an empty image never passes, whatever the margin"
    assert np.array_equal(Bounds.from_json(json.loads(json.dumps(bounds.to_json(columns))), columns).low, bounds.low)


# a gate on phantoms

PHANTOMS = {"format": "phantom", "patients": 10, "size": 32}


@pytest.fixture(scope="module")
def store(cache: Path) -> SliceStore:
    return open_store(DataSpec.model_validate(PHANTOMS), 42, cache, lambda _: None)


PAIR = ("t1_pre", "t1_gd")


@pytest.fixture(scope="module")
def gate(store: SliceStore, tmp_path_factory: pytest.TempPathFactory) -> Gate:
    return opened(store, tmp_path_factory.mktemp("gate"))


def opened(store: SliceStore, folder: Path, say: Callable[[str], None] = lambda _: None, **accept: Any) -> Gate:
    return fit.open_gate(fit.sources_of(store, PAIR, False, ("train",), False), AcceptImages(like="train", **accept), folder, say)


def held_out(store: SliceStore) -> dict[str, np.ndarray]:
    rows = store.select("test")
    return {channel: store.images(channel, rows) for channel in PAIR}


def planted(images: np.ndarray, kind: str) -> np.ndarray:
    """Distorted images [n, H, W]."""
    generator = np.random.default_rng(6)
    half = images.shape[1] // 2
    found = images.copy()
    if kind == "noise":
        found = np.clip(images + 0.12 * generator.normal(size=images.shape), 0, 1)
    elif kind == "blur":
        found = np.stack([gaussian_filter(image, 1.5) for image in images])
    elif kind == "blank":
        found = 0.04 * images
    elif kind == "half missing":
        found[:, :, half:] = 0
    elif kind == "washed out":
        found = 0.5 * images + 0.3
    elif kind == "doubled":
        found = np.maximum(images, np.roll(images, half // 2, axis=2))
    elif kind == "salt":
        found[generator.random(images.shape) < 0.04] = 1
    elif kind == "off centre":
        found = np.roll(images, 10, axis=1)
    return found.astype(np.float32)


CAUGHT = {"noise": "noise", "blur": "blur", "blank": "blank", "half missing": "shape", "washed out": "outside", "doubled": "shape", "salt": "noise", "off centre": "outside"}


@pytest.mark.parametrize("kind", CAUGHT)
def test_planted_distortions_are_named(store: SliceStore, gate: Gate, kind: str) -> None:
    real = held_out(store)
    verdicts = gate.judge({"t1_pre": real["t1_pre"], "t1_gd": planted(real["t1_gd"], kind)}, [""] * len(real["t1_gd"]))
    named = np.mean([CAUGHT[kind] in verdict.rules for verdict in verdicts])
    assert named > 0.8, f"{kind}: {named:.2f}"
    reason = next(reason for reason in verdicts[0].reasons if reason["rule"] == CAUGHT[kind])
    assert reason["low"] is None or reason["high"] is None or not reason["low"] <= reason["value"] <= reason["high"]


def test_held_out_slices_pass_and_unregistered_channels_do_not(store: SliceStore, gate: Gate) -> None:
    real = held_out(store)
    names = [""] * len(real["t1_gd"])
    assert np.mean([bool(verdict.rules) for verdict in gate.judge(real, names)]) <= 0.05, "of two patients whom nobody has seen"
    moved = gate.judge({"t1_pre": real["t1_pre"], "t1_gd": np.roll(real["t1_gd"], 2, axis=1)}, names)
    assert np.mean(["registration" in verdict.rules for verdict in moved]) > 0.9
    told = gate.record["held_out"]
    assert told["split"] == "val" and told["slices"] == len(store.select("val")) and told["rejected"] <= 0.05 * told["slices"]


def test_the_gate_is_kept_by_content_and_mended(store: SliceStore, gate: Gate, tmp_path: Path) -> None:
    first = opened(store, tmp_path)
    assert first.record == gate.record and files.own_hash_holds(first.record), "fitted again, the same to the last bit"
    (kept,) = tmp_path.glob("gate-*")
    before = tree(kept)
    (kept / "mean_t1_gd.npy").write_bytes(b"damaged")
    assert opened(store, tmp_path).record == gate.record and tree(kept) == before
    said: list[str] = []
    wide = opened(store, tmp_path, said.append, margin=50.0, rules=["blank", "noise"])
    assert len(list(tmp_path.glob("gate-*"))) == 2 and wide.rules == ("blank", "noise") and "margin 50 (as asked)" in said[0]
    empty = {channel: np.zeros((1, 32, 32), dtype=np.float32) for channel in PAIR}
    assert wide.judge(empty, [""])[0].rules == ("blank",), "whatever the margin"
    with pytest.raises(InputError, match="training slices are too few"):
        fit.sources_of(SliceStore(store.rows[:5], store.channels, 32, "x", store.folder, True, []), PAIR, False, ("train",), False)


def test_shards_that_start_together_fit_one_gate(store: SliceStore, tmp_path: Path) -> None:
    """Each in a thread of its own on a fresh cache, again and again: a gate that one reads is not taken away by another."""
    from concurrent.futures import ThreadPoolExecutor

    sources = fit.sources_of(store, tuple(store.channels[:1]), False, (), False)
    for attempt in range(3):
        with ThreadPoolExecutor(6) as pool:
            opened = [pool.submit(fit.open_gate, sources, AcceptImages(like="train", margin=2.0), tmp_path / str(attempt), lambda text: None) for _ in range(6)]
        assert len({json.dumps(one.result().record, sort_keys=True) for one in opened}) == 1


def test_what_was_trained_on_is_not_called_held_out(store: SliceStore) -> None:
    assert fit.sources_of(store, PAIR, False, ("train", "val"), False).held_out_split == "test"
    everything = fit.sources_of(store, PAIR, False, ("train", "val", "test"), False)
    assert everything.held_out_split == "" and len(everything.held_out) == 0


def test_an_image_is_judged_as_one_of_its_class(tmp_path: Path) -> None:
    """Bright and dark discs; of a third class there are too few, so it may look like any of them."""
    generator = np.random.default_rng(8)
    rows = []
    for number in range(230):
        label = "rare" if number >= 220 else ("bright", "dark")[number % 2]
        image = disc(16, radius=5, row=8, column=8) * (0.9 if label == "bright" else 0.4) * (1 + 0.02 * generator.normal())
        nibabel.save(nibabel.Nifti1Image(image[:, :, None].astype(np.float32), np.eye(4)), tmp_path / f"{number}.nii.gz")
        rows.append({"t1": f"{number}.nii.gz", "patient": f"p{number // 10}", "label": label, "split": "train" if number < 200 or number >= 220 else "val"})
    pd.DataFrame(rows).to_csv(tmp_path / "all.csv", index=False)
    data = DataSpec(format="csv", root=tmp_path / "all.csv", images={"t1": "t1"}, size=16, window=Window(fixed=(0.0, 1.0)))
    store = open_store(data, 1, tmp_path / "cache", lambda _: None)
    gate = fit.open_gate(fit.sources_of(store, ("t1",), False, ("train",), True), AcceptImages(like="train", rules=("contrast",)), tmp_path, lambda _: None)
    assert gate.record["classes_with_own_bounds"] == ["bright", "dark"] and gate.record["held_out"]["rejected"] == 0
    dark = np.stack([disc(16, radius=5, row=8, column=8) * 0.4] * 3).astype(np.float32)
    assert [verdict.rules for verdict in gate.judge({"t1": dark}, ["dark", "bright", "rare"])] == [(), ("contrast",), ()]


def test_only_a_measure_in_which_patients_differ_gets_room() -> None:
    rejected = np.zeros((4, 100, 3), dtype=bool)  # margins, slices, measures
    rejected[:2, :10, 1] = rejected[2, :3, 1] = True  # the second: 10 slices at the first two margins, 3 at the third, none at the last
    steps, left = fit._margin_steps(rejected)
    assert steps.tolist() == [0, 3, 0] and left == 0
    rejected[3, :5, 1] = True
    assert fit._margin_steps(rejected)[0].tolist() == [0, 3, 0] and fit._margin_steps(rejected)[1] == 5, "no wider margin is left: it is told"


# the spec

IMAGES = {"kind": "generate", "from": "train_bravo", "condition": "test", "count": 4}
REFUSED = [
    ({"accept": {"min_pixels": 2}}, "min_pixels, max_fraction and tries alone judge masks, and the model of train_bravo makes images; write accept: {like: train}"),
    ({"accept": {}}, "write accept: {like: train}"),
    ({"accept": {"like": "train", "max_fraction": 0.2}}, "max_fraction judges masks, and like: train judges images; remove one of them"),
    ({"accept": {"margin": 2.0}}, "margin judges images, and only beside like: train"),
    ({"accept": {"like": "val"}}, "accept.like: input should be 'train', got 'val'"),
    ({"accept": {"like": "train", "rules": ["blnk"]}}, "got 'blnk'"),
    ({"accept": {"like": "train", "rules": []}}, "name each rule once, and one at least"),
    ({"accept": {"like": "train", "rules": ["blank", "blank"]}}, "name each rule once"),
    ({"accept": {"like": "train", "rules": ["registration"]}}, "registration compares channels, and the model of train_bravo makes bravo alone"),
    ({"accept": {"like": "train", "tries": 0}}, "greater than or equal to 1"),
    ({"accept": {"like": "train", "trys": 3}}, "unknown key 'trys'; the keys that judge images are: like, margin, rules, tries"),
    ({"from": "train_seg", "condition": None, "accept": {"like": "train"}}, "like: train judges images, and the model of train_seg makes masks"),
]


@pytest.mark.parametrize(("changes", "told"), REFUSED, ids=lambda value: str(value)[:40])
def test_keys_without_effect_are_refused_by_name(write_spec: WriteSpec, changes: dict[str, Any], told: str) -> None:
    full = tiny_spec()
    stage = {key: value for key, value in {**IMAGES, **changes}.items() if value is not None}
    path = write_spec({**full, "stages": {**{name: full["stages"][name] for name in ("train_seg", "train_bravo")}, "images": stage}})
    with pytest.raises(InputError) as error:
        spec.load(path)
    assert told in str(error.value) and "accept" in str(error.value)


def test_the_resolved_form_is_read_again(write_spec: WriteSpec) -> None:
    full = tiny_spec()
    stages = {name: full["stages"][name] for name in ("train_seg", "train_bravo")} | {"images": {**IMAGES, "accept": {"like": "train"}}, "masks": full["stages"]["masks"]}
    checked = spec.load(write_spec({**full, "stages": stages}))
    for name in ("images", "masks"):
        stages[name]["accept"] = checked.stages[name].model_dump(mode="json")["accept"]
    again = spec.load(write_spec({**full, "stages": stages}))
    assert again == checked and again.stages["images"].accept.rules_of(1) == RULES[:-1] and again.stages["images"].accept.rules_of(2) == RULES  # type: ignore[union-attr]


# accounts


def test_shares_in_words() -> None:
    counts = {"drawn": 16_012, "accepted": 15_019, "rejected": 993, "rejected_blank": 496, "rejected_noise": 320, "rejected_blur": 0}
    assert accounts.in_words(counts) == "6.2% of 16,012 drawn images were rejected (blank 3.1%, noise 2.0%)"
    assert accounts.alarm(counts) is None
    many = accounts.alarm({"drawn": 10, "accepted": 7, "rejected": 3, "rejected_blur": 3})
    assert many is not None and "more than 20.0%" in many and "not trained enough" in many
    assert accounts.held_out_in_words({"held_out": {"split": "val", "slices": 500, "patients": 5, "rejected": 3, "by_rule": {}}}) == "of 500 real val slices 0.6%"


# a whole job: a strategy that draws the training slices of a phantom, and now and then something else

HALF_BROKEN = """
import numpy as np, os, torch
from medgen.models.diffusion.strategies import RFlow

class Recalled(RFlow):
    "Returns a real slice with a little noise; {share} of the drawings are noise or nothing instead."

    def sample(self, predict, noise, shape, settings):
        slices = torch.from_numpy(np.load({slices!r}))
        luck = torch.special.ndtr(noise.normal((2,)))
        drawn = slices[(luck[:, 0] * len(slices)).long()][:, None] + 0.004 * noise.normal(shape)
        broken = torch.where(luck[:, 1].view(-1, 1, 1, 1) < {share} / 2, -torch.ones_like(drawn), 0.6 * noise.normal(shape))
        return torch.where(luck[:, 1].view(-1, 1, 1, 1) < {share}, broken, drawn)
"""


@pytest.fixture
def job(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A spec whose model draws bad images with a known frequency; the plugin lies in the folder of the submit."""

    def write(share: float, **stage: Any) -> dict[str, Any]:
        store = open_store(DataSpec.model_validate(PHANTOMS), 42, cache, lambda _: None)
        slices = tmp_path / "slices.npy"
        np.save(slices, store.images("bravo", store.select("train")) * 2 - 1)
        (tmp_path / "half_broken.py").write_text(HALF_BROKEN.format(slices=str(slices), share=share))
        monkeypatch.syspath_prepend(str(tmp_path))
        images = {"kind": "generate", "from": "train", "condition": "test", "count": 40, "chunk": 4, "sampling": {"steps": 1}, "accept": {"like": "train"}, **stage}
        train = {"kind": "train", "config": {**TINY_NET, "strategy": "half_broken:Recalled", "mode": "bravo", "epochs": 0.1, "warmup_epochs": 0.01}, "resources": {"cpus": 1}}
        return {"version": 1, "name": "gated", "data": PHANTOMS, "stages": {"train": train, "images": images, "report": {"kind": "report"}}}

    return write


def dataset_of(run: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    folder = run / "images" / "dataset"
    return pd.read_csv(folder / "index.csv", keep_default_na=False), json.loads((folder / "manifest.json").read_text())


def forget(run: Path) -> None:
    """The images and all that follows count as not made."""
    shutil.rmtree(run / "images")
    for stage in ("images", "collect_images"):
        for path in [*(run / "outcome").glob(f"{stage}.*"), *(run / "hb").glob(f"{stage}.*")]:
            path.unlink()


def test_bad_images_are_drawn_again_and_every_one_is_told(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, job: Callable[..., dict[str, Any]], environment: dict[str, str]) -> None:
    """With 1 shard; with 3, one killed in the middle: the same bytes. Counts, entries, pictures, report, card and alarm agree."""
    path = write_spec(job(0.35))
    said = medgen("submit", path, "--local").stdout
    run = only_run(tmp_path)
    index, manifest = dataset_of(run)
    counts, gate = manifest["counts"], manifest["gate"]
    assert counts["drawn"] == index["tries"].sum() and counts["accepted"] == 40 and counts["rejected"] == counts["drawn"] - 40
    assert 0.2 < counts["rejected"] / counts["drawn"] < 0.6, "about every third drawing was bad"
    assert counts["rejected_blank"] > 0 and counts["rejected_noise"] > 0
    assert [len(text.split("; ")) if text else 0 for text in index["rejected_for"]] == (index["tries"] - 1).tolist()
    assert gate["held_out"]["split"] == "val" and gate["held_out"]["rejected"] <= 0.05 * gate["held_out"]["slices"] and files.own_hash_holds(gate)

    shard = json.loads((run / "images" / "shards" / "00000" / "manifest.json").read_text())
    shown = shard["rejected_shown"]
    assert len(shown) == 8 and shown == sorted(shown, key=lambda item: (item["index"], item["attempt"]))
    again = nibabel.load(run / "images" / "shards" / "00000" / shown[0]["files"]["bravo"]["path"])
    assert np.asarray(again.dataobj).shape[:2] == (32, 32) and shown[0]["reasons"][0]["rule"] in shown[0]["rules"]
    assert not (run / "images" / "dataset" / "rejected").exists(), "whoever takes the dataset takes no rejected image with it"

    told = accounts.in_words(counts)
    (alarm,) = [event for event in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if event["event"] == "many_rejected"]
    assert told in alarm["cause"] and alarm["stage"] == "images" and told in said
    page, card = (run / "report" / "index.html").read_text(), (run / "report" / "dataset_card_images.md").read_text()
    for text in (page, card):
        assert told in text and accounts.held_out_in_words(gate) in text
    assert "Rejected" in page and "selected" in card

    expected = tree(run / "images" / "dataset")
    forget(run)
    killed = {**environment, "MEDGEN_FAULT": "site=shard.write,shard=1,attempt=0,nth=5,action=kill9", "MEDGEN_FAULT_LOG": str(tmp_path / "fired")}
    subprocess.run([sys.executable, "-m", "medgen", "submit", str(path), "-ostages.images.shards=3", "--local"], cwd=tmp_path, env=killed, capture_output=True, timeout=300)
    assert "shard.write" in (tmp_path / "fired").read_text()
    medgen("submit", path, "-ostages.images.shards=3", "--local")
    assert len(list((run / "images" / "shards").iterdir())) == 3 and only_run(tmp_path) == run
    assert tree(run / "images" / "dataset") == expected


def test_a_changed_picture_is_noticed_and_a_hopeless_stage_ends(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, job: Callable[..., dict[str, Any]]) -> None:
    """A rejected picture is verified like every file; a stage whose model draws nothing good ends after its tries, with the rule that is most against it."""
    full = job(0.5, count=8)
    del full["stages"]["report"]
    full["stages"]["hopeless"] = {**full["stages"]["images"], "count": 4, "accept": {"like": "train", "tries": 2, "margin": 0.0}, "sampling": {"steps": 2}}
    ended = medgen("submit", write_spec(full), "--local", expect=1)
    told = ended.stdout + ended.stderr
    assert "no acceptable image in 2 tries (so far" in told and "rejects most: train longer" in told and "out of accept.rules" in told and "Traceback" not in told
    run = only_run(tmp_path)
    assert len(dataset_of(run)[0]) == 8
    victim = next((run / "images" / "shards" / "00000" / "rejected").rglob("bravo.nii.gz"))
    victim.write_bytes(victim.read_bytes()[:-3])
    (run / "outcome" / "collect_images.0.json").unlink()
    shutil.rmtree(run / "images" / "dataset")
    failed = medgen("collect", run, "--stage", "collect_images", expect=1)
    assert "rejected/" in failed.stderr and "does not match its sha256" in failed.stderr
