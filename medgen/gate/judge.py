"""The verdict on drawn images: which rules each breaks, and by which number. Used by generate.py and fit.py; masks have two rules of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medgen.gate import measures
from medgen.gate.bounds import Bounds, Column
from medgen.gate.subspace import Subspace, small_versions
from medgen.spec_accept import AcceptMasks

Images = dict[str, np.ndarray]  # channel -> [n, H, W] in [0, 1]
OF_ALL_CLASSES = ""


@dataclass(frozen=True)
class Verdict:
    """`rules`: those that are broken, none if the image counts. `reasons`: a measure beyond its bounds each, the farthest first."""

    rules: tuple[str, ...]
    reasons: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Measurer:
    """How images become numbers. levels: channel -> brightness above which is foreground."""

    channels: tuple[str, ...]
    levels: dict[str, float]

    @property
    def columns(self) -> list[Column]:
        """Of `values`: all measures of each channel, then one of each pair of channels."""
        single = [Column(channel, item) for channel in self.channels for item in measures.OF_ONE_CHANNEL]
        pairs = [Column(" + ".join(pair), measures.EDGES_AGREE) for pair in measures.pairs_of(self.channels)]
        return [*single, *pairs]

    def values(self, images: Images, unlike: dict[str, np.ndarray]) -> np.ndarray:
        """[n, columns]. unlike: channel -> [n, 2], what subspace.py says."""
        blocks = []
        for channel in self.channels:
            blocks += [measures.measure(images[channel], self.levels[channel]), unlike[channel]]
        blocks += [measures.edges_agree(images[one], images[other])[:, None] for one, other in measures.pairs_of(self.channels)]
        return np.concatenate(blocks, axis=1)

    def sizes(self, values: np.ndarray) -> np.ndarray:
        """The size of the foreground of the first channel, [n]."""
        names = [item.name for item in measures.OF_ONE_CHANNEL]
        sizes: np.ndarray = values[:, names.index("foreground_share")]
        return sizes


@dataclass(frozen=True)
class Gate:
    """Rules with thresholds, for images of `size` pixels. bounds: class -> its own, "" for every class without.

    `record`: what the manifest says of it, with a hash of everything that decides."""

    size: int
    rules: tuple[str, ...]
    measurer: Measurer
    subspaces: dict[str, Subspace]
    bounds: dict[str, Bounds]
    record: dict[str, Any]

    def judge(self, images: Images, classes: Sequence[str]) -> list[Verdict]:
        """One verdict per image; `classes`: of each image, "" where there are none."""
        unlike = {channel: self.subspaces[channel].unlike(small_versions(images[channel])) for channel in self.measurer.channels}
        return self.judge_values(self.measurer.values(images, unlike), classes)

    def judge_values(self, values: np.ndarray, classes: Sequence[str]) -> list[Verdict]:
        """The same of numbers measured already, [n, columns]."""
        sizes, columns = self.measurer.sizes(values), self.measurer.columns
        found = []
        for number, name in enumerate(classes):
            bounds = self.bounds.get(name, self.bounds[OF_ALL_CLASSES])
            found.append(_verdict(values[number], sizes[number], bounds, columns, self.rules))
        return found


def _verdict(values: np.ndarray, size: float, bounds: Bounds, columns: Sequence[Column], rules: Sequence[str]) -> Verdict:
    below, above = (side[0] for side in bounds.beyond(values[None], np.array([size])))
    band = int(np.searchsorted(bounds.edges, size))
    reasons = []
    for place in np.flatnonzero(below | above).tolist():
        column = columns[place]
        rule = column.measure.low if below[place] else column.measure.high
        if rule not in rules:
            continue
        low, high = bounds.low[band, place], bounds.high[band, place]
        excess = (low - values[place] if below[place] else values[place] - high) / column.measure.least
        reasons.append((excess, {"rule": rule, "channel": column.channel, "measure": column.measure.name, "value": _rounded(values[place]),
                                 "low": _rounded(low), "high": _rounded(high)}))  # fmt: skip
    broken = {reason["rule"] for _, reason in reasons}
    ordered = sorted(reasons, key=lambda item: -item[0])
    return Verdict(tuple(rule for rule in rules if rule in broken), tuple(reason for _, reason in ordered))


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None


def judge_mask(accept: AcceptMasks, mask: np.ndarray) -> Verdict:
    """Of a mask bool [H, W]: by the number of its pixels."""
    if mask.sum() < accept.min_pixels:
        return Verdict(("empty",))
    return Verdict(("large",)) if mask.mean() > accept.max_fraction else Verdict(())
