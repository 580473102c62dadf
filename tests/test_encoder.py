"""The encoder that an evaluation trains itself: what it finds, that it is trained once, and that a damaged one is made again."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from passing import features_of
from scipy.ndimage import gaussian_filter, shift

from medgen.errors import InputError
from medgen.evaluate import encoder_training, extractors
from medgen.evaluate.encoder import TrainingImages

ASKED = {"kind": "encoder", "size": 32, "steps": 60, "width": 8}


def blobs(patients: int, seed: int) -> np.ndarray:
    """Three slices of each patient, float32 [3 patients, 32, 32]."""
    generator = np.random.default_rng(seed)
    anatomy = np.repeat(gaussian_filter(generator.normal(size=(patients, 32, 32)), (0, 3, 3)), 3, axis=0)
    own = gaussian_filter(generator.normal(size=(3 * patients, 32, 32)), (0, 2, 2))
    return np.clip(0.5 + 3 * anatomy + 0.5 * own, 0, 1).astype(np.float32)


SLICES = blobs(24, 1)


def training(cache: Path, said: list[str]) -> TrainingImages:
    return TrainingImages(
        read=lambda rows: SLICES[rows], count=len(SLICES), groups=np.repeat([f"patient {number}" for number in range(24)], 3), size=32,
        fingerprint="blobs", cache=cache, seed=7, say=said.append,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoders")


@pytest.fixture(scope="module")
def extractor(cache: Path) -> extractors.Extractor:
    """Asked for twice at once: one of the two trains it."""
    said: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: extractors.load(ASKED, training(cache, said)), range(2)))
    assert len([line for line in said if "60 steps on 72 training slices at 32 px" in line]) == 1
    assert found[0].name == found[1].name
    return found[0]


def of(extractor: extractors.Extractor, images: np.ndarray) -> np.ndarray:
    found = features_of(extractor, images)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_an_altered_copy_is_nearer_to_its_original_than_other_patients_are(extractor: extractors.Extractor) -> None:
    originals = of(extractor, SLICES)
    noise = np.random.default_rng(3).normal(size=SLICES.shape)
    altered = np.stack([shift(image[:, ::-1], (1, 2), order=0, mode="nearest") for image in SLICES])
    copies = of(extractor, np.clip(1.1 * altered + 0.01 * noise, 0, 1).astype(np.float32))
    other_patient = np.arange(len(SLICES))[:, None] // 3 != np.arange(len(SLICES)) // 3
    apart = 1 - copies @ originals.T
    nearest_other = np.where(other_patient, apart, np.inf).min(axis=1)
    assert (apart.diagonal() < nearest_other).mean() > 0.9
    np.testing.assert_allclose(of(extractor, SLICES[:, ::-1, ::-1]), originals, atol=1e-4)


def test_the_features_are_standardised_over_the_training_slices(extractor: extractors.Extractor) -> None:
    found = features_of(extractor, SLICES)
    assert found.shape == (72, 64)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(found.std(axis=0, ddof=1), 1, atol=1e-3)


def test_one_training_serves_all_and_a_damaged_one_is_made_again_the_same(extractor: extractors.Extractor, cache: Path) -> None:
    said: list[str] = []
    assert extractors.load(ASKED, training(cache, said)).name == extractor.name
    assert said == []
    (file,) = cache.glob("encoder-*/encoder.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert extractors.load(ASKED, training(cache, said)).name == extractor.name, "the same slices, settings and seed: the same weights"
    assert "encoder.pt is missing or changed; it is trained again" in said[0]


def test_other_data_seeds_and_settings_are_other_encoders(extractor: extractors.Extractor, cache: Path) -> None:
    short = {**ASKED, "steps": 50}
    plain = training(cache, [])
    names = {extractors.load(asked, item).name for asked, item in ((short, plain), (short, replace(plain, seed=8)), (short, replace(plain, fingerprint="others")), ({**short, "width": 4}, plain))}
    assert len(names) == 3, "data with another fingerprint but the same slices train the same weights"
    assert len(list(cache.glob("encoder-*/encoder.pt"))) == 5
    assert extractor.name not in names


def test_an_encoder_without_enough_to_learn_from_is_refused(cache: Path) -> None:
    with pytest.raises(InputError, match="write extractor: random_conv"):
        extractors.load(ASKED, None)
    with pytest.raises(InputError, match="3 slices of 1 "):
        extractors.load(ASKED, replace(training(cache, []), count=3, groups=np.array(["a", "a", "a"])))
    with pytest.raises(InputError, match=r"extractor\.size: 64 px, but the data have 32"):
        extractors.load({**ASKED, "size": 64}, training(cache, []))


def test_the_loss_looks_for_the_other_view_among_other_patients() -> None:
    generator = np.random.default_rng(0)
    views, patients = generator.normal(size=(2, 4, 5)), [0, 1, 1, 2]
    rows = [(view, number) for view in range(2) for number in range(4)]

    def likeness(first: tuple[int, int], second: tuple[int, int]) -> float:
        one, other = views[first], views[second]
        return float(np.exp(one @ other / np.linalg.norm(one) / np.linalg.norm(other) / encoder_training.TEMPERATURE))

    losses = []
    for row in rows:
        partner = (1 - row[0], row[1])
        others = [other for other in rows if patients[other[1]] != patients[row[1]]]
        losses.append(-math.log(likeness(row, partner) / (likeness(row, partner) + sum(likeness(row, other) for other in others))))
    found = encoder_training.contrast(torch.from_numpy(views.reshape(8, 5)), torch.tensor(patients))
    assert float(found) == pytest.approx(np.mean(losses))


def test_views_stay_in_the_window_and_follow_their_generator() -> None:
    slices = torch.from_numpy(SLICES[:16])[:, None]
    one, again, other = (encoder_training.view(slices, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.shape == slices.shape and float(one.min()) >= 0 and float(one.max()) <= 1
