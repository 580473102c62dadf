"""The principal components of small versions of the training slices: what of an image they cannot show. Used by fit.py and judge.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medgen.data.resize import resize_images

SMALL_PIXELS = 16  # per side: shapes and tissues, no texture
PARTS = 8  # of the small version per side, in which a local difference is looked for
EXPLAINED = 0.95  # of the variance


@dataclass(frozen=True)
class Subspace:
    """mean float32 [P], components float32 [P, k] with orthonormal columns, of small versions of P pixels."""

    mean: np.ndarray
    components: np.ndarray

    def unlike(self, small: np.ndarray) -> np.ndarray:
        """Of small versions [n, P]: [n, 2], the root mean square of what is left, over the image and in its worst part."""
        centred = small.astype(np.float64) - self.mean
        left = centred - (centred @ self.components) @ self.components.T
        side = int(np.sqrt(left.shape[1]))
        squares = (left**2).reshape(len(left), side, side)
        part = max(1, side // PARTS)
        whole = side // part * part
        parts = squares[:, :whole, :whole].reshape(len(left), whole // part, part, whole // part, part).mean(axis=(2, 4))
        return np.sqrt(np.stack([squares.mean(axis=(1, 2)), parts.max(axis=(1, 2))], axis=1))


def small_versions(images: np.ndarray) -> np.ndarray:
    """float32 [n, P] of square images [n, H, H]."""
    side = min(SMALL_PIXELS, images.shape[-1])
    return resize_images(images.astype(np.float32), side).reshape(len(images), -1)


def fit(small: np.ndarray) -> Subspace:
    """The fewest components with EXPLAINED of the variance of small versions [n, P]."""
    mean = small.mean(axis=0, dtype=np.float64)
    centred = small - mean
    variances, vectors = np.linalg.eigh(centred.T @ centred)
    variances, vectors = variances[::-1].clip(0), vectors[:, ::-1]
    total = variances.sum()
    count = int(np.searchsorted(np.cumsum(variances), EXPLAINED * total)) + 1 if total > 0 else 1
    return Subspace(mean.astype(np.float32), vectors[:, :count].astype(np.float32))
