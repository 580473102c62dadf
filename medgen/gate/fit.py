"""The gate of one generate stage, fitted to the training slices or read from the cache. Used by generate.py.

Fitted once, kept by content: every shard reads the same thresholds, and the held-out slices say how many real ones they would reject."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medgen import files, rng
from medgen.data.store import SliceStore, locked
from medgen.errors import InputError
from medgen.gate import measures, subspace
from medgen.gate.bounds import MOST_BANDS, PERCENT, SLICES_PER_BAND, Bounds, Column, Quantiles
from medgen.gate.judge import OF_ALL_CLASSES, Gate, Measurer
from medgen.gate.subspace import EXPLAINED, Subspace
from medgen.spec_accept import AcceptImages

GATE_VERSION = 1  # raise it when the same slices would give other measures
RECORD = "gate.json"
MOST_SLICES = 4000  # of a split; more cost time and hardly move a quantile
FEWEST_SLICES = 20
FEWEST_OF_CLASS = 100  # a class with fewer has the bounds of all
FOLDS = 5
MARGINS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
LEFT_OUT_REJECTED = 0.002  # at most: margins are chosen by these slices, so they must do better than those held out
HELD_OUT_REJECTED = 0.01  # more is told as too many
STREAM = "gate"
# all that decides the thresholds beside the slices
RECIPE = [GATE_VERSION, MOST_SLICES, FEWEST_OF_CLASS, FOLDS, MARGINS, LEFT_OUT_REJECTED, PERCENT, MOST_BANDS, SLICES_PER_BAND, EXPLAINED,
          [[item.name, item.low, item.high, item.least, str(item.most), item.by_size] for item in (*measures.OF_ONE_CHANNEL, measures.EDGES_AGREE)]]


@dataclass(frozen=True)
class Sources:
    """Which slices say what is real. `train`, `held_out`: row numbers; `held_out_split`: val, test, or "" where nothing is held out."""

    store: SliceStore
    channels: tuple[str, ...]
    train: np.ndarray
    held_out_split: str
    held_out: np.ndarray
    uses_labels: bool

    def images(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {channel: self.store.images(channel, rows) for channel in self.channels}

    def classes(self, rows: np.ndarray) -> list[str]:
        if not self.uses_labels:
            return [OF_ALL_CLASSES] * len(rows)
        return [self.store.classes[number] for number in self.store.labels(rows)]

    def patients(self, rows: np.ndarray) -> np.ndarray:
        return self.store.rows["patient"].to_numpy()[rows].astype(str)


def sources_of(store: SliceStore, channels: tuple[str, ...], positive_only: bool, trained_on: Sequence[str], uses_labels: bool) -> Sources:
    """The train split, and the first other split that the model was not trained on. Raises InputError for too few slices."""
    train = _spread(store.select("train", positive_only))
    if len(train) < FEWEST_SLICES:
        raise InputError(f"accept: like: train: {len(train)} training slices are too few to say what a real one looks like, {FEWEST_SLICES} at least are needed; remove accept")
    for split in ("val", "test"):
        there = store.rows["split"].to_numpy() == split
        if positive_only:
            there = there & (store.rows["mask_pixels"].to_numpy() > 0)
        if there.any() and split not in trained_on:
            return Sources(store, channels, train, split, _spread(np.flatnonzero(there)), uses_labels)
    return Sources(store, channels, train, "", np.array([], dtype=np.int64), uses_labels)


def _spread(rows: np.ndarray) -> np.ndarray:
    """At most MOST_SLICES of them, evenly spread."""
    return rows if len(rows) <= MOST_SLICES else rows[np.arange(MOST_SLICES) * len(rows) // MOST_SLICES]


def open_gate(sources: Sources, accept: AcceptImages, cache_root: Path, say: Callable[[str], None]) -> Gate:
    """From the cache, or fitted now and kept there."""
    store = sources.store
    rules = accept.rules_of(len(sources.channels))
    key = files.sha256_json([RECIPE, store.fingerprint, sources.channels, sources.train.tolist(), sources.held_out.tolist(), sources.uses_labels,
                             rules, accept.margin])[:16]  # fmt: skip
    folder = cache_root / f"gate-{key}"
    if files.broken_seal(folder) is not None:
        with locked(cache_root):  # shards start together: one fits, the others wait
            if files.broken_seal(folder) is not None:
                _keep(folder, _fitted(sources, accept, rules))
    gate = _read(folder, sources.channels)
    for line in in_words(gate.record):
        say(line)
    return gate


def _keep(folder: Path, gate: Gate) -> None:
    """In place of a damaged one. Where locks do not hold another shard may write the same at the same time: the first stays."""
    if folder.exists():
        shutil.rmtree(folder)
    try:
        with files.folder_in_one_move(folder) as temporary:
            for channel, fitted in gate.subspaces.items():
                np.save(temporary / f"mean_{channel}.npy", fitted.mean)
                np.save(temporary / f"components_{channel}.npy", fitted.components)
            files.write_json(temporary / RECORD, gate.record)
            files.seal(temporary)
    except OSError:
        if files.broken_seal(folder) is not None:
            raise


def _read(folder: Path, channels: tuple[str, ...]) -> Gate:
    record = files.read_json(folder / RECORD)
    measurer = Measurer(channels, record["levels"])
    bounds = {name: Bounds.from_json(item, measurer.columns) for name, item in record["bounds"].items()}
    subspaces = {channel: Subspace(_array(folder / f"mean_{channel}.npy"), _array(folder / f"components_{channel}.npy")) for channel in channels}
    return Gate(record["size"], tuple(record["rules"]), measurer, subspaces, bounds, record)


@dataclass(frozen=True)
class Table:
    """The training slices as numbers. values [n, columns], sizes [n] of the foreground, classes and folds [n]; own: classes with enough slices."""

    columns: list[Column]
    values: np.ndarray
    sizes: np.ndarray
    classes: np.ndarray
    folds: np.ndarray
    own: list[str]

    def quantiles(self, rows: np.ndarray) -> dict[str, Quantiles]:
        """Of the slices in `rows` (bool [n]): of all of them, and of each class that has enough in the whole table."""
        found = {OF_ALL_CLASSES: Quantiles.of(self.values[rows], self.sizes[rows], self.columns)}
        for name in self.own:
            of_class = rows & (self.classes == name)
            if of_class.any():
                found[name] = Quantiles.of(self.values[of_class], self.sizes[of_class], self.columns)
        return found


def _array(path: Path) -> np.ndarray:
    found: np.ndarray = np.load(path, allow_pickle=False)
    return found


def _fitted(sources: Sources, accept: AcceptImages, rules: tuple[str, ...]) -> Gate:
    images = sources.images(sources.train)
    measurer = Measurer(sources.channels, {channel: measures.level_of(images[channel]) for channel in sources.channels})
    small = {channel: subspace.small_versions(images[channel]) for channel in sources.channels}
    table = _table(sources, measurer, images, small)
    steps, left_out = _margin_steps(_left_out_rejected(table, MARGINS if accept.margin is None else (accept.margin,), rules))
    margins = np.array(MARGINS)[steps] if accept.margin is None else np.full(len(table.columns), accept.margin)
    fitted = table.quantiles(np.ones(len(table.values), dtype=bool))
    bounds = {name: quantiles.widened(margins, table.columns) for name, quantiles in fitted.items()}
    subspaces = {channel: subspace.fit(small[channel]) for channel in sources.channels}
    record = {
        "version": GATE_VERSION, "like": "train", "rules": list(rules), "size": sources.store.size, "data_fingerprint": sources.store.fingerprint,
        "percent": PERCENT, "margins": _by_channel(table.columns, margins), "margin_was_asked": accept.margin is not None, "levels": measurer.levels,
        "training": {"slices": len(sources.train), "patients": len(np.unique(sources.patients(sources.train))), "left_out_rejected": left_out},
        "classes_with_own_bounds": table.own,
        "components_sha256": {channel: files.sha256_bytes(item.mean.tobytes() + item.components.tobytes()) for channel, item in subspaces.items()},
        "bounds": {name: item.to_json(table.columns) for name, item in bounds.items()},
    }  # fmt: skip
    gate = Gate(sources.store.size, rules, measurer, subspaces, bounds, record)
    return replace(gate, record=files.with_own_hash({**record, "held_out": _held_out(gate, sources)}))


def _table(sources: Sources, measurer: Measurer, images: dict[str, np.ndarray], small: dict[str, np.ndarray]) -> Table:
    folds = _folds(sources.patients(sources.train))
    values = measurer.values(images, {channel: _unlike_left_out(small[channel], folds) for channel in sources.channels})
    classes = np.array(sources.classes(sources.train))
    own = [name for name in dict.fromkeys(classes.tolist()) if name != OF_ALL_CLASSES and (classes == name).sum() >= FEWEST_OF_CLASS]
    return Table(measurer.columns, values, measurer.sizes(values), classes, folds, own)


def _folds(patients: np.ndarray) -> np.ndarray:
    """A fold number for each slice [n]; a patient is in one fold. A single patient is cut into blocks of neighbouring slices."""
    names, code = np.unique(patients, return_inverse=True)
    if len(names) == 1:
        return np.arange(len(patients)) * FOLDS // len(patients)
    place = rng.permutation(len(names), 0, STREAM)
    folds: np.ndarray = np.argsort(place)[code] % min(FOLDS, len(names))
    return folds


def _unlike_left_out(small: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """[n, 2]: what the components of the other folds cannot show of each slice; those of its own would know it by heart."""
    found = np.empty((len(small), 2))
    for fold in np.unique(folds):
        found[folds == fold] = subspace.fit(small[folds != fold]).unlike(small[folds == fold])
    return found


def _left_out_rejected(table: Table, margins: Sequence[float], rules: Sequence[str]) -> np.ndarray:
    """bool [margins, n, columns]: which slice would be rejected by which measure, if bounds came from the other folds' patients."""
    rejected = np.zeros((len(margins), *table.values.shape), dtype=bool)
    counts_low = np.array([column.measure.low in rules for column in table.columns])
    counts_high = np.array([column.measure.high in rules for column in table.columns])
    for fold in np.unique(table.folds):
        fitted = table.quantiles(table.folds != fold)
        for number, margin in enumerate(margins):
            for name in np.unique(table.classes[table.folds == fold]):
                rows = np.flatnonzero((table.folds == fold) & (table.classes == name))
                bounds = fitted.get(name, fitted[OF_ALL_CLASSES]).widened(margin, table.columns)
                below, above = bounds.beyond(table.values[rows], table.sizes[rows])
                rejected[number, rows] = (below & counts_low) | (above & counts_high)
    return rejected


