"""Which pictures the report shows, and in which arrangement. Used by build.py and folder_page.py.

Samples are drawn at random from the run's seed, or are those that evaluate wrote down; nobody picks the good ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from medgen import rng
from medgen.evaluate.inputs import COLOURS, MASK, RealImages, SyntheticImages, synthetic_masks
from medgen.report import words
from medgen.report.pictures import Tile, mask_tile, tile

SHOWN_SAMPLES = 27  # in the gallery: full rows on a wide page
SHOWN_GROUPS = 12  # where a sample has several channels
SHOWN_PAIRS = 6
SHOWN_SIDE_BY_SIDE = 8
SHOWN_SUSPECTS = 16
SHOWN_NEAREST = 4  # where fewer are suspected


@dataclass(frozen=True)
class Panel:
    """Groups of tiles that belong together (the channels of one sample, or mask | real | synthetic), each perhaps with a line below it."""

    title: str
    note: str
    groups: list[list[Tile]]
    captions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StagePictures:
    """The pictures of one generate stage: pairs where they exist, else real beside synthetic; then the gallery."""

    pairs: Panel | None
    real: Panel | None
    synthetic: Panel | None
    gallery: Panel | None
    copies: Panel | None


class Painter:
    """Turns ids of synthetic samples and real slices into tiles."""

    def __init__(self, dataset: SyntheticImages, store: RealImages | None):
        self.dataset, self.store = dataset, store
        self.row_of_id = {name: number for number, name in enumerate(dataset.index["id"])}
        names = () if store is None else store.aliases
        self.label_of_id: dict[str, str] = dict(zip(dataset.index["id"], dataset.index["label"], strict=True)) if "label" in dataset.index.columns else {}
        if store is not None and self.label_of_id:
            self.label_of_id |= dict(zip(names, store.rows["label"], strict=True))
        self.store_row_of_id = {str(name): number for number, name in enumerate(names)}

    def synthetic(self, identifiers: list[str], outlined: bool = True) -> list[list[Tile]]:
        """One group per sample: its channels, outlined by the mask it was given."""
        rows = np.array([self.row_of_id[name] for name in identifiers], dtype=np.int64)
        pictures = _in_colour({channel: self.dataset.read(channel, rows) for channel in self.dataset.outputs})
        masks = self._masks(rows) if outlined else None
        groups = []
        for number, name in enumerate(identifiers):
            mask = None if masks is None else masks[number]
            groups.append([self._tile(pictures[channel][number], channel, mask, "synthetic", name) for channel in pictures])
        return groups

    def real(self, identifiers: list[str]) -> list[list[Tile]]:
        """The same channels of real slices, outlined by their own mask. Slices that the data no longer have are left out."""
        if self.store is None:
            return []
        known = [name for name in identifiers if name in self.store_row_of_id]
        rows = np.array([self.store_row_of_id[name] for name in known], dtype=np.int64)
        if len(rows) == 0:
            return []
        masks = self.store.masks(rows) if self.store.has_masks else None
        drawn = {channel: masks if channel == MASK else self.store.images(channel, rows) for channel in self.dataset.outputs}
        pictures = _in_colour({channel: arrays for channel, arrays in drawn.items() if arrays is not None})
        groups = []
        for number, name in enumerate(known):
            mask = None if masks is None else masks[number]
            groups.append([self._tile(arrays[number], channel, mask, "real", name) for channel, arrays in pictures.items()])
        return groups

    def _masks(self, rows: np.ndarray) -> np.ndarray | None:
        if self.dataset.outputs == [MASK] or (self.store is None and MASK not in self.dataset.files):
            return None
        if self.store is None:
            return self.dataset.read(MASK, rows)
        return synthetic_masks(self.dataset, rows, self.store)

    def by_class(self, identifiers: list[str]) -> list[str]:
        """Those of one class beside each other; as they are where there are no classes."""
        return sorted(identifiers, key=lambda name: self.label_of_id.get(name, ""))

    def _tile(self, array: np.ndarray, channel: str, mask: np.ndarray | None, kind: str, name: str) -> Tile:
        if channel == MASK:
            return mask_tile(array, f"{kind} mask", name, kind)
        shown = [self.label_of_id[name]] if name in self.label_of_id else []
        if channel != "colour" and (not shown or len(self.dataset.outputs) > 1):
            shown.append(channel)
        return tile(array, mask, f"{kind} {' '.join(shown) or 'image'}", kind, name)


def _in_colour(pictures: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Red, green and blue [n,H,W] are one picture, [n,H,W,3]."""
    if not set(COLOURS) <= set(pictures):
        return pictures
    others = {channel: arrays for channel, arrays in pictures.items() if channel not in COLOURS}
    return {"colour": np.stack([pictures[channel] for channel in COLOURS], axis=-1), **others}


