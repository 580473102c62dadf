"""LPIPS against the package itself, with weights from a hash: row by row, and of pairs whose images are seen once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import made_weights
import numpy as np
import pytest
import torch

from medgen.errors import InputError
from medgen.evaluate import lpips_distance
from medgen.files import sha256_file
from medgen.pretrained import torchvision_operators

PIXELS = {"alex": 64, "squeeze": 48, "vgg": 16}
GENERATOR = np.random.default_rng(3)
SMALLEST = {"alex": 31, "squeeze": 17, "vgg": 16}


def package(net: str) -> Any:
    """The package's model as it comes, but for its weights."""
    torchvision_operators.make_importable()
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    model.net.load_state_dict(made_weights.state_of(model.net))
    return model


def file_of(model: Any, path: Path) -> Path:
    """In the names of torchvision: slice2.3.weight is features.3.weight."""
    return made_weights.saved(path, {f"features.{name.partition('.')[2]}": value for name, value in model.net.state_dict().items()})


@pytest.mark.parametrize("net", PIXELS)
def test_both_ways_are_the_distances_of_the_package(net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    theirs = package(net)
    file = file_of(theirs, tmp_path / "backbone.pth")
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = lpips_distance.load({"net": net, "file": str(file), "sha256": sha256_file(file)})
    assert capfd.readouterr() == ("", "") and torch.equal(torch.random.get_rng_state(), before)
    assert sha256_file(file)[:12] in ours.name
    first, second = GENERATOR.random((2, 6, PIXELS[net], PIXELS[net]), dtype=np.float32)
    every = np.stack(np.meshgrid(range(6), range(6)), axis=-1).reshape(-1, 2)
    every = every[GENERATOR.permutation(36)]

    def direct(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            sides = [torch.from_numpy(side)[:, None].expand(-1, 3, -1, -1) for side in (one, other)]
            found: np.ndarray = theirs(*sides, normalize=True).flatten().numpy()
        return found

    np.testing.assert_allclose(lpips_distance.row_distances(ours, first, second), direct(first, second), rtol=1e-5)
    seen: list[int] = []
    embedded = lpips_distance.Lpips.embedded
    monkeypatch.setattr(lpips_distance.Lpips, "embedded", lambda self, images: seen.append(len(images)) or embedded(self, images))
    between = lpips_distance.pair_distances(ours, first, second, every)
    np.testing.assert_allclose(between, direct(first[every[:, 0]], second[every[:, 1]]), rtol=1e-5)
    assert sum(seen) == 1 + 6 + 6, "each image once, and one to know how many fit into memory"
    seen.clear()
    within = lpips_distance.pair_distances(ours, first, first, every)
    np.testing.assert_allclose(within, direct(first[every[:, 0]], first[every[:, 1]]), rtol=1e-5, atol=1e-7)
    assert sum(seen) == 1 + 6
    monkeypatch.setattr(lpips_distance, "MOST_KEPT_BYTES", 1)
    monkeypatch.setattr(lpips_distance, "BATCH", 2)
    np.testing.assert_allclose(lpips_distance.pair_distances(ours, first, second, every), between, rtol=1e-5)
    np.testing.assert_allclose(lpips_distance.pair_distances(ours, first, first, every), within, rtol=1e-5, atol=1e-7)

    smallest = SMALLEST[net]
    assert np.isfinite(lpips_distance.row_distances(ours, first[:1, :smallest, :smallest], second[:1, :smallest, :smallest])).all()
    small = first[:1, : smallest - 1, : smallest - 1]
    with pytest.raises(InputError, match=f"{net} needs images of at least {smallest} px, these have {smallest - 1}x{smallest - 1}"):
        lpips_distance.row_distances(ours, small, small)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    file = file_of(package("squeeze"), tmp_path / "squeeze.pth")
    asked = {"net": "alex", "file": str(file)}
    with pytest.raises(InputError, match="expected 7be5be79"):
        lpips_distance.load(asked)
    with pytest.raises(InputError, match=r"lpips: \S+ does not hold the weights of alexnet: there is no features.10.weight in it. Fetch alexnet-owt"):
        lpips_distance.load({**asked, "sha256": sha256_file(file)})
    made_weights.saved(file, {"features.10.weight": torch.zeros(1)})
    with pytest.raises(InputError, match=r"lpips: \S+ does not hold the weights of torchvision's alexnet: there is no features.0.weight"):
        lpips_distance.load({**asked, "sha256": sha256_file(file)})
