"""The KID of the images that a model draws in a given number of steps, with its noise. Used by find_steps.py.

Images are drawn when their features are asked for, and the features kept in the cache by everything that decides an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from medgen import files, generate
from medgen.data.store import SliceStore
from medgen.errors import InputError, Interrupted
from medgen.evaluate import distances, feature_scores, inputs, intervals
from medgen.evaluate.extractors import Extractor
from medgen.evaluate.features import Bench, features
from medgen.evaluate.inputs import MASK, Sides
from medgen.generate import Generation
from medgen.models.settings import SteppedSampling
from medgen.plan import Shard
from medgen.spec_evaluate import Measures

FEWEST_IMAGES = 16  # a side
STREAM = "find_steps"  # of the bootstrap: one for every number of steps, so that replicates are pairs


class Drawn:
    """The images of a generation as the synthetic side of an evaluation: drawn in its chunks, when first read. `tell` gets images drawn, of how many."""

    def __init__(self, made_by: Generation, sampling: SteppedSampling, tell: Callable[[int, int], None]):
        assert made_by.work.task.images is not None
        self._generation, self._images, self._tell = replace(made_by, sampling=sampling), made_by.work.task.images, tell
        self._drawn: dict[int, dict[str, np.ndarray]] = {}
        conditions = [made_by.conditions.get(number) for number in _numbers(self._images)]
        facts: dict[str, Any] = {
            "id": [f"{number:06d}" for number in _numbers(self._images)],
            "condition_kind": ["none" if item is None else item.kind for item in conditions],
            "condition": ["" if item is None else item.id for item in conditions],
        }
        if made_by.classes is not None:
            facts["label"] = [made_by.classes.names[made_by.classes.of(number)] for number in _numbers(self._images)]
        self.name, self.index = made_by.stage.name, pd.DataFrame(facts)
        self.outputs = self.files = list(made_by.config.output_channels)
        self.fingerprint = f"drawn by {made_by.checkpoint.sha256}"
        self._key = files.sha256_json([
            made_by.checkpoint.sha256, made_by.store.fingerprint, sampling.model_dump(mode="json"), made_by.work.plan.seed, made_by.stage.name,
            made_by.stage.settings["chunk"], str(made_by.device), torch.__version__,
        ])  # fmt: skip

    @property
    def image_channels(self) -> list[str]:
        return [name for name in self.outputs if name != MASK]

    @property
    def tells_regions(self) -> bool:
        return True

    def contents(self, channel: str, rows: np.ndarray) -> list[str]:
        """What decides each image."""
        return [f"{self._key} {channel} {self.index['id'][row]} {self.index['condition'][row]} {len(self.index)}" for row in rows]

    def read(self, channel: str, rows: np.ndarray) -> np.ndarray:
        """[n, H, W] float32 in [0, 1]. Raises Interrupted on a signal."""
        for chunk in generate.chunks_of(self._images, self._generation.stage.settings["chunk"]):
            if set(chunk) & set(rows.tolist()) and chunk[0] not in self._drawn:
                if self._generation.work.stop.is_set:
                    raise Interrupted(f"stopped by {self._generation.work.stop.signal_name}; what was measured is kept, the same command goes on")
                self._drawn |= dict(zip(chunk, generate.sample(self._generation, chunk, 0), strict=True))
                self._tell(len(self._drawn), len(self.index))
        return np.stack([self._drawn[row][channel] for row in rows.tolist()])


def _numbers(images: Shard) -> range:
    return range(images.first, images.stop)


@dataclass(frozen=True)
class Measured:
    """`replicates` [r]: the KID of sets drawn anew, in pairs with those of other numbers of steps."""

    sampler: str
    steps: int
    evaluations: int  # of the network per image
    kid: float
    replicates: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        return _middle(self.replicates)

    def above(self, other: Measured) -> tuple[float, tuple[float, float]]:
        """How much higher its KID is, with the 95% interval of the paired difference."""
        return self.kid - other.kid, _middle(self.replicates - other.replicates)

    def is_worse_than(self, other: Measured) -> bool:
        """True if that is beyond the noise: chance would show it in 2.5% of such sets."""
        return self.above(other)[1][0] > 0


def _middle(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values[np.isfinite(values)], intervals.COVERAGE_PERCENTILES)
    return float(low), float(high)


class Judge:
    """Compares what is drawn with the real slices of a split: KID per picture, the mean over pictures where there are several."""

    def __init__(self, made_by: Generation, sampling: SteppedSampling, store: SliceStore, against: str, measures: Measures, bench: Bench, tell: Callable[[int, int], None]):
        self._made_by, self._bench, self._tell = made_by, bench, tell
        seen = made_by.work.plan.trained_on(made_by.stage.name)
        self.sides: Sides = inputs.sides_of(Drawn(made_by, sampling, tell), store, made_by.work.plan.seed, against, seen, measures)
        if len(self.sides.reference) < FEWEST_IMAGES:
            raise InputError(f"--against {against}: {len(self.sides.reference)} slices are too few to compare with, at least {FEWEST_IMAGES} are needed; give the data a larger {against} split")
        self._extractors: dict[str, Extractor] = {name: feature_scores.extractor_of(self.sides, name, measures, bench) for name in self.sides.pictures}
        real = {name: feature_scores.pictures_of(self.sides, name)[0] for name in self.sides.pictures}
        self._real = {name: features(self._extractors[name], pictures, self.sides.reference, bench) for name, pictures in real.items()}
        self._groups = _varying(self.sides.synthetic_groups()), _varying(self.sides.patients(self.sides.reference))

    def say(self, text: str) -> None:
        self._bench.say(text)

    @property
    def extractor(self) -> str:
        return ", ".join(dict.fromkeys(extractor.name for extractor in self._extractors.values()))

    @property
    def units(self) -> str:
        """What varies independently, in words: of the drawn side, then of the real one."""
        patients = len(np.unique(self.sides.patients(self.sides.reference)))
        return f"over {patients} patients" if patients >= intervals.FEWEST_GROUPS else f"over single images, as {patients} patients are too few to resample: it is too narrow"

    def measure(self, sampler: str, sampling: SteppedSampling) -> Measured:
        """Draw, or take from the cache, and compare."""
        sides = replace(self.sides, dataset=Drawn(self._made_by, sampling, self._tell))
        found = []
        for name, extractor in self._extractors.items():
            drawn = features(extractor, feature_scores.pictures_of(sides, name)[1], sides.positions, self._bench)
            found.append(distances.discrepancy(distances.cubic, drawn, self._real[name], *self._groups, sides.seed, STREAM))
        replicates = [item.replicates for item in found if item.replicates is not None]
        assert len(replicates) == len(found), "there are enough groups"
        return Measured(sampler, sampling.steps, sampling.evaluations, float(np.mean([item.value for item in found])), np.mean(replicates, axis=0))


def _varying(groups: np.ndarray) -> np.ndarray:
    """Patients; single images where those are too few to be drawn anew."""
    return groups if len(np.unique(groups)) >= intervals.FEWEST_GROUPS else np.arange(len(groups))
