"""What is in a slice store: counts, geometry and intensities as JSON, text and pictures; called by check and report."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medgen import files
from medgen.data import caption_summary, cardiac_summary
from medgen.data.store import SliceStore
from medgen.spec_data import SPLITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
SAMPLE_SLICES = 256  # enough for percentiles to two digits, and a second to read
SHEET_ROWS = 9
SHEET_COLUMNS = 8
OUTLINES = ("red", "cyan", "yellow", "lime", "magenta", "orange", "deepskyblue", "white")  # of a mask's first, second, ... region; further ones have none
FIXED_METADATA = {"Software": None}  # no version in the PNG: equal pictures are equal files


def summarise(store: SliceStore) -> dict[str, Any]:
    """A JSON value: per split the patients, slices and slices with a mask; geometry; percentiles of non-zero pixels."""
    present = [split for split in SPLITS if (store.rows["split"] == split).any()]
    return {
        "fingerprint": store.fingerprint,
        "size": store.size,
        "channels": {channel: _percentiles(store, channel) for channel in store.channels},
        "splits": {split: _count(store, split) for split in present},
        "spacing_mm": {
            name: [float(store.rows[column].min()), float(store.rows[column].max())]
            for name, column in (("x", "spacing_x_mm"), ("y", "spacing_y_mm"), ("thickness", "thickness_mm"))
        },
        "windows": {channel: _windows(store, channel) for channel in store.channels},
        "joint_windows": joint_windows(store),
        **({"maps": cardiac_summary.maps(store)} if store.maps is not None else {}),
        **({"captions": caption_summary.captions(store)} if store.rows["caption"].notna().any() else {}),
        **({"masks": caption_summary.masks(store)} if "masked" in store.rows else {}),
        "notes": list(store.notes),
    }


def _windows(store: SliceStore, channel: str) -> dict[str, list[float]]:
    """What becomes 0 (low) and 1 (high), in the file's units: the least and the most over all slices."""
    columns = {end: store.rows[f"window_{end}_{channel}"] for end in ("low", "high")}
    return {end: [float(values.min()), float(values.max())] for end, values in columns.items()}


def joint_windows(store: SliceStore) -> list[list[str]]:
    """Groups of channels that have the same window in every slice, so that their grey values can be compared with each other."""
    groups: dict[bytes, list[str]] = {}
    for channel in store.channels:
        ends = store.rows[[f"window_low_{channel}", f"window_high_{channel}"]].to_numpy(dtype=float)
        groups.setdefault(ends.tobytes(), []).append(channel)
    return [group for group in groups.values() if len(group) > 1]


def _count(store: SliceStore, split: str) -> dict[str, int | None]:
    rows = store.rows[store.rows["split"] == split]
    return {
        "patients": int(rows["patient"].nunique()),
        "slices": len(rows),
        "positive_slices": int((rows["mask_pixels"] > 0).sum()) if store.has_masks else None,
    }


def _percentiles(store: SliceStore, channel: str) -> dict[str, float]:
    """Percentiles of the pixels above 0 of evenly spread training slices, in the [0, 1] units that the model sees."""
    pixels = store.images(channel, _spread(store.select("train"), SAMPLE_SLICES))
    above = pixels[pixels > 0]
    values = np.percentile(above, PERCENTILES) if above.size else [0.0] * len(PERCENTILES)
    return {f"p{percent}": round(float(value), 4) for percent, value in zip(PERCENTILES, values, strict=True)}


