"""Features of arrays, for tests that have images and no set of files. Used by the tests of features and extractors."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np

from medgen.evaluate import features
from medgen.evaluate.extractors import Extractor
from medgen.evaluate.features import Bench, Pictures


def pictures_of(images: np.ndarray) -> Pictures:
    return Pictures(lambda rows: images[rows], lambda rows: [hashlib.sha256(images[row].tobytes()).hexdigest() for row in rows], "test")


def features_of(extractor: Extractor, images: np.ndarray) -> np.ndarray:
    with tempfile.TemporaryDirectory() as cache:
        return np.array(features.features(extractor, pictures_of(images), np.arange(len(images)), Bench(Path(cache), print, lambda *_: None)))
