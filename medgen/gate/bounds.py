"""Where the measures of the training slices lie, and how far beyond them is too far. Used by fit.py and judge.py.

Bounds are quantiles moved outwards; slices of different foreground size have bounds of their own (bands)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medgen.gate.measures import Measure

PERCENT = 0.5  # of the training slices below the lower quantile, and as many above the upper one
MOST_BANDS = 4
SLICES_PER_BAND = 100


@dataclass(frozen=True)
class Column:
    """One measure of one channel (or of two, as `t1_pre + t1_gd`)."""

    channel: str
    measure: Measure


@dataclass(frozen=True)
class Quantiles:
    """Of a table [n, m] by band: edges float64 [b - 1] of the foreground's size; low, middle, high [b, m]."""

    edges: np.ndarray
    low: np.ndarray
    middle: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, sizes: np.ndarray, columns: Sequence[Column]) -> Quantiles:
        """values [n, m], sizes [n]: the foreground's size, which sorts the rows into bands of equally many."""
        bands = int(np.clip(len(values) // SLICES_PER_BAND, 1, MOST_BANDS))
        edges = np.quantile(sizes, np.linspace(0, 1, bands + 1)[1:-1])
        whole = np.percentile(values, [PERCENT, 50, 100 - PERCENT], axis=0)
        by_size = np.array([column.measure.by_size for column in columns])
        place = np.searchsorted(edges, sizes)
        found = np.stack([np.percentile(values[place == band], [PERCENT, 50, 100 - PERCENT], axis=0) if (place == band).any() else whole for band in range(bands)], axis=1)
        found = np.where(by_size, found, whole[:, None])
        return cls(edges, found[0], found[1], found[2])

    def widened(self, margins: np.ndarray | float, columns: Sequence[Column]) -> Bounds:
        """Each quantile moved outwards by its margin (one, or [m]) times its distance from the median, at least by what nobody would see."""
        least = np.array([column.measure.least for column in columns])
        most = np.array([column.measure.most for column in columns])
        low = self.low - np.clip(margins * (self.middle - self.low), least, most)
        high = self.high + np.clip(margins * (self.high - self.middle), least, most)
        low[:, [column.measure.low is None for column in columns]] = -np.inf
        high[:, [column.measure.high is None for column in columns]] = np.inf
        return Bounds(self.edges, low, high)


@dataclass(frozen=True)
class Bounds:
    """By band: edges [b - 1]; low, high [b, m], infinite where a side says nothing."""

    edges: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def beyond(self, values: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of values [n, m]: bool [n, m] below the lower bound, and above the upper one."""
        band = np.searchsorted(self.edges, sizes)
        return values < self.low[band], values > self.high[band]

    def to_json(self, columns: Sequence[Column]) -> dict[str, Any]:
        """For a manifest: edges as log10 of the share of foreground; bounds per band by channel and measure, null where there is none."""
        found: dict[str, Any] = {}
        for place, column in enumerate(columns):
            sides = {"low": _finite(self.low[:, place]), "high": _finite(self.high[:, place])}
            found.setdefault(column.channel, {})[column.measure.name] = sides
        return {"foreground_edges": [float(edge) for edge in self.edges], "by_channel": found}

    @classmethod
    def from_json(cls, record: dict[str, Any], columns: Sequence[Column]) -> Bounds:
        sides = [record["by_channel"][column.channel][column.measure.name] for column in columns]
        low = np.array([[-np.inf if value is None else value for value in side["low"]] for side in sides]).T
        high = np.array([[np.inf if value is None else value for value in side["high"]] for side in sides]).T
        return cls(np.array(record["foreground_edges"]), low, high)


def _finite(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
