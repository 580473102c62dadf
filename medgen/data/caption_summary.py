"""What captions and masks of images with captions are: how many, their words, the sides they name, the pixels of each class. Called by summary.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from medgen.captions import SIDES, sides_named, vocabulary, words_of
from medgen.names import printable

if TYPE_CHECKING:
    from rich.console import Console

    from medgen.data.store import SliceStore

MOST_FREQUENT = 10
SHORTEST_WORD = 3  # letters of a frequent word that is listed: "of" and "a" say nothing of the images
BLOCK = 256  # masks that are read at once


def captions(store: SliceStore) -> dict[str, Any]:
    """JSON: counts of captions, their lengths in words and the longest one's place, their words, and how many name each side."""
    rows = store.rows
    given = [(place, str(caption)) for place, caption in enumerate(rows["caption"]) if caption is not None]
    lengths = [len(words_of(caption)) for _, caption in given]
    words = vocabulary(caption for _, caption in given)
    longest = given[int(np.argmax(lengths))][0]
    frequent = sorted(((word, count) for word, count in words.items() if len(word) >= SHORTEST_WORD), key=lambda item: (-item[1], item[0]))
    named = [sides_named(caption) for _, caption in given]
    return {
        "images": len(rows),
        "captions": len(given),
        "distinct": len({caption for _, caption in given}),
        "words": {"median": float(np.median(lengths)), "most": max(lengths), "longest": str(rows["line" if "line" in rows else "id"].iloc[longest])},
        "vocabulary": len(words),
        "frequent": dict(frequent[:MOST_FREQUENT]),
        "sides": {side: sum(side in sides for sides in named) for side in SIDES if any(side in sides for sides in named)},
    }


def masks(store: SliceStore) -> dict[str, Any]:
    """JSON: how many images have a mask, and of each class its masks, the images with pixels of it, its pixels and their share of all of the images that have masks."""
    masked = np.flatnonzero(store.rows["masked"].to_numpy(dtype=bool))
    counts = np.zeros((len(masked), len(store.regions)), np.int64)
    for first in range(0, len(masked), BLOCK):
        block = store.masks(masked[first : first + BLOCK])
        counts[first : first + len(block)] = np.stack([(block == number).sum(axis=(1, 2)) for number in range(1, len(store.regions) + 1)], axis=1)
    every = max(1, len(masked) * store.size**2)
    return {
        "given": len(masked),
        "absent": len(store.rows) - len(masked),
        "classes": {
            name: {
                "masks": sum(name in names for names in store.rows["masks_of"]), "images": int((counts[:, place] > 0).sum()),
                "pixels": int(counts[:, place].sum()), "share": round(float(counts[:, place].sum() / every), 6),
            }
            for place, name in enumerate(store.regions)
        },
    }  # fmt: skip


def show(found: dict[str, Any], console: Console) -> None:
    """A few lines and a small table."""
    from rich.table import Table

    told = found["captions"]
    words = told["words"]
    frequent = ", ".join(f"{word} {count}" for word, count in told["frequent"].items())
    sides = ", ".join(f"{side} {count}" for side, count in told["sides"].items())
    for line in (
        f"captions: {told['captions']} of {told['images']} images, {told['distinct']} distinct; words: median {words['median']:g}, most {words['most']} ({words['longest']}); {told['vocabulary']} different ones",
        f"most frequent: {frequent}",
        f"captions that name a side: {sides}" if sides else "no caption names a side",
    ):
        console.print(printable(line), markup=False, highlight=False)
    if "masks" not in found:
        return
    of_masks = found["masks"]
    table = Table("class", "masks", "images with it", "pixels", "share of pixels", title=f"masks of {of_masks['given']} images, none of {of_masks['absent']}")
    for name, facts in of_masks["classes"].items():
        table.add_row(name, str(facts["masks"]), str(facts["images"]), f"{facts['pixels']:,}", f"{facts['share']:.3%}")
    console.print(table)