def _margin_steps(rejected: np.ndarray) -> tuple[np.ndarray, int]:
    """For each column of [margins, n, columns] the place of its margin, and how many slices are rejected with those.

    All begin with the smallest; while too many slices are rejected, the column that rejects most gets the next one: a measure
    in which patients differ much is given room without loosening the others."""
    most, count, columns = len(rejected) - 1, rejected.shape[1], np.arange(rejected.shape[2])
    steps = np.zeros(len(columns), dtype=int)
    while True:
        by_column = rejected[steps, :, columns]  # [columns, n]
        total = int(by_column.any(axis=0).sum())
        blamed = np.where(steps < most, by_column.sum(axis=1), 0)
        if total <= LEFT_OUT_REJECTED * count or not blamed.any():
            return steps, total
        steps[np.argmax(blamed)] += 1


def _by_channel(columns: Sequence[Column], values: np.ndarray) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for column, value in zip(columns, values, strict=True):
        found.setdefault(column.channel, {})[column.measure.name] = float(value)
    return found


def _held_out(gate: Gate, sources: Sources) -> dict[str, Any] | None:
    """How many real slices that the model has not seen would be rejected; None where there are none."""
    if not len(sources.held_out):
        return None
    verdicts = gate.judge(sources.images(sources.held_out), sources.classes(sources.held_out))
    by_rule = {rule: sum(rule in verdict.rules for verdict in verdicts) for rule in gate.rules}
    return {"split": sources.held_out_split, "slices": len(verdicts), "patients": len(np.unique(sources.patients(sources.held_out))),
            "rejected": sum(bool(verdict.rules) for verdict in verdicts), "by_rule": by_rule}  # fmt: skip