def stage_pictures(painter: Painter, seed: int, metrics: dict[str, Any] | None) -> StagePictures:
    """All pictures of one generate stage. Raises MedgenError if a file of the dataset does not verify."""
    samples = metrics["samples"] if metrics is not None else random_samples(painter, seed)
    pairs = _pairs(painter, samples["pairs"][:SHOWN_PAIRS])
    more = SHOWN_SAMPLES if len(painter.dataset.outputs) == 1 else SHOWN_GROUPS
    drawn: list[str] = samples["synthetic"]
    chosen = [*painter.by_class(drawn[:SHOWN_SIDE_BY_SIDE]), *painter.by_class(drawn[SHOWN_SIDE_BY_SIDE : SHOWN_SIDE_BY_SIDE + more])]
    synthetic = painter.synthetic(chosen)
    real = painter.real(painter.by_class(samples["real"][:SHOWN_SIDE_BY_SIDE]))
    shown = 0 if pairs is not None else SHOWN_SIDE_BY_SIDE
    side_by_side = pairs is None
    rest = synthetic[shown : shown + more]
    return StagePictures(
        pairs=pairs,
        real=Panel("Real", _drawn_from(metrics), real) if side_by_side and real else None,
        synthetic=Panel("Synthetic", "random samples", synthetic[:SHOWN_SIDE_BY_SIDE]) if side_by_side else None,
        gallery=Panel("More samples", "a random choice of the set, by the run's seed", rest) if rest else None,
        copies=_copies(painter, metrics["details"]["copies"]) if metrics is not None else None,
    )


def without_training_images(pictures: StagePictures, metrics: dict[str, Any] | None) -> StagePictures:
    """For a page about a training with differential privacy, which may be shown to whoever may have its model."""
    from_train = metrics is None or metrics["against"] == "train"
    return replace(pictures, copies=None, real=None if from_train else pictures.real)


def _drawn_from(metrics: dict[str, Any] | None) -> str:
    if metrics is None:
        return "random slices of the train split"
    return "random images" if metrics["stage"] == "folders" else f"random slices of the {metrics['against']} split"


def random_samples(painter: Painter, seed: int) -> dict[str, Any]:
    """Samples for a stage that was not evaluated: the same kind of draw that evaluate makes."""
    identifiers = painter.dataset.index["id"].to_numpy()
    order = rng.permutation(len(identifiers), seed, "report_gallery")
    real: list[str] = []
    if painter.store is not None:
        rows = np.flatnonzero(painter.store.rows["split"].to_numpy() == "train")
        if MASK in painter.dataset.files:
            rows = rows[painter.store.rows["mask_pixels"].to_numpy()[rows] > 0]
        picked = rows[rng.permutation(len(rows), seed, "report_real")[:SHOWN_SIDE_BY_SIDE]]
        real = [str(name) for name in painter.store.aliases[picked]]
    return {"synthetic": [str(identifiers[number]) for number in order], "real": real, "pairs": _conditions(painter, order)}


def _conditions(painter: Painter, order: np.ndarray) -> list[dict[str, str]]:
    index = painter.dataset.index
    if painter.store is None or not (index["condition_kind"] == "real").all():
        return []
    return [{"synthetic": index["id"].iloc[row], "real": index["condition"].iloc[row]} for row in order[:SHOWN_PAIRS]]


def _pairs(painter: Painter, pairs: list[dict[str, str]]) -> Panel | None:
    """mask | real | synthetic, channel by channel."""
    known = [pair for pair in pairs if pair["real"] in painter.store_row_of_id]
    if not known:
        return None
    real = painter.real([pair["real"] for pair in known])
    synthetic = painter.synthetic([pair["synthetic"] for pair in known])
    groups = []
    has_masks = painter.store is not None and painter.store.has_masks
    for pair, real_tiles, synthetic_tiles in zip(known, real, synthetic, strict=True):
        row = painter.store_row_of_id[pair["real"]]
        given = [mask_tile(painter.store.masks(np.array([row]))[0], "given mask", pair["real"])] if painter.store is not None and has_masks else []
        groups.append([*given, *(item for both in zip(real_tiles, synthetic_tiles, strict=True) for item in both)])
    return Panel("Pairs", "the model saw the mask alone; the real slice is the one that the mask was drawn on" if has_masks else "each beside the real image that it belongs to", groups)


def _copies(painter: Painter, nearest: list[dict[str, Any]]) -> Panel | None:
    """Those that evaluate found most suspicious; each says in which space, and whether it is below the threshold, where that was written down."""
    known = [pair for pair in nearest if pair["real"] in painter.store_row_of_id][:SHOWN_SUSPECTS]
    if not known:
        return None
    known = known[: max(SHOWN_NEAREST, sum(_is_suspect(pair) for pair in known))]
    synthetic = painter.synthetic([pair["synthetic"] for pair in known])
    real = painter.real([pair["real"] for pair in known])
    groups = [[made[0], taken[0]] for made, taken in zip(synthetic, real, strict=True)]
    return Panel("Nearest training images", "the synthetic samples that single out one training patient most; the ratio is 0 for an exact copy, near 1 for a stranger",
                 groups, [_copy_caption(pair) for pair in known])  # fmt: skip


def _copy_caption(pair: dict[str, Any]) -> str:
    space = f" ({pair['space']})" if "space" in pair else ""
    return f"{'suspected copy, ' if _is_suspect(pair) else ''}ratio {words.number(pair['ratio'])}{space}"


def _is_suspect(pair: dict[str, Any]) -> bool:
    return bool(pair.get("is_suspect"))  # an earlier medgen did not write it down
