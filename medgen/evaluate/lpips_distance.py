"""LPIPS between images: the distance of a network's features that people were asked about. Used by the metrics lpips and lpips_diversity.

The network is in pretrained/perceptual.py; here is what sees each image once however many pairs it is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from medgen.errors import InputError
from medgen.pretrained.settings import LPIPS_BACKBONES, SMALLEST_PIXELS, LpipsBackbone

if TYPE_CHECKING:
    import torch

BATCH = 32  # images the network sees at once
MOST_KEPT_BYTES = 512 * 2**20  # features of images that wait for their pairs
SHOWN_DIGITS = 12


@dataclass(frozen=True)
class Lpips:
    """`name` is part of the protocol of every score made with it."""

    name: str
    net: str
    network: torch.nn.Module

    def embedded(self, images: np.ndarray) -> torch.Tensor:
        """Gray images [k, H, W] or colour images [k, 3, H, W] in [0, 1] as vectors [k, d], float32: LPIPS of two images is the squared distance of theirs."""
        import torch

        weight = next(self.network.parameters())
        given = torch.from_numpy(2 * images.astype(np.float32, copy=False) - 1).to(weight.device)
        vectors: torch.Tensor = self.network(given.reshape(len(images), -1, *images.shape[-2:]))
        return vectors


def load(asked: dict[str, Any]) -> Lpips:
    """From the settings in the plan. Raises InputError for weights that are missing, or not those of the network."""
    import torch

    from medgen.pretrained.perceptual import lpips_of

    backbone = LpipsBackbone.model_validate(asked)
    digest = backbone.verified()
    network = lpips_of(backbone.net, backbone.file, backbone.key).to("cuda" if torch.cuda.is_available() else "cpu")
    name = f"LPIPS 0.1 of {backbone.net} (package lpips), sha256 of the network {digest[:SHOWN_DIGITS]}, gray repeated to three channels in [-1, 1], not resized"
    return Lpips(name, backbone.net, network)


def row_distances(lpips: Lpips, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """LPIPS of row i of one set with row i of the other, float64 [n]; images float32 [n, H, W] in [0, 1].

    Raises InputError for images smaller than the network needs."""
    _require_size(lpips, first)
    found = np.empty(len(first))
    with _exact():
        for block in _batches(np.arange(len(first)), BATCH):
            found[block] = _apart(lpips.embedded(first[block]), lpips.embedded(second[block]))
    return found


def pair_distances(lpips: Lpips, first: np.ndarray, second: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """LPIPS of image pairs[i, 0] of one set with pairs[i, 1] of the other, float64 [n]; the sets may be one and the same array.

    As many images of the first set as memory allows are kept at once, each seen once. Those of the second are seen once for each such
    lot that needs them, or not again where they are in it. Raises InputError for images smaller than the network needs."""
    _require_size(lpips, first)
    found = np.empty(len(pairs))
    with _exact():
        for lot in _batches(np.unique(pairs[:, 0]), _kept_at_once(lpips, first)):
            kept = _embedded(lpips, first, lot)
            of_lot = np.flatnonzero(np.isin(pairs[:, 0], lot))
            for others in _batches(np.unique(pairs[of_lot, 1]), BATCH):
                known = np.isin(others, lot) if second is first else np.zeros(len(others), dtype=bool)
                theirs = kept.new_empty(len(others), kept.shape[1])
                theirs[known] = kept[np.searchsorted(lot, others[known])]
                if not known.all():
                    theirs[~known] = lpips.embedded(second[others[~known]])
                for rows in _batches(of_lot[np.isin(pairs[of_lot, 1], others)], BATCH):
                    found[rows] = _apart(kept[np.searchsorted(lot, pairs[rows, 0])], theirs[np.searchsorted(others, pairs[rows, 1])])
    return found


def _require_size(lpips: Lpips, images: np.ndarray) -> None:
    smallest = SMALLEST_PIXELS[lpips.net]
    if min(images.shape[-2:]) < smallest:
        fitting = [net for net in LPIPS_BACKBONES if SMALLEST_PIXELS[net] <= min(images.shape[-2:])]
        advice = f"write lpips: {' or '.join(fitting)}, or leave the metric out" if fitting else "leave the metric out"
        raise InputError(f"lpips: {lpips.net} needs images of at least {smallest} px, these have {images.shape[-2]}x{images.shape[-1]}; {advice}")


@contextmanager
def _exact() -> Iterator[None]:
    """Exact float32 on every device, without gradients."""
    import torch

    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def _embedded(lpips: Lpips, images: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    import torch

    blocks = [lpips.embedded(images[some]) for some in _batches(rows, BATCH)]
    return torch.cat(blocks)


def _batches(rows: np.ndarray, most: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), most):
        yield rows[start : start + most]


def _kept_at_once(lpips: Lpips, images: np.ndarray) -> int:
    return max(BATCH, MOST_KEPT_BYTES // (4 * lpips.embedded(images[:1]).shape[1]))


def _apart(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    distances: np.ndarray = (first - second).square_().sum(dim=1).cpu().numpy()
    return distances
