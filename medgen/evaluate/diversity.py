"""Do the images of a set resemble each other more than real patients do? MS-SSIM between random pairs. Used by run.py."""

from __future__ import annotations

import numpy as np

from medgen import rng

MOST_PAIRS = 1000


def random_pairs(groups: np.ndarray, count: int, seed: int, stream: str) -> np.ndarray:
    """Up to `count` different unordered pairs of positions whose groups differ, int64 [k, 2]; empty if there is no such pair.

    groups [n]: patient names (real) or image names (synthetic)."""
    generator = rng.numpy_generator(seed, stream)
    total = len(groups)
    if total * (total - 1) // 2 <= 50 * count:
        first, second = np.triu_indices(total, k=1)
        different = np.flatnonzero(groups[first] != groups[second])
        picked = generator.permutation(different)[:count]
        return np.stack([first[picked], second[picked]], axis=1)
    # too many pairs to list: draw more than needed, and keep the first different ones
    drawn = np.sort(generator.integers(0, total, size=(20 * count, 2)), axis=1)
    drawn = drawn[groups[drawn[:, 0]] != groups[drawn[:, 1]]]
    _, first_seen = np.unique(drawn, axis=0, return_index=True)
    return drawn[np.sort(first_seen)[:count]]


def similarities(images: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """MS-SSIM of every pair, [k]; images float [n,H,W] in [0,1]."""
    from medgen.evaluate.pairs import ms_ssim

    return ms_ssim(images[pairs[:, 0]], images[pairs[:, 1]])
