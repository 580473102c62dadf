"""What captions say: their words, and which sides they name. Called by caption_summary.py, and by whoever turns images over.

A caption that says "left" is wrong under its mirror image; one that says "upper" under an image that stands on its head."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

SIDES = ("left", "right", "upper", "lower", "nasal", "temporal", "superior", "inferior")
LEFT_RIGHT = ("left", "right")  # nasal and temporal turn with the eye: in the mirror image of a right eye, which is a left one, nasal stays nasal
WORD = re.compile(r"[^\W_]+(?:['.,-][^\W_]+)*")
ENDINGS = "ward|wards|most|side|sided|hand|handed"  # leftward, leftmost, left-sided


def words_of(caption: str) -> list[str]:
    """Lower-case words and numbers in their order: `1.5 T`, `left-sided` and `don't` are two, one and one."""
    return [word.lower() for word in WORD.findall(caption)]


def sides_named(caption: str, sides: Sequence[str] = SIDES) -> tuple[str, ...]:
    """Those of `sides` that the caption names, in their order; whole words alone, so that neither `bright` nor `temporally` does."""
    return tuple(side for side in sides if re.search(rf"(?<![^\W_]){side}(?:-?(?:{ENDINGS}))?(?![^\W_])", caption, flags=re.IGNORECASE))


def naming_sides(captions: Iterable[str | None], sides: Sequence[str] = LEFT_RIGHT) -> list[int]:
    """The places of the captions that name one of `sides`; by default those that a mirror image would make wrong."""
    return [place for place, caption in enumerate(captions) if caption is not None and sides_named(caption, sides)]


def vocabulary(captions: Iterable[str]) -> Counter[str]:
    """How often each word stands in all captions together."""
    return Counter(word for caption in captions for word in words_of(caption))
