"""The area under the ROC curve of several classes. Used by families that are selected by it and by evaluate/."""

from __future__ import annotations

import numpy as np


def area_under_curve(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """One class against the rest, averaged over classes; None unless every class is there.

    labels int [n], probabilities [n, classes]; weights [n], at least 0: how often each sample counts."""
    from sklearn.metrics import roc_auc_score

    counted = np.ones(len(labels)) if weights is None else weights
    classes = range(probabilities.shape[1])
    if any(counted[labels == number].sum() == 0 for number in classes):
        return None
    return float(np.mean([roc_auc_score(labels == number, probabilities[:, number], sample_weight=counted) for number in classes]))
