"""What cardiac images are: how many of each type and level, and their values in each region. Called by summary.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medgen.cardiac.map_type import REGIONS, TYPES

if TYPE_CHECKING:
    import pandas
    from rich.console import Console

    from medgen.data.store import SliceStore

NO_LEVEL = "no level"
DIFFERENCE = ("left_ventricle", "myocardium")  # blood less muscle: what tells a map's contrast, whatever its offset


def maps(store: SliceStore) -> dict[str, Any]:
    """JSON. images: type -> level -> count. windows: type -> what becomes 0 and 1, the least and the most. means: type -> region -> mean and standard deviation between images of the mean of each, in the unit of the type."""
    rows = store.rows
    types = [kind for kind in TYPES if kind in set(rows["label"])]
    return {
        "images": {kind: _levels(rows[rows["label"] == kind]) for kind in types},
        "windows": {kind: _windows(rows[rows["label"] == kind]) for kind in types},
        "unit": {kind: str(rows["unit"][rows["label"] == kind].iloc[0]) for kind in types},
        "means": {kind: _means(rows[rows["label"] == kind], store.regions) for kind in types},
    }


def _levels(rows: pandas.DataFrame) -> dict[str, int]:
    counts = rows["level"].fillna(NO_LEVEL).value_counts()
    return {level: int(counts[level]) for level in (*REGIONS, NO_LEVEL) if level in counts.index}


def _windows(rows: pandas.DataFrame) -> dict[str, list[float]]:
    columns = {end: rows[f"window_{end}_image"] for end in ("low", "high")}
    return {end: [float(values.min()), float(values.max())] for end, values in columns.items()}


def _means(rows: pandas.DataFrame, regions: tuple[str, ...]) -> dict[str, dict[str, float]]:
    values = {name: rows[f"mean_{name}"].astype(float) for name in regions}
    values[f"{DIFFERENCE[0]} - {DIFFERENCE[1]}"] = values[DIFFERENCE[0]] - values[DIFFERENCE[1]]
    return {
        name: {"mean": round(float(column.mean()), 3), "sd": round(float(column.std()), 3) if column.count() > 1 else 0.0, "images": int(column.count())}
        for name, column in values.items()
        if column.count()
    }


def in_order(store: SliceStore, rows: list[int]) -> list[int]:
    """Rows by type and, within it, from apex to base."""
    places = {level: place for place, level in enumerate((*REGIONS, None))}
    levels = store.rows["level"].astype(object).where(store.rows["level"].notna(), None)
    return sorted(rows, key=lambda row: (store.rows["label"].iloc[row], places[levels.iloc[row]], row))


def show(found: dict[str, Any], console: Console) -> None:
    """Two small tables."""
    from rich.table import Table

    levels = [level for level in (*REGIONS, NO_LEVEL) if any(level in counts for counts in found["images"].values())]
    images = Table("type", *levels, title="images")
    for kind, counts in found["images"].items():
        images.add_row(kind, *(str(counts[level]) if level in counts else "-" for level in levels))
    console.print(images)
    means = Table("type", "region", "mean", "between images", "images", title="mean of each image over a region, at its own resolution")
    for kind, of_regions in found["means"].items():
        unit = " ms" if found["unit"][kind] == "ms" else ""
        for name, facts in of_regions.items():
            means.add_row(kind, name.replace("_", " "), f"{facts['mean']:.4g}{unit}", f"+- {facts['sd']:.3g}{unit}", str(facts["images"]))
    console.print(means)