def _spread(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of `rows`, evenly spread and in order."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))]


def print_summary(store: SliceStore, console: Console) -> None:
    """Two small tables: splits, and intensities per channel."""
    from rich.table import Table

    summary = summarise(store)
    splits = Table("split", "patients", "slices", "with mask", title="data")
    for split, counts in summary["splits"].items():
        positive = counts["positive_slices"]
        splits.add_row(split, str(counts["patients"]), str(counts["slices"]), "-" if positive is None else str(positive))
    console.print(splits)
    spacing = summary["spacing_mm"]
    ranges = ", ".join(f"{name} {_range(values, 3)}" for name, values in spacing.items())
    console.print(f"{store.size} x {store.size} pixels; mm: {ranges}")
    if store.channels:
        intensities = Table("channel", *(f"p{percent}" for percent in PERCENTILES), title="intensity above 0, after the window")
        for channel, values in summary["channels"].items():
            intensities.add_row(channel, *(f"{value:.2f}" for value in values.values()))
        console.print(intensities)
        windows = Table("channel" if store.maps is None else "type", "black", "white", title="window, in the units of the files")
        for name, ends in (summary["windows"] if store.maps is None else summary["maps"]["windows"]).items():
            windows.add_row(name, _range(ends["low"], 5), _range(ends["high"], 5))
        console.print(windows)
    if store.maps is not None:
        cardiac_summary.show(summary["maps"], console)
    if "captions" in summary:
        caption_summary.show(summary, console)
    for group in summary["joint_windows"]:
        console.print(f"the same window in each patient: {', '.join(group)}")


def _range(ends: list[float], digits: int) -> str:
    low, high = ends
    return f"{low:.{digits}g}" if abs(high - low) < 1e-3 else f"{low:.{digits}g} to {high:.{digits}g}"


def contact_sheet(store: SliceStore, path: Path) -> None:
    """A PNG with one row per patient (at most 9, every split shown) and 8 slices each, the mask outlined in red.

    With several channels every slice is shown once per channel, side by side in the row's 8 places."""
    from matplotlib.figure import Figure

    patients = _patients_to_show(store)
    figure = Figure(figsize=(SHEET_COLUMNS * 1.4, len(patients) * 1.5), layout="constrained")
    axes = figure.subplots(len(patients), SHEET_COLUMNS, squeeze=False)
    for line, (split, patient) in zip(axes, patients, strict=True):
        for place in line:
            place.set_axis_off()
        for place, (channel, row) in zip(line, _slices_to_show(store, split, patient), strict=False):
            _draw(place, store, channel, row)
        line[0].set_title(f"{split}: {patient}", fontsize=7, loc="left")
    if len(store.regions) > 1:
        named = zip(OUTLINES, store.regions, strict=False)
        figure.suptitle(", ".join(f"{colour}: {name.replace('_', ' ')}" for colour, name in named), fontsize=8, x=0.01, ha="left")
    _save(figure, path)


def _patients_to_show(store: SliceStore) -> list[tuple[str, str]]:
    """(split, patient), spread over the splits."""
    shown = []
    present = [split for split in SPLITS if (store.rows["split"] == split).any()]
    for split in present:
        patients = list(dict.fromkeys(store.rows["patient"][store.rows["split"] == split]))
        picked = _spread(np.arange(len(patients)), SHEET_ROWS // len(present))
        shown += [(split, patients[number]) for number in picked]
    return shown


def _slices_to_show(store: SliceStore, split: str, patient: str) -> list[tuple[str | None, int]]:
    """(channel, row): evenly spread slices, the one with the largest mask among them."""
    rows = np.flatnonzero((store.rows["split"] == split) & (store.rows["patient"] == patient))
    per_slice: list[str | None] = [*store.channels] or [None]
    count = max(1, SHEET_COLUMNS // len(per_slice))
    picked = set(_spread(rows, count).tolist())
    if store.has_masks:
        largest = int(rows[np.argmax(store.rows["mask_pixels"].to_numpy()[rows])])
        nearest = min(picked, key=lambda row: abs(row - largest))
        picked = picked - {nearest} | {largest}
    ordered = sorted(picked) if store.maps is None else cardiac_summary.in_order(store, sorted(picked))
    return [(channel, row) for row in ordered for channel in per_slice]


def _draw(place: Any, store: SliceStore, channel: str | None, row: int) -> None:
    mask = store.masks(np.array([row]))[0] if store.has_masks else None
    picture = mask if channel is None else store.images(channel, np.array([row]))[0]
    place.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for number, colour in zip(range(1, len(store.regions) + 1), OUTLINES, strict=False):
        inside = None if channel is None or mask is None else mask == number
        if inside is not None and inside.any() and not inside.all():
            place.contour(inside, levels=[0.5], colors=colour, linewidths=0.7)
    name = f"{channel} " if channel and len(store.channels) > 1 else ""
    backing = {"facecolor": "black", "alpha": 0.6, "pad": 0.8, "linewidth": 0}  # of what may stand on white
    place.text(0.02, 0.02, name + _words_of(store, row), color="yellow", fontsize=5, transform=place.transAxes, bbox=backing)


def _words_of(store: SliceStore, row: int) -> str:
    """Which slice it is: its number, or the type and level of a map."""
    record = store.rows.iloc[row]
    return f"{record['label']} {record['level'] or record['slice']}" if store.maps is not None else str(record["slice"])


def histogram(store: SliceStore, path: Path) -> None:
    """A PNG: the density of pixels above 0 after the window, one line per channel and split."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    styles = dict(zip(SPLITS, ("-", "--", ":"), strict=True))
    for number, channel in enumerate(store.channels):
        for split in [name for name in SPLITS if (store.rows["split"] == name).any()]:
            pixels = store.images(channel, _spread(store.select(split), SAMPLE_SLICES))
            density, edges = np.histogram(pixels[pixels > 0], bins=80, range=(0, 1), density=True)
            axes.plot((edges[1:] + edges[:-1]) / 2, density, styles[split], color=f"C{number}", label=f"{channel}, {split}")
    axes.set(xlabel="intensity after the window", ylabel="density of pixels above 0", xlim=(0, 1))
    if store.channels:
        axes.legend(fontsize=7)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    packed = io.BytesIO()
    figure.savefig(packed, format="png", dpi=110, metadata=FIXED_METADATA)
    files.write_bytes(path, packed.getvalue())
