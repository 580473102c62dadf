"""What a folder offers before anything is read: an image, its patient, where its contours may be; made by the layouts, judged by tree.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medgen.cardiac.dicom import Told

# why a file is left out, as the report counts it
NO_CONTOURS = "no contours"
ONE_SIDED = "only one of epicardium and endocardium"
ONE_OPEN = "one contour open, the other closed"
OUTSIDE = "endocardium outside the epicardium"
OTHER_SIZE = "contour of another image size"
SWAPPED = "rows and columns of the contour exchanged"
BAD_CONTOURS = "contours unusable"
UNKNOWN_TYPE = "unknown type"
UNDECODABLE = "compressed without a decoder"
NO_SPACING = "no pixel spacing"
BAD_IMAGE = "image unreadable"
RAW_SERIES = "raw weighted image, no map"
POST_CONTRAST = "after contrast"
UNCORRECTED = "without motion correction"
SUPERSEDED = "older delivery of the patient"
TWICE = "the same image twice"
OTHER_OBSERVER = "contours of another observer"
NO_IMAGE = "contours without an image"
FOREIGN = "no part of the layout"
REASONS = (
    NO_CONTOURS, ONE_SIDED, ONE_OPEN, OUTSIDE, OTHER_SIZE, SWAPPED, BAD_CONTOURS, UNKNOWN_TYPE, UNDECODABLE, NO_SPACING, BAD_IMAGE, RAW_SERIES,
    POST_CONTRAST, UNCORRECTED, SUPERSEDED, TWICE, OTHER_OBSERVER, NO_IMAGE, FOREIGN,
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """`contour_image`: which image of its contour files it is; None where the files say it (SOP Instance UID) or hold one image only.
    `frame`: the only one wanted; None of a file that has one. `first_pixel_centre`: see contour_files.read_contours."""

    image: Path
    patient: str
    told: Told
    contour_files: tuple[Path, ...]
    contour_image: str | None = None
    frame: int | None = None
    first_pixel_centre: float | None = None


@dataclass(frozen=True)
class Skip:
    """A file that is not used. `reason` is one of REASONS, `detail` a sentence about this file."""

    path: Path
    reason: str
    detail: str


@dataclass(frozen=True)
class Offer:
    """Everything in a folder: each file is part of a candidate or skipped. `notes`: what the user should know beside."""

    layout: str
    candidates: Sequence[Candidate]
    skipped: Sequence[Skip]
    notes: Sequence[str] = ()
