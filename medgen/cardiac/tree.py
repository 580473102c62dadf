"""A folder tree or a manifest to an index: every image with its contours, checked, and every file left out with its reason; called by medgen/data.

Nothing is dropped in silence: what is not an entry is in `skipped`. Pixels are not decoded here."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medgen import csv_files, files
from medgen.cardiac import layout_mapping, layout_sunnybrook, manifest
from medgen.cardiac.candidates import (
    BAD_CONTOURS,
    BAD_IMAGE,
    NO_CONTOURS,
    NO_SPACING,
    ONE_OPEN,
    ONE_SIDED,
    OTHER_SIZE,
    OUTSIDE,
    SWAPPED,
    TWICE,
    UNDECODABLE,
    UNKNOWN_TYPE,
    Candidate,
    Offer,
    Skip,
)
from medgen.cardiac.contour_files import ContourFile, read_contours
from medgen.cardiac.contours import Contour, OtherSizeError, SwappedError, on_image, polygon_area
from medgen.cardiac.dicom import Header, Map, SpacingError, UndecodableError, read_headers, read_map
from medgen.cardiac.map_type import UnknownTypeError
from medgen.cardiac.rasterise import Anatomy, Grid, OneSidedError, OpenError, OutsideError, anatomy
from medgen.errors import InputError

IMAGE_REASONS: dict[type[InputError], str] = {UnknownTypeError: UNKNOWN_TYPE, UndecodableError: UNDECODABLE, SpacingError: NO_SPACING}
CONTOUR_REASONS: dict[type[InputError], str] = {OneSidedError: ONE_SIDED, OpenError: ONE_OPEN, OutsideError: OUTSIDE, OtherSizeError: OTHER_SIZE, SwappedError: SWAPPED}
USUAL_WIDTH_MM = (12.0, 140.0)  # of an epicardium in the short axis, from a small apex to a dilated base
SHOWN = 3  # how many files of a reason the report lists


@dataclass(frozen=True, eq=False)
class Entry:
    """One image with contours that make a heart. `id` is unique in its index and fit for a file name; `patient` decides about splits."""

    id: str
    patient: str
    header: Header
    contours: tuple[Contour, ...]  # in pixels of the image
    contour_files: tuple[Path, ...]

    def grid(self) -> Grid:
        """The pixels of the image itself."""
        return Grid((self.header.rows, self.header.columns), self.header.spacing_mm)

    def anatomy(self) -> Anatomy:
        return anatomy(self.contours, self.header.spacing_mm)

    def decides(self) -> list[Any]:
        """JSON of all that its files, a manifest and the layout say together of what its pixels, its place and its masks are."""
        header = self.header
        drawn = [[contour.kind, contour.closed, hashlib.sha256(contour.points.astype("<f8").tobytes()).hexdigest()] for contour in self.contours]
        return [header.frame, header.unit, header.scale, header.spacing_mm, header.orientation, header.position_mm, header.slice_thickness_mm, header.region, drawn]

    def load(self) -> Map:
        """With pixels. Raises InputError if the file has changed or cannot be decoded."""
        return read_map(self.header)


@dataclass(frozen=True)
class Index:
    """`entries` by patient and id; `skipped` in the order of their paths; `notes` on duplicates and contradictions."""

    root: Path
    layout: str
    entries: tuple[Entry, ...]
    skipped: tuple[Skip, ...]
    notes: tuple[str, ...]

    @property
    def patients(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(entry.patient for entry in self.entries))

    def reasons(self) -> dict[str, int]:
        """How many files were left out for each reason, the most frequent first."""
        return dict(Counter(skip.reason for skip in self.skipped).most_common())

    def report(self) -> str:
        """For the terminal: what there is, what was left out and why, with the first files of each reason."""
        counts = Counter((entry.header.type, entry.header.region or "no level") for entry in self.entries)
        lines = [f"{self.root}: {len(self.entries)} images of {len(self.patients)} patients"]
        lines += [f"  {kind} {region}: {count}" for (kind, region), count in sorted(counts.items())]
        lines += [f"note: {self._below_root(note)}" for note in self.notes]
        return "\n".join([*lines, *([self.left_out()] if self.skipped else [])])

    def left_out(self) -> str:
        """How many files, and for each reason the first."""
        lines = [f"{len(self.skipped)} files were left out"]
        for reason, count in self.reasons().items():
            lines.append(f"  {count} {reason}")
            own = [skip for skip in self.skipped if skip.reason == reason]
            lines += [f"    {skip.path}: {skip.detail}" for skip in own[:SHOWN]]
            lines += [f"    and {count - SHOWN} more"] if count > SHOWN else []
        return self._below_root("\n".join(lines))

    def _below_root(self, text: str) -> str:
        """Paths as they count from the root, or from a manifest."""
        return text.replace(f"{self.root if self.root.is_dir() else self.root.parent}/", "")

    def write_skipped(self, path: Path) -> None:
        """All of them as a table with the columns path, reason and detail."""
        csv_files.write_rows(path, ("path", "reason", "detail"), [vars(skip) for skip in self.skipped])


def read_tree(root: Path) -> Index:
    """Of a folder in a known layout, or of a manifest. Raises InputError for an unknown layout or a manifest that cannot be."""
    found = _offer(root)
    contour_files: dict[tuple[Path, float | None], ContourFile | InputError] = {}
    entries: list[Entry] = []
    skipped = list(found.skipped)
    for candidate in found.candidates:
        try:
            headers = _headers(candidate)
        except InputError as error:
            skipped.append(Skip(candidate.image, _reason(error, IMAGE_REASONS, BAD_IMAGE), _detail(error, candidate.image)))
            continue
        for header in headers:
            outcome = _judge(candidate, header, len(headers), contour_files)
            if isinstance(outcome, Skip):
                skipped.append(outcome)
            else:
                entries.append(outcome)
    entries, copies = _without_copies(entries)
    notes = [*found.notes, *_header_notes(entries), *_shared_identities(entries), *_unusual_sizes(entries)]
    skipped = sorted([*skipped, *copies], key=lambda skip: (str(skip.path), skip.reason))
    return Index(root, found.layout, tuple(_with_unique_ids(entries)), tuple(skipped), tuple(notes))


def _offer(root: Path) -> Offer:
    if root.is_file():
        return manifest.offer(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the folder of the images, or a manifest")
    try:
        for layout in (layout_mapping, layout_sunnybrook):
            if layout.recognises(root):
                return layout.offer(root)
    except OSError as error:
        raise InputError(f"{error.filename or root}: cannot be read ({error.strerror})") from None
    raise InputError(f"{root}: no known layout; known are ROOT/<date>/Patient (N)/T1_Mapping_/Apex.dcm with T1_map_apex/Contours.json, and Sunnybrook with link.csv; "
                     "for any other write a manifest: a CSV file with the columns image, patient, contours and type, and give its path")  # fmt: skip


def _reason(error: InputError, known: dict[type[InputError], str], otherwise: str) -> str:
    return next((reason for kind, reason in known.items() if isinstance(error, kind)), otherwise)


def _detail(error: InputError, path: Path) -> str:
    """Without the path that stands beside it."""
    return str(error).removeprefix(f"{path}: ")


def _headers(candidate: Candidate) -> Sequence[Header]:
    headers = read_headers(candidate.image, candidate.told)
    if candidate.frame is None:
        return headers
    if candidate.frame >= len(headers):
        raise InputError(f"{candidate.image}: has {len(headers)} frames, so there is no frame {candidate.frame}; the first is 0")
    return [headers[candidate.frame]]


def _judge(candidate: Candidate, header: Header, frames: int, read: dict[tuple[Path, float | None], ContourFile | InputError]) -> Entry | Skip:
    """`frames`: of the file that are candidates; `read`: contour files seen so far, for one may serve many images."""
    if not candidate.contour_files:
        return Skip(candidate.image, NO_CONTOURS, "there is no contour file for this image")
    if frames > 1:
        return Skip(candidate.image, NO_CONTOURS, f"frame {header.frame}: the file has {frames} frames and nothing says which one its contours are drawn on; write frame into a manifest")
    try:
        found = [_read_once(path, candidate.first_pixel_centre, read) for path in candidate.contour_files]
        own = [contour for file in found for contour in _of_this_image(file, candidate, header)]
        if not own:
            return Skip(candidate.image, NO_CONTOURS, f"{', '.join(str(path) for path in candidate.contour_files)} has none of this image")
        placed = tuple(on_image(contour, header.rows, header.columns) for contour in own)
        anatomy(placed, header.spacing_mm)
    except InputError as error:
        return Skip(candidate.image, _reason(error, CONTOUR_REASONS, BAD_CONTOURS), _detail(error, candidate.image))
    return Entry("", candidate.patient, header, placed, candidate.contour_files)


def _read_once(path: Path, first_pixel_centre: float | None, read: dict[tuple[Path, float | None], ContourFile | InputError]) -> ContourFile:
    key = (path, first_pixel_centre)
    if key not in read:
        try:
            read[key] = read_contours(path, first_pixel_centre)
        except InputError as error:
            read[key] = error
    found = read[key]
    if isinstance(found, InputError):
        raise found
    return found


def _of_this_image(file: ContourFile, candidate: Candidate, header: Header) -> list[Contour]:
    """Raises InputError if the file holds several images and nothing says which one this is."""
    images = sorted({contour.image for contour in file.contours})
    wanted = header.instance_uid if file.format == "cvi42" and candidate.contour_image is None else candidate.contour_image
    if wanted is not None:
        return [contour for contour in file.contours if contour.image in (wanted, "")]
    if len(images) > 1:
        shown = ", ".join(images[:5]) + (" ..." if len(images) > 5 else "")
        raise InputError(f"{file.path}: holds contours of {len(images)} images ({shown}) and nothing says which is this one; write it into contour_image of a manifest")
    return list(file.contours)


def _without_copies(entries: Sequence[Entry]) -> tuple[list[Entry], list[Skip]]:
    """Files of the same SOP Instance UID and the same bytes are one image. UIDs alone do not tell: some exports give all files one."""
    groups = Counter((entry.header.instance_uid, entry.header.frame) for entry in entries)
    first: dict[tuple[str, int], Path] = {}
    kept, copies = [], []
    for entry in entries:
        header = entry.header
        if not header.instance_uid or groups[header.instance_uid, header.frame] == 1:
            kept.append(entry)
            continue
        content = files.sha256_file(header.source)
        original = first.setdefault((content, header.frame), header.source)
        if original == header.source:
            kept.append(entry)
        else:
            copies.append(Skip(header.source, TWICE, f"the same bytes as {original}"))
    return kept, copies


def _header_notes(entries: Iterable[Entry]) -> list[str]:
    """One line for each kind of contradiction, with the first file."""
    found: dict[str, list[Path]] = {}
    for entry in entries:
        for note in entry.header.notes:
            found.setdefault(note, []).append(entry.header.source)
    return [f"{len(paths)} images are {note}: {paths[0]}{' ...' if len(paths) > 1 else ''}" for note, paths in found.items()]


def _shared_identities(entries: Iterable[Entry]) -> list[str]:
    """A PatientID that stands in the files of several patients: perhaps one person, who could then be in training and in test."""
    patients: dict[str, set[str]] = {}
    for entry in entries:
        if entry.header.patient:
            patients.setdefault(entry.header.patient, set()).add(entry.patient)
    return [
        f"PatientID {identity} stands in the files of {len(names)} patients ({', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}); "
        "if they are one person, give them one name in a manifest, for splits are by patient"
        for identity, names in sorted(patients.items())
        if len(names) > 1
    ]


def _unusual_sizes(entries: Iterable[Entry]) -> list[str]:
    """A contour of a smaller image lies well inside a larger one, and a wrong spacing fits any contour; only the size in mm tells."""
    odd = []
    for entry in entries:
        points = next(contour.points for contour in entry.contours if contour.kind == "epicardium")
        width_mm = 2 * math.sqrt(polygon_area(points) * entry.grid().pixel_area_mm2 / math.pi)  # of the circle of that area
        if not USUAL_WIDTH_MM[0] <= width_mm <= USUAL_WIDTH_MM[1]:
            odd.append((entry.header.source, width_mm))
    if not odd:
        return []
    return [f"the epicardium of {len(odd)} images is {odd[0][1]:.0f} mm wide ({odd[0][0]}{' ...' if len(odd) > 1 else ''}), usual are {USUAL_WIDTH_MM[0]:.0f} to "
            f"{USUAL_WIDTH_MM[1]:.0f} mm; is the pixel spacing right, and was it drawn on an image of this size?"]  # fmt: skip


def _with_unique_ids(entries: Sequence[Entry]) -> list[Entry]:
    """patient_type_level, with what else tells images apart where that is not enough; in the order of patients and ids."""
    plain = [_words(entry.patient, entry.header.type, entry.header.region or entry.header.source.stem) for entry in entries]
    counts = Counter(plain)
    longer = [
        _words(name, entry.header.source.stem, f"frame{entry.header.frame}") if counts[name] > 1 else name
        for name, entry in zip(plain, entries, strict=True)
    ]
    counts = Counter(longer)
    seen: Counter[str] = Counter()
    named = []
    for name, entry in zip(longer, entries, strict=True):
        seen[name] += 1
        named.append(replace(entry, id=_words(name, str(seen[name])) if counts[name] > 1 else name))
    return sorted(named, key=lambda entry: (entry.patient, entry.id))


def _words(*parts: str) -> str:
    return "_".join(re.sub(r"[^A-Za-z0-9.-]+", "_", part).strip("_") for part in parts)
