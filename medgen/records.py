"""Which records the updates of a training are made on: shuffled, or each by itself with a probability. Used by training.py.

A record is what counts as one, a patient or a slice (RecordSampling in models/settings.py)."""

from __future__ import annotations

import hashlib
import json
import secrets
from pathlib import Path
from typing import Any

import numpy as np

from medgen import files, rng
from medgen.errors import InputError
from medgen.models.settings import RecordSampling

KEY_BYTES = 32


class Records:
    """The training slices by record. Every draw is a function of (seed, stream, number of the update)."""

    def __init__(self, sampling: RecordSampling, rows: np.ndarray, patients: np.ndarray, seed: int, stream: str):
        """rows: of the training slices in the store; patients: whose each is. Raises InputError for fewer records than an update needs."""
        self.sampling, self.seed, self.stream = sampling, seed, stream
        of_record = rows_of_records(sampling, rows, patients)
        self._counts = np.array([len(own) for own in of_record])
        self._starts = np.cumsum(self._counts) - self._counts
        self._rows = np.concatenate(of_record)
        self._most_slices = int(np.unique(patients, return_counts=True)[1].max())
        problem = sampling.too_few(len(self))
        if problem is not None:
            raise InputError(problem)

    def __len__(self) -> int:
        return len(self._counts)

    @property
    def most_of_a_patient(self) -> int:
        """Records."""
        return 1 if self.sampling.unit == "patient" else self._most_slices

    @property
    def rate(self) -> float:
        """Probability of a record to be part of an update."""
        return self.sampling.size / len(self)

    def drawn(self, number: int) -> np.ndarray:
        """The records of an update, by their number, of all ranks; by chance there may be none."""
        if self.sampling.poisson:
            return np.flatnonzero(rng.numpy_generator(self.seed, f"{self.stream}/drawn", number).random(len(self)) < self.rate)
        first = number * self.sampling.size
        return rng.sample_order(range(first, first + self.sampling.size), len(self), self.seed, f"{self.stream}/order")

    def rows(self, number: int, records: np.ndarray) -> np.ndarray:
        """Rows [len(records), slices] of the slices that stand for these records in an update; which ones does not depend on the other records."""
        shares = rng.numpy_generator(self.seed, f"{self.stream}/slices", number).random((len(self), self.sampling.slices))[records]
        places = (shares * self._counts[records, None]).astype(np.int64)
        found: np.ndarray = self._rows[self._starts[records, None] + places]
        return found


def rows_of_records(sampling: RecordSampling, rows: np.ndarray, patients: np.ndarray) -> list[np.ndarray]:
    """The rows of each record, in the order in which the records first appear."""
    if sampling.unit == "slice":
        return list(rows[:, None])
    _, first, number = np.unique(patients, return_index=True, return_inverse=True)
    return [rows[number == place] for place in np.argsort(first)]


def secret_key(path: Path) -> str:
    """The key of a training, made now if there is none: whoever knows it can take the noise away again. Called by one rank.

    Raises InputError if what is there is no key."""
    if not path.is_file():
        files.write_private_text(path, f"{secrets.token_hex(KEY_BYTES)}\n")
    key = path.read_text().strip()
    if len(key) != 2 * KEY_BYTES or not set(key) <= set("0123456789abcdef"):
        raise InputError(f"{path}: not the key of a private training's noise, {2 * KEY_BYTES} hexadecimal digits, which it was; restore it, or train anew under another name")
    return key


def secret_seed(key: str, data: str, config: dict[str, Any]) -> int:
    """A seed of 256 bits for everything that is drawn. Of the data and of the configuration too: the same noise on the gradients of others would
    show the difference between both."""
    text = json.dumps([key, data, config], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=32).digest(), "little")
