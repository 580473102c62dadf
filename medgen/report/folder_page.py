"""The page and the dataset card of two folders that were compared. Called by two_folders.py; the same templates and sentences as for a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medgen.evaluate.inputs import Sides
from medgen.report import card, evaluations, page, summary, words
from medgen.report.card import Fact, Subject
from medgen.report.gallery import Painter, stage_pictures
from medgen.report.summary import ImageSet, Measurement

NAME = "synthetic"
ADD = {"evaluate": "nothing was compared", "utility": "two folders do not say it; add a stage {kind: utility} to a job that draws such images"}


def folder_page(record: dict[str, Any], sides: Sides) -> str:
    """One HTML file. record: metrics.json of the comparison."""
    images = _image_set(record)
    return page.render(
        "folders.html",
        name=f"{_last(record['inputs']['synthetic'])} beside {_last(record['inputs']['real'])}",
        lead=words.compared(record) + ".",
        answers=summary.answers([images]),
        has_masks=sides.store.has_masks or "seg" in sides.dataset.files,
        regions=sides.store.regions,
        notes=record["notes"],
        pictures=stage_pictures(Painter(sides.dataset, sides.store), sides.seed, record),
        evaluation=evaluations.evaluation("By question", record),
        card=folder_card(record, sides),
        provenance=[("seed", str(sides.seed)), *words.flat(record["inputs"]), *words.flat(record["counts"])],
    )  # fmt: skip


def folder_card(record: dict[str, Any], sides: Sides) -> str:
    """Markdown. Of how the images were made it knows nothing, and says so."""
    count = len(sides.dataset.index)
    return card.dataset_card(Subject(
        title=f"Synthetic images of {_last(record['inputs']['synthetic'])}",
        lead=f"{words.compared(record)}.",
        count=count,
        contents=[("images", f"{count:,}"), ("channels", ", ".join(sides.dataset.image_channels) or "masks only"), ("compared at", f"{sides.store.size} x {sides.store.size} pixels"),
                  *_classes(sides), ("fingerprint of the files", sides.dataset.fingerprint)],
        made=[("model", card.BLANK), ("checkpoint", card.BLANK), ("code", card.BLANK)],
        source=[("trained on", card.BLANK), ("compared with", _real_side(record)), ("fingerprint of the real files", sides.store.fingerprint)],
        limits=record["notes"],
        images=_image_set(record),
    ))  # fmt: skip


def _image_set(record: dict[str, Any]) -> ImageSet:
    return ImageSet(NAME, [Measurement(record["stage"], "evaluate", record)], ADD)


def _classes(sides: Sides) -> list[Fact]:
    if "label" not in sides.dataset.index.columns:
        return []
    labels = sides.dataset.index["label"].tolist()
    return [("classes", ", ".join(f"{name} {labels.count(name):,}" for name in sorted(set(labels))))]


def _real_side(record: dict[str, Any]) -> str:
    counts = record["counts"]
    return f"{counts['real']:,} real images of {counts['real_patients']:,} patients"


def _last(path: str) -> str:
    return Path(path).absolute().name