def in_words(record: dict[str, Any]) -> list[str]:
    """What the gate is and how many real slices it would reject, for the log."""
    training, held_out = record["training"], record["held_out"]
    margins = sorted({margin for of_channel in record["margins"].values() for margin in of_channel.values()})
    how = "as asked" if record["margin_was_asked"] else f"so that no more than {training['left_out_rejected']} of these slices are rejected by bounds from other patients"
    told = f"{margins[0]:g}" if len(margins) == 1 else f"{margins[0]:g} to {margins[-1]:g}"
    lines = [f"accept: rules {', '.join(record['rules'])}; bounds from {training['slices']:,} training slices of {training['patients']:,} patients, margin {told} ({how})"]
    if held_out is None:
        return [*lines, "accept: no slices are held out, so nobody knows how many real ones these rules would reject"]
    share = held_out["rejected"] / held_out["slices"]
    lines.append(f"accept: of {held_out['slices']:,} real {held_out['split']} slices ({held_out['patients']:,} patients) {held_out['rejected']:,} would be rejected ({100 * share:.1f}%)")
    if share > HELD_OUT_REJECTED:
        lines.append(f"accept: that is more than {100 * HELD_OUT_REJECTED:g}%: rare but real looks will be missing from the images; write a larger margin, or fewer rules")
    return lines
