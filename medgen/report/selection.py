"""What the quality gate left out of a set: how many images, by which rules, and the first of them beside what was drawn instead. Used by build.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgen import files
from medgen.data.image_files import read_slice
from medgen.errors import MedgenError
from medgen.evaluate.inputs import MASK
from medgen.gate import accounts
from medgen.plan import PlannedStage
from medgen.report import words
from medgen.report.gallery import Painter, Panel
from medgen.report.pictures import Tile, mask_tile, tile
from medgen.rundir import RunDir
from medgen.shards import read_manifest

SHOWN = 8
NARROWER = "Images were selected: what is rare among the real training slices is rarer still among these."


@dataclass(frozen=True)
class Selection:
    """`lines`: sentences for page and card. `panel`: rejected images, each with its successor; None where none can be shown."""

    lines: list[str]
    panel: Panel | None


def selection(run: RunDir, stage: PlannedStage, manifest: dict[str, Any], painter: Painter) -> Selection | None:
    """Of a collected dataset, whose manifest this is; None if nothing was selected, or by a medgen that did not say."""
    counts = manifest.get("counts", {})
    if "rejected" not in counts or (manifest["gate"] is None and not counts["rejected"]):
        return None
    return Selection(sentences(manifest), _panel(run, stage, painter))


def sentences(manifest: dict[str, Any]) -> list[str]:
    """Shares, by rule and by class, and what the same rules say of real slices."""
    counts, gate, by_class = manifest["counts"], manifest["gate"], manifest["counts_by_class"]
    told = [accounts.in_words(counts) + (f"; {accounts.held_out_in_words(gate)}" if gate is not None else "") + "."]
    if len(by_class) > 1:
        shares = ", ".join(f"{name} {100 * found['rejected'] / found['drawn']:.1f}%" for name, found in by_class.items())
        told.append(f"Rejected of what was drawn for each class: {shares}.")
    return [*told, NARROWER] if gate is not None else told


def _panel(run: RunDir, stage: PlannedStage, painter: Painter) -> Panel | None:
    """The first rejected images of the whole set: every shard keeps its first ones, so these are the same for any number of shards."""
    found: list[tuple[list[Tile], dict[str, Any]]] = []
    for task in stage.tasks:
        folder = run.shard(stage.name, task.shard)
        try:
            entries = read_manifest(folder)["rejected_shown"]
            found += [(_tiles(folder, entry), entry) for entry in entries[: SHOWN - len(found)]]
        except (OSError, ValueError, KeyError, MedgenError):  # shards may have been deleted after the dataset was collected
            continue
    if not found:
        return None
    kept = painter.synthetic([str(painter.dataset.index["id"].iloc[entry["index"]]) for _, entry in found], outlined=False)
    groups = [[*tiles, *successor] for (tiles, _), successor in zip(found, kept, strict=True)]
    return Panel("Rejected", "the first ones, each beside what was drawn again in its place", groups, [_caption(entry) for _, entry in found])


def _tiles(folder: Path, entry: dict[str, Any]) -> list[Tile]:
    shown = []
    for channel, facts in entry["files"].items():
        path = folder / facts["path"]
        if files.sha256_file(path) != facts["sha256"]:
            raise MedgenError(f"{path} does not match its sha256")
        array, name = read_slice(path).array, f"{entry['index']:06d}, try {entry['attempt'] + 1}"
        shown.append(mask_tile(array, "rejected mask", name, "synthetic") if channel == MASK else tile(array, None, f"rejected {channel}", "synthetic", name))
    return shown


def _caption(entry: dict[str, Any]) -> str:
    told = ", ".join(entry["rules"])
    if not entry["reasons"]:
        return told
    worst = entry["reasons"][0]
    below = worst["low"] is not None and worst["value"] < worst["low"]
    bound = f"at least {words.number(worst['low'])}" if below else f"at most {words.number(worst['high'])}"
    return f"{told}: {worst['measure'].replace('_', ' ')} {words.number(worst['value'])}, real {bound}"
