"""What images are made from: slices of a split of the real data, or collected masks. Called by generate.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from medgen import collected
from medgen.data.image_files import read_slice
from medgen.data.store import SliceStore
from medgen.spec_data import SPLITS, DataSpec
from medgen.spec_stages import GenerateStage
from medgen.task import Work
from medgen.training import load_channel


@dataclass(frozen=True)
class Condition:
    """What an image is made from. channels: name -> float32 [H, W] in [0, 1]; affine: 4 x 4, (row, column, 0) to millimetres."""

    id: str
    kind: str  # "real" or "synthetic"
    channels: dict[str, np.ndarray]
    affine: np.ndarray


def conditions_of(work: Work, settings: GenerateStage, data: DataSpec, names: tuple[str, ...], store: SliceStore, indices: range) -> dict[int, Condition]:
    """What these images are made from: slices of a split of the real data, spread evenly; or collected masks, one each."""
    assert settings.condition is not None
    if settings.condition in SPLITS:
        rows = store.select(settings.condition, data.positive_only)
        return {index: _real_condition(store, names, int(rows[_spread(index, settings.count, len(rows))])) for index in indices}
    with collected.made_again_if_damaged(work.run, settings.condition):
        dataset = work.run.dataset(settings.condition)
        table, _ = collected.read(dataset)
        return {number: _collected_mask(dataset, table.iloc[number]) for number in indices}


def _real_condition(store: SliceStore, names: tuple[str, ...], row: int) -> Condition:
    channels = {name: load_channel(store, name, np.array([row]), torch.device("cpu"))[0, 0].numpy() for name in names}
    return Condition(str(store.aliases[row]), "real", channels, store.affine(row))


def _spread(index: int, count: int, available: int) -> int:
    """Which of `available` conditions image `index` of `count` takes: evenly spread, or in turn if there are too few."""
    return index * available // count if count <= available else index % available


def _collected_mask(dataset: Path, row: pd.Series) -> Condition:
    found = read_slice(collected.verified_file(dataset, row, "seg"))
    spacing = [float(row["spacing_y_mm"]), float(row["spacing_x_mm"]), float(row["thickness_mm"])]
    affine = found.affine if found.affine is not None else np.diag([*spacing, 1.0])
    return Condition(row["id"], "synthetic", {"seg": (found.array > 0.5).astype(np.float32)}, affine)
