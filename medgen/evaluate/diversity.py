"""Random pairs of images that do not belong together, within a set and between two. Used by distributions.py and by_class.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from medgen import rng

MOST_PAIRS = 1000


def random_pairs(groups: np.ndarray, count: int, seed: int, stream: str) -> np.ndarray:
    """Up to `count` different unordered pairs of positions whose groups differ, int64 [k, 2]; empty if there is no such pair.

    groups [n]: patient names (real) or image names (synthetic)."""
    drawn = _drawn(len(groups), len(groups), count, seed, stream)
    return _of_different_groups(drawn[drawn[:, 0] < drawn[:, 1]], groups, groups)[:count]


def random_pairs_between(first_groups: np.ndarray, second_groups: np.ndarray, count: int, seed: int, stream: str) -> np.ndarray:
    """Up to `count` different pairs (position in the first set, position in the second) whose groups differ, int64 [k, 2]."""
    return _of_different_groups(_drawn(len(first_groups), len(second_groups), count, seed, stream), first_groups, second_groups)[:count]


def _drawn(first: int, second: int, count: int, seed: int, stream: str) -> np.ndarray:
    """Different pairs of positions in random order: all of them, or many more than are wanted."""
    generator = rng.numpy_generator(seed, stream)
    total = first * second
    numbers = np.arange(total) if total <= 100 * count else np.unique(generator.integers(0, total, size=40 * count))
    return np.stack(np.divmod(generator.permutation(numbers), max(1, second)), axis=1)


def _of_different_groups(pairs: np.ndarray, first_groups: np.ndarray, second_groups: np.ndarray) -> np.ndarray:
    return pairs[first_groups[pairs[:, 0]] != second_groups[pairs[:, 1]]]


def similarities(measure: Callable[[np.ndarray, np.ndarray], np.ndarray], first: np.ndarray, second: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """`measure` (SSIM, MS-SSIM) of every pair of an image of the first set [n,H,W] and one of the second, [k]."""
    return measure(first[pairs[:, 0]], second[pairs[:, 1]])
