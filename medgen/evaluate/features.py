"""One pass of a network over a set of images, one row of features per image. Used by by_class.py; every metric of features takes its rows from here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from medgen.errors import InputError
from medgen.evaluate.extractors import Extractor

BATCH = 32

Read = Callable[[np.ndarray], np.ndarray]


def features(extractor: Extractor, read: Read, rows: np.ndarray) -> np.ndarray:
    """One pass over a set, float32 [n, d]. `read(rows)` gives images [k,H,W] in [0,1]; only `BATCH` of them are in memory."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = extractor.network.to(device)
    parts = []
    # exact float32 on every device: 10 bits of mantissa would move a distance between similar sets
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        for start in range(0, len(rows), BATCH):
            found = network(extractor.prepared(read(rows[start : start + BATCH])).to(device))
            parts.append(found.float().cpu().numpy())
    result = np.concatenate(parts)
    if result.ndim != 2 or not np.isfinite(result).all():
        raise InputError(f"{extractor.name}: expected finite features [n, d], got shape {list(result.shape)}, {np.isnan(result).sum()} not a number; "
                         "an extractor returns one row per image")  # fmt: skip
    return result
