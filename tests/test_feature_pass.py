"""The pass over features: each image once, kept by content, resumed where it was cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from passing import pictures_of

from medgen.errors import InputError
from medgen.evaluate import features
from medgen.evaluate.extractors import Extractor

IMAGES = np.random.default_rng(3).random((20, 8, 8)).astype(np.float32)


class Counting(torch.nn.Module):
    """Mean and spread of an image; knows how many it has seen, and fails from some number on."""

    def __init__(self, most: int = 10**6) -> None:
        super().__init__()
        self.seen, self.most = 0, most

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        if self.seen > self.most:
            raise KeyboardInterrupt
        return torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3))], dim=1)


def a_pass(network: torch.nn.Module, cache: Path, rows: np.ndarray, images: np.ndarray = IMAGES, name: str = "x", told: list[int] | None = None) -> np.ndarray:
    def progress(done: int, of: int, unit: str) -> None:
        if told is not None:
            told.append(done)

    return features.features(Extractor(name, 8, (0.0, 1.0), network), pictures_of(images), rows, features.Bench(cache, print, progress))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "BLOCK", 6)
    monkeypatch.setattr(features, "BATCH", 4)


def test_each_image_is_seen_once_whatever_asks_for_it(tmp_path: Path) -> None:
    network, told = Counting(), []
    some = a_pass(network, tmp_path, np.array([3, 1, 7]))
    whole = a_pass(network, tmp_path, np.arange(20), told=told)
    assert network.seen == 20
    np.testing.assert_array_equal(some, whole[[3, 1, 7]])
    np.testing.assert_allclose(whole[:, 0], IMAGES.mean((1, 2)), rtol=1e-5)
    assert told == [3, 9, 15, 20] and (a_pass(network, tmp_path, np.arange(20)) == whole).all()


def test_a_cut_pass_goes_on_where_it_was(tmp_path: Path) -> None:
    cut, after = Counting(most=14), Counting()
    with pytest.raises(KeyboardInterrupt):
        a_pass(cut, tmp_path, np.arange(20))
    whole = a_pass(after, tmp_path, np.arange(20))
    assert after.seen == 8, "two blocks of six were kept"
    np.testing.assert_array_equal(whole, a_pass(Counting(), tmp_path / "anew", np.arange(20)))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".npz"], "nothing is left beside the blocks"


def test_other_content_or_another_network_is_another_row(tmp_path: Path) -> None:
    network = Counting()
    before = a_pass(network, tmp_path, np.arange(20))
    changed = IMAGES.copy()
    changed[5] = 0.5
    after = a_pass(network, tmp_path, np.arange(20), changed)
    assert network.seen == 21 and after[5, 0] == pytest.approx(0.5) and (np.delete(after, 5, 0) == np.delete(before, 5, 0)).all()
    a_pass(network, tmp_path, np.arange(20), name="y")
    assert network.seen == 41


def test_equal_images_are_one(tmp_path: Path) -> None:
    network = Counting()
    found = a_pass(network, tmp_path, np.arange(10), np.repeat(IMAGES[:2], 5, axis=0))
    assert network.seen == 2 and (found[:5] == found[0]).all() and (found[5:] == found[5]).all()


def test_a_damaged_block_is_made_again(tmp_path: Path) -> None:
    whole = a_pass(Counting(), tmp_path, np.arange(20))
    blocks = sorted(tmp_path.rglob("*.npz"))
    content = bytearray(blocks[0].read_bytes())
    content[next(place for row in whole if (place := content.find(row.tobytes())) >= 0)] ^= 1
    blocks[0].write_bytes(content)
    blocks[1].write_bytes(blocks[1].read_bytes()[:100])
    network = Counting()
    np.testing.assert_array_equal(a_pass(network, tmp_path, np.arange(20)), whole)
    assert 6 < network.seen <= 12


def test_a_network_that_gives_no_row_per_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one row per image"):
        a_pass(torch.nn.Identity(), tmp_path, np.arange(3))
    with pytest.raises(InputError, match="not a number"):
        a_pass(Counting(), tmp_path, np.arange(1), np.full((1, 8, 8), np.nan, np.float32))
