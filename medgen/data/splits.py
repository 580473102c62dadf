"""Patients into train, val and test; called by phantoms.py and index.py. A patient is never in two splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medgen import rng
from medgen.errors import InputError
from medgen.spec_data import SPLITS


def assign_splits(patients: Sequence[str], fractions: Mapping[str, float], seed: int) -> dict[str, str]:
    """A split for every patient: a seeded shuffle cut by `fractions`; the order of `patients` does not matter.

    Every split with a share above 0 gets at least one patient. Raises InputError if there are too few for that."""
    wanted = [split for split in SPLITS if fractions[split] > 0]
    names = sorted(set(patients))
    if len(names) < len(wanted):
        raise InputError(
            f"{len(names)} patients cannot be split by patient into {', '.join(wanted)}; "
            f"at least {len(wanted)} are needed, or set the share of a split to 0 in data.splits"
        )
    counts = {split: max(1, round(fractions[split] * len(names))) for split in wanted if split != "train"}
    while sum(counts.values()) >= len(names):
        counts[max(counts, key=lambda split: counts[split])] -= 1
    shuffled = [names[position] for position in rng.permutation(len(names), seed, "splits")]
    result = {}
    for split in ("test", "val"):
        for _ in range(counts.get(split, 0)):
            result[shuffled.pop()] = split
    return {**result, **dict.fromkeys(shuffled, "train")}
